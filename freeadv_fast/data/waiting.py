"""Waiting for a minibatch that may never come, without being deaf to signals meanwhile."""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
import time
from collections.abc import Callable, Generator
from types import FrameType
from typing import TypeVar

from freeadv_fast.errors import UserError

# A file server that is started again takes minutes, and a run should survive it; its user should
# know sooner what it waits for.
SILENT_SECONDS = 600.0
SLOW_SECONDS = 60.0
# Slurm and torchrun kill 30 s after they asked. A minibatch that comes in time lets the run save.
GRACE_SECONDS = 20.0
LOOK_SECONDS = 0.5

ASKING_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

Item = TypeVar("Item")


def next_item(items: queue.SimpleQueue[Item]) -> Item:
    """The next item of a queue that another thread fills.

    Raises:
        UserError: none came although a signal asked the run to stop, or for far too long.
    """
    with contextlib.suppress(queue.Empty):
        return items.get_nowait()
    with _noted_signals() as asked:
        started, is_told = time.monotonic(), False
        while True:
            with contextlib.suppress(queue.Empty):
                return items.get(timeout=LOOK_SECONDS)
            now = time.monotonic()
            if asked and now - asked[0][1] > GRACE_SECONDS:
                raise UserError(
                    f"{asked[0][0].name} came, and no minibatch in {GRACE_SECONDS:.0f} s: left "
                    "without the work since the last checkpoint; go on with --resume"
                )
            if now - started > SLOW_SECONDS and not is_told:
                is_told = True
                print(
                    f"no minibatch for {SLOW_SECONDS:.0f} s: waiting for its disk or file server, "
                    f"for {SILENT_SECONDS / 60:.0f} minutes at most",
                    flush=True,
                )
            if now - started > SILENT_SECONDS:
                raise UserError(
                    f"--data: no minibatch for {SILENT_SECONDS / 60:.0f} minutes; see whether its "
                    "disk or file server answers and no process is stopped, then --resume"
                )


@contextlib.contextmanager
def _noted_signals() -> Generator[list[tuple[signal.Signals, float]], None, None]:
    """What asks the run to stop within the block, and when; its handlers work as before.

    They may note a signal for the next minibatch's end, which is then never reached.
    """
    asked: list[tuple[signal.Signals, float]] = []
    handlers: dict[signal.Signals, Callable[[int, FrameType | None], object]] = {}

    def note(signum: int, frame: FrameType | None) -> None:
        asked.append((signal.Signals(signum), time.monotonic()))
        handlers[signal.Signals(signum)](signum, frame)

    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        for asking in ASKING_SIGNALS:
            handler = signal.getsignal(asking)
            if callable(handler):  # the others end the process without us
                handlers[asking] = handler
                signal.signal(asking, note)
    try:
        yield asked
    finally:
        for asking, handler in handlers.items():
            signal.signal(asking, handler)
