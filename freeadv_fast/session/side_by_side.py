"""Commands side by side, each in a process of its own on a GPU of its own."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from freeadv_fast.session.signals import Interrupted, StopRequests

SECONDS_BETWEEN_LOOKS = 0.2


@dataclasses.dataclass(frozen=True)
class Job:
    """A command, and the file that takes what it prints."""

    command: list[str]
    log: Path


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if not torch.cuda.is_available():
        return []
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",") if names else [str(n) for n in range(torch.cuda.device_count())]


def run_side_by_side(jobs: Sequence[Job], gpus: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Runs one job a GPU until all are done.

    Args:
        jobs: Begun in their order.
        gpus: As CUDA_VISIBLE_DEVICES names them.

    Yields:
        The index of a job that has ended, and its exit status.

    Raises:
        Interrupted: a signal came; every job was sent SIGTERM and has ended.
    """
    waiting, free = list(enumerate(jobs)), list(gpus)
    running: dict[int, tuple[subprocess.Popen[bytes], str]] = {}
    with StopRequests() as stop:
        try:
            while waiting or running:
                while waiting and free and not stop.received:
                    (index, job), gpu = waiting.pop(0), free.pop(0)
                    running[index] = start(job, gpu), gpu
                if stop.received:
                    waiting = []
                    for process, _ in running.values():
                        process.terminate()  # asks once more what has been asked already: no harm
                time.sleep(SECONDS_BETWEEN_LOOKS)
                for index in [
                    i for i, (process, _) in running.items() if process.poll() is not None
                ]:
                    process, gpu = running.pop(index)
                    free.append(gpu)
                    yield index, process.returncode
        finally:
            for process, _ in running.values():
                process.terminate()
    if stop.received:
        raise Interrupted(stop.received)


def start(job: Job, gpu: str) -> subprocess.Popen[bytes]:
    """Starts a job that sees one GPU; what it prints is added to its log."""
    with job.log.open("ab") as log:
        return subprocess.Popen(
            job.command,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
