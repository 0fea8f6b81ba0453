"""What --epochs and --phases mean on given data: data epochs, minibatches, updates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from freeadv_fast.config.run import TrainConfig


class Span(NamedTuple):
    """The data epochs of one phase, all of equally many minibatches.

    Attributes:
        epochs: Data epochs. updates: Optimizer updates, both counted from the run's start.
        updates_per_epoch: Updates of one pass over the data, all m replays counted.
    """

    epochs: range
    updates: range
    updates_per_epoch: int


@dataclasses.dataclass(frozen=True)
class Budget:
    """A run in data epochs and optimizer updates.

    Attributes:
        spans: One for each phase, in their order; one for a run without phases.
    """

    spans: tuple[Span, ...]

    @classmethod
    def of(cls, config: TrainConfig, num_batches: Sequence[int]) -> Budget:
        """The budget of a config.

        Args:
            config: The run.
            num_batches: Minibatches of a data epoch in each phase.
        """
        if config.steps is not None:
            per_epoch = num_batches[0] * config.m
            num_epochs = -(-config.steps // per_epoch)
            return cls((Span(range(num_epochs), range(config.steps), per_epoch),))
        spans: list[Span] = []
        epoch = update = 0
        for end, count in zip(config.phase_ends, num_batches, strict=True):
            last_update = update + (end - epoch) * count * config.m
            spans.append(Span(range(epoch, end), range(update, last_update), count * config.m))
            epoch, update = end, last_update
        return cls(tuple(spans))

    @property
    def data_epochs(self) -> int:
        """Passes over the data."""
        return self.spans[-1].epochs.stop

    @property
    def total_updates(self) -> int:
        """Optimizer updates."""
        return self.spans[-1].updates.stop

    def phase_of(self, epoch: int) -> int:
        """The phase of a data epoch, from 0; the last one's after the end."""
        begun = [number for number, span in enumerate(self.spans) if epoch >= span.epochs.start]
        return begun[-1]

    def begins_phase(self, epoch: int) -> bool:
        """Whether a phase ends where this data epoch begins, and another one begins."""
        return any(epoch == span.epochs.start for span in self.spans[1:])

    def updates_before(self, data_epochs: float) -> int:
        """Updates whose place is before so many passes over the data; inverts the next one."""
        span = [span for span in self.spans if data_epochs >= span.epochs.start][-1]
        in_span = (data_epochs - span.epochs.start) * span.updates_per_epoch
        return span.updates.start + math.ceil(in_span - 1e-9)

    def data_epochs_before(self, update: int) -> float:
        """Passes over the data that are done before an update, fractions counted.

        A whole number, to the last bit, for the first update of a data epoch.
        """
        span = [span for span in self.spans if update >= span.updates.start][-1]
        return span.epochs.start + (update - span.updates.start) / span.updates_per_epoch
