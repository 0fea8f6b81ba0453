"""Processes that decode minibatches: plans go in by a pipe, pixels come out by shared memory.

torch's DataLoader sends pixels through a queue and /dev/shm from a thread of the worker; where
that thread fails (docker gives /dev/shm 64 MB, a process 1,024 open files), it prints its traceback
and the trainer waits for ever. Here the pixels lie in memory that is mapped before the worker is
forked, which no mount limits, the worker has one thread, and whatever it dies of is noticed.
"""

from __future__ import annotations

import atexit
import gc
import itertools
import math
import mmap
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from freeadv_fast.data.stream import Ints
from freeadv_fast.data.waiting import SILENT_SECONDS, SLOW_SECONDS
from freeadv_fast.errors import UserError

# Plans that a worker holds: one that it executes and one that waits.
DEPTH = 2
# How often the trainer looks whether a silent worker lives, and a worker whether its trainer does.
LOOK_SECONDS = 1.0
# A killed process is gone at once, unless it waits for a disk; then it is not waited for.
END_SECONDS = 5.0


class Planned(Protocol):
    """A plan: what a worker does with some rows of a split."""

    @property
    def rows(self) -> Ints:
        """(n,) int64 rows of the split's file list."""
        ...


Number = TypeVar("Number", bound=np.generic)
AnyPlan = TypeVar("AnyPlan", bound=Planned)
Pixels = NDArray[np.uint8]
# Executes a plan: fills the pixels, notes the row that it is at, and returns what went wrong.
Work = Callable[[AnyPlan, Pixels, Ints], UserError | None]


def executed(
    plans: Iterator[AnyPlan],
    work: Work[AnyPlan],
    shape: tuple[int, ...],
    num_workers: int,
    path: Callable[[int], str],
) -> Generator[Pixels, None, None]:
    """Yields the pixels of each plan, in order, executed by worker processes.

    Args:
        plans: What to do.
        work: Does it.
        shape: Of the largest minibatch.
        num_workers: Processes, at least 1.
        path: The file of a row, to say where a worker died.

    Yields:
        Memory that is overwritten once the next minibatch is asked for.

    Raises:
        UserError: what a worker returned, died of, or could not be started for.
    """
    workers: list[_Worker] = []
    given: deque[_Worker] = deque()
    try:
        for _ in range(num_workers):
            workers.append(_started(work, shape, num_workers, path))
        for worker, plan in zip(itertools.cycle(workers), plans, strict=False):
            if len(given) == DEPTH * num_workers:
                yield given.popleft().take()
            worker.give(plan)
            given.append(worker)
        while given:
            yield given.popleft().take()
    finally:
        for worker in workers:
            worker.end()


def _started(
    work: Work[Any], shape: tuple[int, ...], num_workers: int, path: Callable[[int], str]
) -> _Worker:
    """A worker, or the line that says why there is none."""
    try:
        return _Worker(work, shape, path)
    except OSError as error:
        raise UserError(
            f"--workers {num_workers}: no further process or shared memory for it "
            f"({error.strerror}); use fewer, or 0 for none"
        ) from None


class _Worker:
    """A forked process that executes plans one after the other."""

    def __init__(self, work: Work[Any], shape: tuple[int, ...], path: Callable[[int], str]) -> None:
        """Maps its memory and forks it; arguments are those of `executed`.

        Raises:
            OSError: no memory, process or open file is left for it.
        """
        self.path = path
        self.slots = [_shared(shape, np.uint8) for _ in range(DEPTH)]
        self.row: Ints = _shared((1,), np.int64)
        self.given: deque[tuple[int, int]] = deque()
        self.turns = itertools.cycle(range(DEPTH))
        # Not spawn: the index of a million files would travel to each worker.
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        try:
            self.process = context.Process(
                target=_serve, args=(theirs, work, self.slots, self.row, os.getpid()), daemon=True
            )
            # A worker has its trainer's garbage and none of its threads: it would wait for them for
            # ever if it collected a DALI pipeline. What is frozen at the fork it does not collect.
            gc.freeze()
            self.process.start()
        except OSError:
            self.pipe.close()
            raise
        finally:
            gc.unfreeze()
            theirs.close()
        # multiprocessing asks its processes to end and waits; one that is stopped does not hear it.
        atexit.register(self.process.kill)

    def give(self, plan: Planned) -> None:
        """Hands a plan over, the worker's next but `DEPTH`.

        Raises:
            UserError: the worker is dead.
        """
        self.given.append((next(self.turns), len(plan.rows)))
        try:
            self.pipe.send(plan)
        except OSError:
            raise self._death() from None

    def take(self) -> Pixels:
        """The pixels of the oldest plan, with a line where a file takes long.

        Raises:
            UserError: what the worker returned in their place, died of, or is silent at.
        """
        row, since, is_told = self.row.item(), time.monotonic(), False
        while not self.pipe.poll(LOOK_SECONDS):
            if not self.process.is_alive() and not self.pipe.poll():
                raise self._death()
            if self.row.item() != row:
                row, since, is_told = self.row.item(), time.monotonic(), False
            seconds = time.monotonic() - since
            if seconds > SLOW_SECONDS and not is_told:
                is_told = True
                at = f"process {self.process.pid} has been at {self.path(row)}"
                print(f"{at} for {seconds:.0f} s: a slow disk, or it is stopped", flush=True)
            if seconds > SILENT_SECONDS:
                raise UserError(
                    f"--data: {self.path(row)} was not read in {SILENT_SECONDS / 60:.0f} minutes; "
                    f"see whether its disk or file server answers and process {self.process.pid}, "
                    "which decodes it, is not stopped, then --resume"
                )
        try:
            error: UserError | None = self.pipe.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if error is not None:
            raise error
        slot, count = self.given.popleft()
        return self.slots[slot][:count]

    def end(self) -> None:
        """Kills the process: it only reads, and may be in the middle of a file."""
        self.pipe.close()
        self.process.kill()
        self.process.join(END_SECONDS)
        atexit.unregister(self.process.kill)

    def _death(self) -> UserError:
        """The line about a worker that is no more."""
        self.process.join(END_SECONDS)
        status = self.process.exitcode
        if status is not None and status < 0:
            cause = f"was killed by {signal.Signals(-status).name}"
        else:
            cause = f"ended with status {status}"
        return UserError(
            f"--workers: a process that decodes images {cause} at {self.path(self.row.item())}; if "
            "memory was short use fewer, if it is always that file remove it; then --resume"
        )


def _shared(shape: tuple[int, ...], dtype: type[Number]) -> NDArray[Number]:
    """Zeros that a process and those it forks both see; of no file, so that no mount limits it."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, num_bytes), dtype).reshape(shape)


def _serve(pipe: Connection, work: Work[Any], slots: list[Pixels], row: Ints, trainer: int) -> None:
    """A worker's life: until its trainer ends it, closes the pipe or is gone."""
    # Ctrl-C is the trainer's business. A forked process would otherwise run the trainer's own
    # handlers, which note a SIGTERM and go on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for slot in itertools.cycle(slots):
        while not pipe.poll(LOOK_SECONDS):
            if os.getppid() != trainer:
                return
        try:
            plan: Planned = pipe.recv()
        except EOFError:
            return
        pipe.send(work(plan, slot[: len(plan.rows)], row))
