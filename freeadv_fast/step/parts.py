"""An update of several minibatches: a step on parts of its images, one after the other."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from freeadv_fast.step.graphs import Step
from freeadv_fast.step.mixing import MixedLabels


class Part(NamedTuple):
    """Which images of an update the step in progress has.

    Attributes:
        first_slot: Batch slot of the first.
        is_first: Whether nothing of the update was done before.
        is_last: Whether nothing of it comes after.
    """

    first_slot: int
    is_first: bool
    is_last: bool


WHOLE = Part(first_slot=0, is_first=True, is_last=True)


class TakesParts(Protocol):
    """What a learner is to the parts of an update.

    Attributes:
        part: Of the update in progress.
    """

    part: Part

    def without_reduction(self) -> contextlib.AbstractContextManager[None]:
        """Passes in here add to this rank's gradients; the next pass outside sums them all."""


@dataclasses.dataclass(frozen=True)
class InParts:
    """A step on parts of its inputs, one after the other, that makes one update of them all.

    Each part is a minibatch of its own to attacks and to batch norm, whose running statistics move
    with each. Losses are divided by the size of the whole, so that gradients add up to those of its
    mean. They are dropped before the first part, reduced over the ranks in the last one, and
    applied after it. Ranks may have different numbers of parts: each reduces once.

    Attributes:
        learner: Runs the parts.
        step: Takes tensors with a row an image, and numbers.
        num_parts: Of near-equal size, as `torch.tensor_split` makes them and groups of batch norm.
    """

    learner: TakesParts
    step: Step
    num_parts: int

    def __call__(self, *inputs: Any) -> None:
        """Runs the step on each part."""
        learner, last = self.learner, self.num_parts - 1
        size, rest = divmod(len(inputs[0]), self.num_parts)
        ends = [size * number + min(number, rest) for number in range(self.num_parts + 1)]
        try:
            for number, rows in enumerate(map(slice, ends, ends[1:])):
                learner.part = Part(rows.start, is_first=number == 0, is_last=number == last)
                is_reduced = learner.part.is_last
                with contextlib.nullcontext() if is_reduced else learner.without_reduction():
                    self.step(*(_rows_of(value, rows) for value in inputs))
        finally:
            learner.part = WHOLE


def _rows_of(value: Any, rows: slice) -> Any:
    """Rows of a step's input in its own memory, a leaf where it is one; a number as it is."""
    if isinstance(value, MixedLabels):
        return MixedLabels(value.own[rows], value.other[rows], value.share)
    if isinstance(value, Tensor):
        return value.detach()[rows].requires_grad_(value.requires_grad)
    return value
