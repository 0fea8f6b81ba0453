"""The minibatches of a run as one stream, made ahead across the ends of data epochs.

What an epoch's end takes (its last minibatches, a log, a checkpoint) is time to decode in. The
stream is a queue and no more: the run's place says which minibatch comes next, and a stream that
stands elsewhere, for the run was rewound or has entered a phase, is let go of with all it holds.
"""

from __future__ import annotations

from collections.abc import Generator

from freeadv_fast.data.folder import FolderLoader
from freeadv_fast.data.loader import Batch, TrainingLoader
from freeadv_fast.session.cost import costs_of, until
from freeadv_fast.session.decoding import files_of
from freeadv_fast.session.run import Run


class Ahead:
    """What a run trains on, a minibatch after the other.

    A stream ends where no epoch surely follows with the same loader: with a phase, with the run,
    and where held-out images are to be read by what decodes it. A decoder has one queue.
    """

    def __init__(self, run: Run) -> None:
        """Nothing is made before the first minibatch is asked for."""
        self._run = run
        self._costs = costs_of(run.config, run.budget, run.phase_loaders, run.world.size)
        self._batches: Generator[Batch, None, None] | None = None
        self._next: tuple[TrainingLoader, int, int] | None = None
        self._end = 0

    def next(self) -> Batch:
        """The minibatch at the run's place, which must be one of its data epoch.

        Raises:
            UserError: it cannot be read or decoded.
        """
        loader, progress = self._run.loaders.train, self._run.progress
        epoch, minibatch = progress.epoch, progress.minibatch
        if self._batches is None or self._next != (loader, epoch, minibatch):
            self.close()
            self._batches = self._begun()
        batch = next(self._batches)
        is_last = minibatch + 1 == loader.num_batches
        self._next = (loader, epoch + 1, 0) if is_last else (loader, epoch, minibatch + 1)
        # The place may have become that of the held-out images since the stream began.
        if self._reached + 1 == self._end or (is_last and self._must_pause):
            self.close()
        return batch

    def close(self) -> None:
        """Stops what makes minibatches, and lets go of those that are ready."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _begun(self) -> Generator[Batch, None, None]:
        """A stream from the run's place to where it must end."""
        run, cost = self._run, self._costs[self._run.phase]
        progress, first = run.progress, run.budget.spans[run.phase].epochs.start
        limit = run.config.max_passes
        if limit is not None:  # a rewound run has more passes behind it than its place says
            limit += cost.first(self._reached).passes.weights - progress.passes
        (whole,) = until(limit, [cost])
        self._end = whole.minibatches
        if self._must_pause:
            self._end = min(self._end, (progress.epoch - first + 1) * cost.num_batches)
        last = first + (self._end - 1) // cost.num_batches
        return run.loaders.train.epochs(progress.epoch, progress.minibatch, last)

    @property
    def _reached(self) -> int:
        """Minibatches of the phase before the run's place."""
        run, progress = self._run, self._run.progress
        epochs = progress.epoch - run.budget.spans[run.phase].epochs.start
        return epochs * run.loaders.train.num_batches + progress.minibatch

    @property
    def _must_pause(self) -> bool:
        """Whether what decodes the next epoch is needed for held-out images before."""
        files, holdout = files_of(self._run.loaders.train), self._run.loaders.holdout
        return (
            files is not None
            and isinstance(holdout, FolderLoader)
            and files.decoder_at(self._run.progress.epoch + 1, 0) is holdout.decoder
        )
