"""What ends early outside of us: a reader such as `head`, ranks that nobody started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from freeadv_fast.cli.run import guard
from freeadv_fast.distributed.world import join_world
from freeadv_fast.errors import UserError


@pytest.mark.parametrize(
    "command", [["launch/evaluate.py", "--help"], ["-m", "freeadv_fast.recipes"]]
)
def test_a_reader_that_leaves_ends_a_script_without_a_word(repository, command):
    """`| head` has closed the pipe by the time that the first line arrives."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, *command], cwd=repository, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_another_broken_pipe_is_no_reader_that_left(tmp_path, monkeypatch):
    """Such as that of a worker which died."""

    def work():
        raise BrokenPipeError

    with (tmp_path / "out").open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(BrokenPipeError):
            guard(work)


@pytest.fixture
def half_a_world(monkeypatch):
    """WORLD_SIZE as a cluster's job or an earlier shell leaves it."""
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_ranks_that_nobody_started_get_one_line(half_a_world, monkeypatch):
    with pytest.raises(UserError) as caught:
        join_world()
    assert str(caught.value) == (
        "WORLD_SIZE 4: set, but not RANK, MASTER_ADDR, MASTER_PORT; start the ranks with torchrun "
        "--nproc-per-node N, or unset WORLD_SIZE for one"
    )
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join_world().size == 1
