"""Detectors on two ranks against one, in fp64 over gloo."""

import importlib.util
from pathlib import Path

import pytest
import torch

from forked import run_ranks

WORKER = Path(__file__).with_name("detection_worker.py")


@pytest.fixture(scope="module")
def worker():
    """The worker's own builders, so that both sides build the same thing."""
    spec = importlib.util.spec_from_file_location("detection_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_two_ranks_equal_one_rank_of_twice_the_batch(worker, tmp_path):
    """Weights to 1e-9, the perturbation exactly; minibatches of two shapes, padding in each."""
    done = run_ranks(2, WORKER, tmp_path, output=tmp_path / "output")
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    for name in worker.METHODS:
        network = worker.build_network()
        method = worker.build(name, network, 1, is_wrapped=False)
        for images, targets in worker.minibatches(name):
            method.train_minibatch(images, targets, len(images))
        for key, value in network.named_parameters():
            for state in ranks:
                torch.testing.assert_close(
                    state[name]["network"][key], value.detach(), rtol=0, atol=1e-9, msg=key
                )
        if name == "free":
            deltas = [state[name]["method"]["delta"] for state in ranks]
            assert torch.equal(torch.cat(deltas), method.delta)
            assert method.delta.any()
