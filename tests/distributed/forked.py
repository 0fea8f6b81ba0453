"""Scripts in processes that have imported already, alone or as ranks: forks of a server.

A fresh process imports for 6 s of a slow core before its first line, and torchrun with two ranks
for 17 s. A fork does not, and is otherwise a process of its own: it may be killed, limited and
given another environment. What torchrun itself does is tested where torchrun is what is typed.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

from freeadv_fast.session import outputs

# One server a test process, with everything that a training run imports.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "forked", "freeadv_fast.training", "freeadv_fast.cli.run", "freeadv_fast.data.folder_dali",
        "timm", "torch.utils.tensorboard",
    ]
)  # fmt: skip
PATIENCE = 300.0
# So long the others have for a line of their own; torchrun looks ten times a second.
GRACE = 1.0


def become(
    script: str, arguments: Sequence[str], variables: dict[str, str], folder: str, output: str
) -> None:
    """Makes this fork what `python SCRIPT ARGUMENTS` would be in that environment and folder."""
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        file = os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    outputs.draw = lambda *_: None  # as in conftest.py
    torch.set_num_threads(1)
    runpy.run_path(script, run_name="__main__")


def start(script: Path, *arguments: object, output: Path, **variables: object) -> BaseProcess:
    """Starts a script.

    Args:
        script: A file of Python.
        arguments: The words after it.
        output: OUTPUT.stdout and OUTPUT.stderr get what it prints, after what is there.
        variables: What its environment has beside this process's.
    """
    given = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | variables
    environment = dict(os.environ) | {name: str(value) for name, value in given.items()}
    words = [str(word) for word in arguments]
    process = SERVER.Process(
        target=become, args=(str(script), words, environment, os.getcwd(), str(output))
    )
    process.start()
    return process


def start_ranks(
    num_ranks: int, script: Path, *arguments: object, output: Path
) -> tuple[list[BaseProcess], dist.TCPStore]:
    """Starts a script as ranks of one machine, with what torchrun gives them.

    Returns:
        The ranks, and the store that they meet in, which must outlive them.
    """
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )  # fmt: skip
    shared = {
        "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0,
    }  # fmt: skip
    ranks = [
        start(script, *arguments, output=output, RANK=rank, LOCAL_RANK=rank, **shared)
        for rank in range(num_ranks)
    ]
    return ranks, store


def finish(processes: Sequence[BaseProcess], output: Path) -> subprocess.CompletedProcess[str]:
    """Waits as torchrun does: when one fails, the others get SIGTERM.

    Returns:
        The first failure's status, and what all of them printed.
    """
    status, deadline = 0, time.monotonic() + PATIENCE
    try:
        while running := [process for process in processes if process.exitcode is None]:
            assert time.monotonic() < deadline, "still running"
            wait([process.sentinel for process in running], timeout=1.0)
            failed = [process.exitcode for process in processes if process.exitcode]
            if failed and not status:
                status = failed[0]
                time.sleep(GRACE)
                for process in running:
                    process.terminate()
    finally:
        for process in processes:
            process.kill()
    status = status or next((p.exitcode for p in processes if p.exitcode), 0)
    texts = [Path(f"{output}.{name}").read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess([], status, *texts)


def run_script(script: Path, *arguments: object, output: Path, **variables: object):
    """Runs a script to its end; see `start` and `finish`."""
    return finish([start(script, *arguments, output=output, **variables)], output)


def run_ranks(num_ranks: int, script: Path, *arguments: object, output: Path):
    """Runs a script as ranks to their end; see `start_ranks` and `finish`."""
    ranks, _store = start_ranks(num_ranks, script, *arguments, output=output)
    return finish(ranks, output)
