"""The complete description of a run: one frozen dataclass.

A config is never changed; derive a new one with `dataclasses.replace`, or read the properties of
`fields.RunFields`.
"""

from __future__ import annotations

import dataclasses

from freeadv_fast.config.checks import check
from freeadv_fast.config.fields import RunFields


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(RunFields):
    """A training run, from the data to the final evaluation."""

    def __post_init__(self) -> None:
        """Checks every field on its own and against the others.

        Raises:
            UserError: names the flag and the fix.
        """
        if self.phases:  # what is evaluated, exported and saved is what the last phase trains
            object.__setattr__(self, "image_size", self.phases[-1].image_size)
            object.__setattr__(self, "batch_size", self.phases[-1].batch_size)
        check(self)
