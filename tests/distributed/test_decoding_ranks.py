"""Two ranks decide alike where to decode: for the fastest training and the slowest threads."""

from pathlib import Path

import pytest
import torch

from forked import run_ranks

WORKER = Path(__file__).with_name("decoding_worker.py")


def test_two_ranks_decide_alike(small_images, tmp_path):
    pytest.importorskip("nvidia.dali")
    done = run_ranks(2, WORKER, small_images, tmp_path, output=tmp_path / "output")
    assert done.returncode == 0, done.stderr
    ours, theirs = (torch.load(tmp_path / f"decoding{r}.pt", weights_only=True) for r in (0, 1))
    assert ours == theirs
    choice = ours["choices"][0]
    assert (choice["place"], choice["asked"], choice["ranks"]) == ("GPU", 1_000_000, 2)
    assert choice["decoded"] < 1_000_000  # rank 1's, not rank 0's
    assert ours["moves_at"] == (choice["epoch"], choice["minibatch"])
