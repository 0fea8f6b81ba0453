"""A rank that dies, is stopped or comes late is named by the others, whatever they wait in."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from freeadv_fast.distributed.heartbeat import Beat, Heartbeat, is_alive, process_space

WORKER = Path(__file__).with_name("faults_worker.py")


def run_ranks(kind, how, faulty_rank, output):
    """Both ranks' output, and what the other rank was told by the time that it ended."""
    launcher = Path(sys.executable).with_name("torchrun")
    command = [launcher, "--standalone", "--nproc-per-node", "2", WORKER, kind, how]
    log, told = output / "output.txt", output / f"rank{1 - faulty_rank}.txt"
    with log.open("w") as sink:
        process = subprocess.Popen(
            [*map(str, command), str(faulty_rank), str(output)], stdout=sink, stderr=sink,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while process.poll() is None and time.monotonic() < deadline:
            if "is lost" in log.read_text() or (told.exists() and how != "late"):
                break
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
        kill_processes_of(output)
    return log.read_text(), told.read_text() if told.exists() else ""


def kill_processes_of(output):
    """Ends the ranks, which torchrun gives sessions of their own; a stopped one obeys this only."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(output).encode() in (folder / "cmdline").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)


@pytest.mark.parametrize(
    ("kind", "faulty_rank"),
    [("gradients", 1), ("gradients", 0), ("stop", 1), ("writing", 0), ("shuffle", 1)],
)
def test_a_killed_rank_is_named(kind, faulty_rank, tmp_path):
    text, told = run_ranks(kind, "killed", faulty_rank, tmp_path)
    seconds, line = told.splitlines() if told else ("0", text)
    if kind == "shuffle" and "adversarial images" in line:
        return  # the exchange names who waited and at which step
    assert f"rank {faulty_rank} is lost (" in line, text
    assert "restart all ranks with --resume" in line
    assert float(seconds) < 10


@pytest.mark.parametrize(("kind", "faulty_rank"), [("gradients", 1), ("checkpoint", 0)])
def test_a_stopped_rank_is_named_and_the_others_end(kind, faulty_rank, tmp_path):
    text, told = run_ranks(kind, "stopped", faulty_rank, tmp_path)
    assert f"rank {faulty_rank} is lost (" in text + told


@pytest.mark.parametrize(("kind", "faulty_rank"), [("gradients", 1), ("minibatch", 0)])
def test_a_late_rank_is_named_and_waited_for(kind, faulty_rank, tmp_path):
    text, told = run_ranks(kind, "late", faulty_rank, tmp_path)
    assert f"rank {faulty_rank} is late: at step 3 while others have waited" in text
    assert text.count("is late") == 1
    assert told.splitlines()[1] == "nothing"


def test_a_process_of_another_container_is_not_looked_for_here():
    """Its id means nothing here, even where both containers have one host's name."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    watcher = object.__new__(Heartbeat)
    watcher._rank, watcher._host = 0, process_space()
    mine, other = (
        Beat(host, ended.pid, 1, 1, "step 1", False) for host in (process_space(), "boot pid:[9]")
    )
    assert "its process ended" in watcher._find_lost([mine, mine], {1: 0.0})
    assert watcher._find_lost([mine, other], {1: 0.0}) == ""


def test_beats_travel_as_text():
    beat = Beat("host", 12, 3, 4, "epoch 0, minibatch 2", True)
    assert Beat.decode(beat.encode()) == beat


def test_a_process_that_nobody_has_waited_for_is_not_alive():
    process = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 20
    while is_alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(process.pid)
    assert is_alive(os.getpid())
    process.wait()
    assert not is_alive(process.pid)
