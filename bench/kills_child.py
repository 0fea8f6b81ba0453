"""A training run that kills itself: the child of kills.py. Arguments: the kill as JSON, flags."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from freeadv_fast import training
from freeadv_fast.cli import run_training
from freeadv_fast.runs import checkpoint
from freeadv_fast.session import conclude, outputs
from freeadv_fast.session.guard import Guard

# The function that begins each moment.
PLACES: dict[str, tuple[Any, str]] = {
    "start": (training, "prepare"),
    "minibatch": (training, "arrive"),
    "saving": (checkpoint, "write_checkpoint"),
    "guard": (Guard, "check"),
    "selection": (training, "select"),
    "evaluation": (conclude, "evaluate"),
    "export": (outputs, "write_export"),
}


def arm(kill: dict[str, Any]) -> None:
    """Makes the moment's n-th call start the clock of the kill."""
    owner, name = PLACES[kill["moment"]]
    real: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == kill["call"]:
            number = signal.Signals[kill["signal"]]
            timer = threading.Timer(kill["delay"], os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()
        return real(*arguments, **options)

    setattr(owner, name, counted)


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    if wanted is not None and int(os.environ.get("RANK", "0")) == wanted["rank"]:
        arm(wanted)
    sys.exit(run_training("free", "cifar", sys.argv[2:]))
