"""A run that is killed again and again ends as if nothing had happened; see bench/kills.py."""

import importlib.util
import random
import subprocess
import sys
import types
from pathlib import Path

import pytest

from forked import run_script

NUM_KILLS = 3


@pytest.fixture
def kills(repository, tmp_path, monkeypatch):
    """bench/kills.py as a module, its children forks."""

    def run(command, **options):
        if command[0] != sys.executable:
            return subprocess.run(command, **options)
        return run_script(Path(command[1]), *command[2:], output=tmp_path / "output")

    monkeypatch.syspath_prepend(repository / "bench")
    spec = importlib.util.spec_from_file_location("kills", repository / "bench" / "kills.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "subprocess", types.SimpleNamespace(run=run))
    # One epoch over the data, which the kills of seed 1 all find their moment in.
    module.FLAGS[module.FLAGS.index("--epochs") + 1] = "2"
    yield module
    sys.modules.pop("harness", None)


@pytest.mark.slow
def test_three_kills_lose_no_bit(kills, tmp_path):
    reference, run = tmp_path / "reference", tmp_path / "run"
    assert kills.start("free", 1, reference, None) == 0
    hit = kills.kill_and_resume("free", 1, run, random.Random(1), NUM_KILLS)
    assert len(hit) == NUM_KILLS
    assert kills.differences(run, reference) == []


def test_a_lost_bit_would_be_seen(kills):
    import torch

    state = {"model": {"weight": torch.zeros(3)}, "ranks": [{"seed": 1}]}
    other = {"model": {"weight": torch.tensor([0.0, 0.0, 1e-30])}, "ranks": [{"seed": 1}]}
    assert kills.equal(state, state)
    assert not kills.equal(state, other)
    assert kills.plain('{"loss": 1, "passes_per_second": 5}\n') == [{"loss": 1}]
