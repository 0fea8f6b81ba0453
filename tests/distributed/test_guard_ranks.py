"""The guard on two ranks: one verdict, one rewind."""

from pathlib import Path

import pytest
import torch

from forked import run_ranks

WORKER = Path(__file__).with_name("guard_worker.py")


@pytest.mark.slow
def test_two_ranks_agree_on_a_collapse(small_images, tmp_path):
    """29 images in shares of 15 and 14; the same verdict, the same weights, each its own delta."""
    done = run_ranks(2, WORKER, small_images, tmp_path, output=tmp_path / "output")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("warning: catastrophic overfitting") == 1
    ours, theirs = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert ours["history"] == theirs["history"]
    (collapse,) = ours["history"]["collapses"]
    assert (collapse["action"], collapse["robust_accuracy_after"]) == ("restore", 0)
    assert {29, 30} == {count["images"] for count in ours["history"]["recent"]}
    assert ours["place"] == theirs["place"] == (3, 0, 36)
    for name, parameter in ours["parameters"].items():
        assert torch.equal(parameter, theirs["parameters"][name]), name
    assert not torch.equal(ours["delta"], theirs["delta"])
