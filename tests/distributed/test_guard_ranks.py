"""The guard on two ranks: one verdict, one rewind."""

import os
import subprocess
import sys
from pathlib import Path

import torch

WORKER = Path(__file__).with_name("guard_worker.py")


def test_two_ranks_agree_on_a_collapse(small_images, tmp_path):
    """29 images in shares of 15 and 14; the same verdict, the same weights, each its own delta."""
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("torchrun")), "--standalone",
            "--nproc-per-node", "2", str(WORKER), str(small_images), str(tmp_path),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
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
