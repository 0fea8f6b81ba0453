"""Runs a loader ahead of training: a background thread, on a GPU with a stream of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Generator

import torch

from freeadv_fast.data.loader import Batch
from freeadv_fast.data.waiting import next_item

# Minibatches that may be ready before the one in training is done.
DEPTH = 2
# A thread that then still waits for a file is left to itself; the process's end ends it.
JOIN_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class _Ready:
    """A minibatch, and the event after which its bytes are on the device (None on a CPU)."""

    batch: Batch
    copied: torch.cuda.Event | None


def prefetched(
    batches: Generator[Batch, None, None], device: torch.device
) -> Generator[Batch, None, None]:
    """Yields `batches`, produced up to `DEPTH` minibatches ahead in a background thread.

    On a GPU the thread works on a side stream; the consumer's stream waits for each minibatch on
    the device, the host does not. Closing the generator stops the thread, which closes `batches`.

    Args:
        batches: Produces minibatches on `device`, on the current stream.
        device: Where the minibatches live.

    Raises:
        Exception: whatever `batches` raised, at the minibatch where it happened.
        UserError: no minibatch came, see `waiting.next_item`.
    """
    ready: queue.SimpleQueue[_Ready | BaseException | None] = queue.SimpleQueue()
    room = threading.Semaphore(DEPTH)
    stopped = threading.Event()

    def produce() -> None:
        end: BaseException | None = None
        try:
            with contextlib.closing(batches), _side_stream(device):
                while room.acquire() and not stopped.is_set():
                    batch = next(batches, None)
                    if batch is None:
                        break
                    ready.put(_Ready(batch, _record_event(device)))
        except BaseException as error:
            end = error
        ready.put(end)

    thread = threading.Thread(target=produce, name="freeadv-prefetch", daemon=True)
    thread.start()
    try:
        while (item := next_item(ready)) is not None:
            if isinstance(item, BaseException):
                raise item
            room.release()
            yield _handed_over(item)
    finally:
        stopped.set()
        room.release()
        thread.join(JOIN_SECONDS)


def _side_stream(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A fresh stream as the current one of this thread; nothing on a CPU."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def _record_event(device: torch.device) -> torch.cuda.Event | None:
    """Marks the work queued so far on the current stream; None on a CPU."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def _handed_over(item: _Ready) -> Batch:
    """The minibatch, once the consumer's stream has been told to wait for it."""
    if item.copied is not None:
        stream = torch.cuda.current_stream(item.batch.images.device)
        stream.wait_event(item.copied)
        # The allocator must not reuse these bytes before the consumer's stream is done with them.
        item.batch.images.record_stream(stream)
        item.batch.labels.record_stream(stream)
    return item.batch
