"""The complete description of a run: one frozen dataclass, which checks itself.

A config is never changed; derive a new one with `dataclasses.replace`, or read the properties of
`fields.RunFields`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from freeadv_fast.config.checks import check
from freeadv_fast.config.fields import RunFields
from freeadv_fast.config.read import readers


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(RunFields):
    """A training run, from the data to the final evaluation.

    Fields mean what their flags mean, and may be written as there: ``eps="8/255"``, the number
    ``eps=8/255``, ``schedule="at:30,60"``, ``eval_attacks="pgd-10,pgd-50"``. So does
    ``dataclasses.replace(recipe, eps="8/255")``: steps that the recipe chose (`step_size`,
    `eval_step`) follow the radius, those that you write stay.

    Raises:
        UserError: a value of the wrong type, one that cannot be meant, or two that do not fit each
            other; a `ValueError` whose one line names the flag and the fix.
    """

    def __post_init__(self) -> None:
        """Reads every field, lets steps follow the radius, and checks all of it."""
        for name, read in readers().items():
            self._set(name, read(getattr(self, name)))
        if self.phases:  # what is evaluated, exported and saved is what the last phase trains
            self._set("image_size", self.phases[-1].image_size)
            self._set("batch_size", self.phases[-1].batch_size)
        self._let_steps_follow()
        check(self)

    def _let_steps_follow(self) -> None:
        """Moves the steps that a recipe chose for another ball than this one.

        In the ball of another norm, where they mean nothing, `step_size` becomes the method's own
        (`RunFields.threat`) and `eval_step` eps / 8: 2.5 eps / K for K = 20.
        """
        if self.step_size is not None:
            self._set("step_size", self.step_size.in_ball(self.eps, self.norm))
        eighth = self.eps.scaled(0.125).chosen_in(self.eps, self.norm)
        self._set("eval_step", self.eval_step.in_ball(self.eps, self.norm) or eighth)

    def _set(self, name: str, value: Any) -> None:
        """Sets a field while the config is being made."""
        object.__setattr__(self, name, value)
