"""Whole runs with compressed gradients: killed, on other numbers of ranks, with an overflow."""

import importlib.util
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from forked import run_ranks
from freeadv_fast.cli import run_training

WORKER = Path(__file__).with_name("nonfinite_worker.py")
# A pass over the 1,417 digits that are not held out: 8 updates of 200 images for dat, 14 of 100 for
# fast-advprop.
FLAGS = [
    "--arch", "timm/test_efficientnet", "--batch-size", "50", "--epochs", "1", "--workers", "0",
    "--compress", "bucket", "--holdout-images", "20", "--eval-images", "20",
    "--eval-attacks", "pgd-1", "--log-every", "1", "--checkpoint-every", "0",
]  # fmt: skip
METHODS = {
    "dat": [
        "--optimizer", "lalr", "--lr", "0.01", "--warmup-epochs", "0.5", "--accumulate", "2",
        "--attack-steps", "1", "--guard-every", "0",
    ],
    "fast-advprop": ["--aux-bn-group", "4"],
}  # fmt: skip
# In the middle of the pass, on rank 1.
KILLS = {
    method: {"moment": "minibatch", "signal": "SIGKILL", "call": call, "delay": 0.0, "rank": 1}
    for method, call in (("dat", 4), ("fast-advprop", 7))
}
FINISHED, REFUSED = 0, 2


def flags(method, folder):
    return ["--method", method, *FLAGS, *METHODS[method], "--output-dir", str(folder)]


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def lines_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def kills():
    """bench/kills.py as a module: it knows how two finished runs are compared."""
    bench = Path(__file__).resolve().parents[2] / "bench"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(bench)
        spec = importlib.util.spec_from_file_location("kills", bench / "kills.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def run_two(kills, tmp_path):
    """Runs a command line on two ranks, which `kill` may end."""

    def run(arguments, kill=None):
        output = tmp_path / f"output{len(list(tmp_path.glob('output*')))}"
        return run_ranks(2, kills.CHILD, json.dumps(kill), *arguments, output=output)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_ends_as_if_nothing_had_happened(method, kills, run_two, tmp_path, capsys):
    """Weights, optimizer, log and bytes to the last bit; dat's killed run also ends on one rank."""
    straight, killed, alone = (tmp_path / name for name in ("straight", "killed", "alone"))
    done = run_two(flags(method, straight))
    assert done.returncode == FINISHED, done.stderr
    assert run_two(flags(method, killed), KILLS[method]).returncode == -signal.SIGKILL
    state = kills.load(killed / "checkpoints" / "last.pt")
    assert state["progress"]["epoch"] == 0
    assert 0 < state["progress"]["minibatch"] < 8
    shutil.copytree(killed, alone)
    done = run_two(["--resume", killed])
    assert done.returncode == FINISHED, done.stderr
    assert kills.differences(killed, straight) == []
    sent = result_of(killed)["gradients"]
    assert sent["codec"] == "bucket"
    assert 3.5 < sent["float32_bytes_an_update"] / sent["bytes_an_update"] < 4

    if method == "dat":
        assert run_training("free", "cifar", ["--resume", str(alone)]) == FINISHED
        said = capsys.readouterr().out
        assert "ranks: 1 (was 2)" in said
        assert "--compress bucket: nothing to do, one rank sends none" in said
        assert (result_of(alone)["gradients"], result_of(alone)["ranks"]) == (None, 1)
        assert [line["updates"] for line in lines_of(alone)] == list(range(1, 9))


@pytest.mark.slow
def test_a_run_of_one_rank_goes_on_with_two(run_two, tmp_path, capsys):
    """One update of eight alone; what a compressed update sends is over the seven others."""
    run = tmp_path / "run"
    arguments = [*flags("dat", run), "--batch-size", "100"]
    assert run_training("free", "cifar", [*arguments, "--max-passes", "400"]) == FINISHED
    assert "nothing to do, one rank sends none" in capsys.readouterr().out
    assert result_of(run)["gradients"] is None
    done = run_two(["--resume", run, "--max-passes", "None"])
    assert done.returncode == FINISHED, done.stderr
    assert "ranks: 2 (was 1)" in done.stdout
    assert "bucket codec, one byte an element" in done.stdout
    assert [line["updates"] for line in lines_of(run)][-7:] == list(range(2, 9))
    sent = result_of(run)["gradients"]
    assert 3.5 < sent["float32_bytes_an_update"] / sent["bytes_an_update"] < 4
    assert sent["bytes_sent"] == pytest.approx(7 * sent["bytes_an_update"], abs=7)


@pytest.mark.slow
@pytest.mark.parametrize(("codec", "precision"), [("bucket", "fp32"), ("paper", "fp16")])
def test_a_gradient_that_is_not_finite_on_one_rank_moves_none(codec, precision, tmp_path):
    """Both ranks skip that update, count it once, and go on with equal weights."""
    done = run_ranks(2, WORKER, codec, precision, tmp_path, output=tmp_path / "output")
    assert done.returncode == FINISHED, done.stderr
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    ours, theirs = (torch.stack(rank["weights"]) for rank in ranks)
    assert torch.equal(ours, theirs)
    assert ours.isfinite().all()
    moved = [not torch.equal(*pair) for pair in zip(ours, ours[1:], strict=False)]
    skipped = [line.get("skipped_updates", 0) for line in lines_of(tmp_path / "run")]
    assert [line["updates"] for line in lines_of(tmp_path / "run")] == list(range(1, 10))
    assert skipped == [int(not has_moved) for has_moved in moved]
    assert moved[6:] == [True, False, True]
    if precision == "fp32":
        assert skipped == [0, 0, 0, 0, 0, 0, 0, 1, 0]
    assert ranks[0]["scales"] == ranks[1]["scales"]
    for mine, other in zip(*(rank["optimizer"].values() for rank in ranks), strict=True):
        assert all(torch.equal(mine[key], other[key]) for key in mine)
        assert all(torch.as_tensor(value).isfinite().all() for value in mine.values())


# Each rank's own command line, as after a mistake in a job script.
UNALIKE = """
import os, sys
from freeadv_fast.cli import run_training
codec = ("bucket", "paper")[int(os.environ["RANK"])]
sys.exit(run_training("dat", "cifar", ["--compress", codec, *sys.argv[1:]]))
"""


def test_ranks_that_disagree_are_told_so_and_write_nothing(tmp_path):
    script, run = tmp_path / "unalike.py", tmp_path / "run"
    script.write_text(UNALIKE)
    done = run_ranks(2, script, "--output-dir", run, output=tmp_path / "output")
    assert done.returncode == REFUSED
    expected = "--compress: rank 1 has paper, rank 0 has bucket; start every node with the same"
    (line,) = done.stderr.splitlines()
    assert expected in line
    assert not run.exists()
