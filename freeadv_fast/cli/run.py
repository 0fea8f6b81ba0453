"""From a command line to an exit status: one line for every mistake.

`run_training` is the body of every training script in launch/, `run_tool` of every other one.
"""

from __future__ import annotations

import inspect
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from freeadv_fast.cli.flags import EMBEDDED, parse, parse_with_tyro, refuse_unknown_flags
from freeadv_fast.cli.help import asks_for_help, help_page, tool_page
from freeadv_fast.cli.resolve import resolve
from freeadv_fast.config.file import CONFIG_NAME, remarks_on
from freeadv_fast.config.method_names import Method
from freeadv_fast.config.task_fields import has_boxes
from freeadv_fast.distributed.heartbeat import PeerLost
from freeadv_fast.distributed.world import is_main_rank
from freeadv_fast.errors import UserError, remedy
from freeadv_fast.session.signals import Interrupted

T = TypeVar("T")


def run_training(method: Method, dataset: str, argv: Sequence[str] | None = None) -> int:
    """Parses a command line, trains, and returns the process's exit status.

    Args:
        method: The script's method; --method changes it.
        dataset: ``imagenet``, ``cifar`` or ``coco``: whose recipe --data alone selects. Without
            --data the embedded recipe of the method is used.
        argv: Arguments; those of the process by default.
    """

    def work() -> int:
        arguments = list(sys.argv[1:] if argv is None else argv)
        if asks_for_help(arguments):
            if is_main_rank():
                print(help_page(arguments, method, dataset))
            return 0
        command, typed = parse(arguments, method, dataset)
        from freeadv_fast.training import dry_run, train  # seconds of imports that --help spares

        config, remarks = resolve(command.run, typed)
        own = Path(config.run_folder) / CONFIG_NAME
        saved = own if config.resume else command.config
        if saved is not None and Path(saved).is_file():
            remarks = remarks_on(Path(saved)) + remarks
        if is_main_rank():
            print_remarks(remarks, "" if "data" in typed else config.data)
        if command.dry_run:
            for line in dry_run(config):
                if is_main_rank():
                    print(line)
            return 0
        train(config)
        return 0

    return guard(work)


def run_tool(tool: Callable[..., T], act: Callable[[T], int] = int) -> int:  # type: ignore[assignment]
    """Runs a script whose flags are a function's arguments; mistakes get one line.

    Args:
        tool: A function that returns the exit status, or a dataclass whose fields are the flags;
            its docstrings and annotations make the help.
        act: Takes the instance of such a dataclass, and returns the exit status.
    """
    names = inspect.signature(tool).parameters

    def work() -> int:
        arguments = sys.argv[1:]
        if asks_for_help(arguments):
            if is_main_rank():
                print(tool_page(tool))
            return 0
        refuse_unknown_flags(arguments, names)
        return act(parse_with_tyro(tool, arguments))

    return guard(work)


def guard(work: Callable[[], int]) -> int:
    """Runs `work`; a user's mistake becomes one line and status 2, a signal 128 + its number.

    So does a reader that leaves before the end, as `head` does: that is SIGPIPE's number.
    """
    try:
        try:
            return status_of(work)
        finally:
            sys.stdout.flush()  # at its end Python could only complain
    except BrokenPipeError:
        if not has_reader_left():
            raise
        # Python flushes the stream once more, into what still takes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def status_of(work: Callable[[], int]) -> int:
    """The status of `work`, or of what stopped it, after its line."""
    try:
        return work()
    except UserError as error:
        # Each rank that waits for a lost peer says so: rank 0 may be the peer.
        if is_main_rank() or isinstance(error, PeerLost):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except Interrupted as interrupted:
        saved = "everything is saved, continue with --resume"
        if not interrupted.is_saved:
            saved = "at once; --resume continues from the last checkpoint"
        if is_main_rank():
            print(f"stopped by {interrupted}; {saved}", file=sys.stderr, flush=True)
        return 128 + interrupted.signum
    except KeyboardInterrupt:  # before or after training, when nothing needs saving
        return 128 + signal.SIGINT
    except OSError as error:
        if (help := remedy(error)) is None:
            raise
        place = f" {error.filename}" if error.filename else ""
        print(f"error: --output-dir:{place}: {error.strerror}; {help} and add --resume",
              file=sys.stderr, flush=True)  # fmt: skip
        return 2


def has_reader_left() -> bool:
    """Whether nobody reads any more what is printed, as when `head` has seen enough."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def print_remarks(remarks: list[str], chosen_data: str) -> None:
    """Prints what was settled without being typed, before anything is done.

    Args:
        remarks: A line each. chosen_data: The data, where they were not typed.
    """
    if chosen_data in EMBEDDED:
        own = "coco:FOLDER" if has_boxes(chosen_data) else "FOLDER"
        print(f"no --data: training on {EMBEDDED[chosen_data]}; --data {own} trains on yours")
    for remark in remarks:
        print(remark)
    sys.stdout.flush()
