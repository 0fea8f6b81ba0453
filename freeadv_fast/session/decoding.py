"""Where a run's training images are decoded: measured once, decided once, for all ranks alike.

A run begins on the CPU. As soon as updates are made as they will be from then on, some of them are
timed on the device, where waiting for images does not count: so many images training asks for. Then
the threads decode some minibatches with nothing else to do. `data.decoding` compares the two.

What is decided holds from a position on that the loader has not reached: how the pixels of a
minibatch are rounded follows from its position and the choice, whenever its images were read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from freeadv_fast.data.decoding import Choice, place_for
from freeadv_fast.data.folder import AHEAD, FolderLoader
from freeadv_fast.data.loader import Batch, Loader
from freeadv_fast.data.unlabelled import SemiSupervisedLoader
from freeadv_fast.distributed.world import World
from freeadv_fast.runs.log import labelled

# Minibatches that are timed. Their median counts: cuDNN's search or a recording for another shape
# falls into one of them.
WATCHED = 8


class Span(Protocol):
    """A stretch of the device's work, which begins where it is made."""

    def end(self) -> None:
        """Ends it."""
        ...

    @property
    def seconds(self) -> float:
        """Its length; waits for its end."""
        ...


class DeviceSpan:
    """What the current stream of the GPU has been given in between; the host waits for nothing."""

    def __init__(self) -> None:
        """Begins behind what the stream waits for by now, such as a minibatch."""
        self._begin = torch.cuda.current_stream().record_event(_timing_event())
        self._end = _timing_event()

    def end(self) -> None:
        """Ends it behind what the stream has been given."""
        torch.cuda.current_stream().record_event(self._end)

    @property
    def seconds(self) -> float:
        """Its length on the device; waits for its end."""
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) / 1e3


def _timing_event() -> torch.cuda.Event:
    """An event that knows the time."""
    return torch.cuda.Event(enable_timing=True)


class Decoding:
    """Decides for each phase where its training images are decoded, if there is a choice.

    Args:
        train_loaders: Of each phase.
        world: This process among the others.
        num_threads: Of each rank, that decode.
        begin: Begins a span of the device's time.
    """

    def __init__(
        self,
        train_loaders: Sequence[Loader],
        world: World,
        num_threads: int,
        begin: Callable[[], Span] | None = None,
    ) -> None:
        """Nothing is decided, nothing measured."""
        files = [files_of(loader) for loader in train_loaders]
        self._loaders = [loader if loader and loader.later else None for loader in files]
        self._world = world
        self._num_threads = max(num_threads, 1)
        self._begin = begin or DeviceSpan
        self._choices: dict[int, Choice] = {}
        self._watched: dict[int, list[tuple[int, Span]]] = {}

    @contextlib.contextmanager
    def watching(self, phase: int, batch: Batch, is_steady: bool) -> Iterator[None]:
        """Times what is done with a minibatch, as long as that helps to decide.

        Args:
            phase: That the run is in.
            batch: This rank's minibatch.
            is_steady: Whether updates are made as they will be from now on.
        """
        if not is_steady or self._is_settled(phase):
            yield
            return
        span = self._begin()
        yield
        span.end()
        num_decoded = int((batch.indices >= 0).sum())  # --unlabelled's images come as pixels
        self._watched.setdefault(phase, []).append((num_decoded, span))

    def decide(self, phase: int, epoch: int, minibatch: int) -> list[str]:
        """Decides when enough is measured; all ranks together, in the same minibatch.

        Args:
            phase: That the run is in.
            epoch: Data epoch. minibatch: Minibatches of it that are finished.

        Returns:
            What the user should know, a line or none.

        Raises:
            UserError: a file that cannot be decoded.
        """
        watched, loader = self._watched.get(phase, []), self._loaders[phase]
        if loader is None or len(watched) < WATCHED:
            return []
        asked = statistics.median(number / span.seconds for number, span in watched)
        decoded = self._world.together(lambda: loader.decoding_rate(epoch + 1))
        epochs, position = divmod(minibatch + AHEAD, loader.num_batches)
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        # The fastest rank's training, the slowest rank's threads.
        fastest, slowest, fewest = self._world.max_on_host([round(asked), -round(decoded), -cores])
        choice = Choice(
            place=place_for(-slowest, fastest),
            threads=self._num_threads,
            ranks=self._world.size,
            decoded=-slowest,
            asked=fastest,
            cores=-fewest,
            epoch=epoch + epochs,
            minibatch=position,
        )
        self._choose(phase, choice, loader)
        del self._watched[phase]
        return self.lines(phase)

    def lines(self, phase: int) -> list[str]:
        """Where and why, a line in the columns of the start; none as long as nothing is decided."""
        choice = self._choices.get(phase)
        return labelled("decoding", [str(choice)] if choice else [])

    def record(self, phase: int) -> dict[str, Any] | None:
        """Where and why, for result.json; None where nothing was decided."""
        choice = self._choices.get(phase)
        return choice.record() if choice else None

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """The choices, by phase, as a checkpoint holds them."""
        return {phase: dataclasses.asdict(choice) for phase, choice in self._choices.items()}

    def load_state_dict(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        """Goes on with a checkpoint's choices; those of other threads or ranks are made anew."""
        for phase, saved in state.items():
            choice, loader = Choice(**saved), self._loaders[phase]
            is_of_these = (choice.threads, choice.ranks) == (self._num_threads, self._world.size)
            if loader is not None and is_of_these:
                self._choose(phase, choice, loader)

    def _is_settled(self, phase: int) -> bool:
        """Whether there is nothing to choose from, or it is chosen."""
        return self._loaders[phase] is None or phase in self._choices

    def _choose(self, phase: int, choice: Choice, loader: FolderLoader) -> None:
        """Notes a phase's choice, and has its loader go by it."""
        self._choices[phase] = choice
        if choice.place == "GPU":
            loader.move(choice.epoch, choice.minibatch)


def files_of(loader: Loader) -> FolderLoader | None:
    """The part of a training loader that decodes an ImageFolder; None where there is none."""
    if isinstance(loader, SemiSupervisedLoader):
        loader = loader.labelled
    return loader if isinstance(loader, FolderLoader) else None
