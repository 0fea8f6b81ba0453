"""A rank that dies, is stopped or comes late is named by the others, whatever they wait in."""

import dataclasses
import os
import subprocess
import sys
import time
from math import inf
from pathlib import Path

import pytest

from forked import start_ranks
from freeadv_fast.distributed.heartbeat import Beat, Heartbeat, is_alive, process_space

WORKER = Path(__file__).with_name("faults_worker.py")
PATIENCE = 90.0


def run_faulty(kind, how, faulty_rank, output):
    """Both ranks' output, and what the other rank was told by the time that it ended."""
    ranks, _store = start_ranks(2, WORKER, kind, how, faulty_rank, output, output=output / "output")
    faulty, other = ranks[faulty_rank], ranks[1 - faulty_rank]
    try:
        if how == "killed":
            faulty.join(PATIENCE)
            other.terminate()  # as torchrun does
        other.join(PATIENCE)
        if how == "late":
            faulty.join(PATIENCE)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    told = output / f"rank{1 - faulty_rank}.txt"
    said = "".join(path.read_text() for path in output.glob("output.*"))
    return said, told.read_text() if told.exists() else ""


@pytest.mark.parametrize(
    ("kind", "faulty_rank"),
    [("gradients", 1), ("gradients", 0), ("stop", 1), ("writing", 0), ("shuffle", 1)],
)
def test_a_killed_rank_is_named(kind, faulty_rank, tmp_path):
    text, told = run_faulty(kind, "killed", faulty_rank, tmp_path)
    seconds, line = told.splitlines() if told else ("0", text)
    if kind == "shuffle" and "adversarial images" in line:
        return  # the exchange names who waited and at which step
    assert f"rank {faulty_rank} is lost (" in line, text
    assert "restart all ranks with --resume" in line
    assert float(seconds) < 10


@pytest.mark.parametrize(("kind", "faulty_rank"), [("gradients", 1), ("checkpoint", 0)])
def test_a_stopped_rank_is_named_and_the_others_end(kind, faulty_rank, tmp_path):
    text, told = run_faulty(kind, "stopped", faulty_rank, tmp_path)
    assert f"rank {faulty_rank} is lost (" in text + told


@pytest.mark.parametrize(
    ("kind", "faulty_rank"), [("gradients", 1), ("minibatch", 0), ("shuffle", 1)]
)
def test_a_late_rank_is_named_and_waited_for(kind, faulty_rank, tmp_path):
    text, told = run_faulty(kind, "late", faulty_rank, tmp_path)
    assert f"rank {faulty_rank} is late: at step 3 while others have waited" in text
    assert text.count("is late") == 1
    assert told.splitlines()[1] == "nothing"


def test_a_process_of_another_container_is_not_looked_for_here():
    """Its id means nothing here, even where both containers have one host's name."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    watcher = object.__new__(Heartbeat)
    watcher._rank, watcher._host, watcher._ended, watcher._read_at = 0, process_space(), {}, inf
    mine, other = (
        Beat(host, ended.pid, 1, 1, "step 1", False) for host in (process_space(), "boot pid:[9]")
    )
    assert "its process ended" in watcher._find_lost([mine, mine], {1: 0.0})
    assert watcher._find_lost([mine, other], {1: 0.0}) == ""


def test_a_rank_that_said_goodbye_and_ended_is_not_lost():
    """Its beat is a second old, its process is gone, and the goodbye is not read yet."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    watcher = object.__new__(Heartbeat)
    watcher._rank, watcher._host, watcher._ended = 0, process_space(), {}
    watcher._read_at = time.monotonic()
    beat = Beat(process_space(), ended.pid, 1, 1, "step 1", False)
    assert watcher._find_lost([beat, beat], {1: 0.0}) == ""
    watcher._read_at = time.monotonic()
    assert "its process ended" in watcher._find_lost([beat, beat], {1: 0.0})
    left = dataclasses.replace(beat, has_left=True)
    assert watcher._find_lost([beat, left], {1: 0.0}) == ""


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
