"""Leaving politely: SIGTERM, SIGUSR1 and the first Ctrl-C ask a run to save and stop."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupted(Exception):
    """The run was asked to stop, and does.

    Attributes:
        signum: The signal that asked; the exit status is 128 + signum.
        is_saved: Whether everything is in a checkpoint; a second Ctrl-C does not wait for that.
    """

    def __init__(self, signum: int, is_saved: bool = True) -> None:
        """Names the signal in the message."""
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.is_saved = is_saved


class StopRequests:
    """Notes signals while training runs; a minibatch boundary is where they are obeyed.

    A second Ctrl-C leaves at once. So does any signal once `leave_at_once` is set, when everything
    worth saving is on disk.
    """

    def __init__(self) -> None:
        """No signal yet."""
        self.received = 0
        self.leave_at_once = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        """Installs the handlers; outside the main thread signals keep their own."""
        for signum in SIGNALS:
            try:
                self._handlers[signum] = signal.signal(signum, self._note)
            except ValueError:  # not the main thread: a Python user's own program handles them
                break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Puts the handlers back."""
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        is_second_interrupt = signum == signal.SIGINT and self.received
        if self.leave_at_once or is_second_interrupt:
            raise Interrupted(signum, is_saved=self.leave_at_once)
        self.received = signum
