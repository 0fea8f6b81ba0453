"""Updates in parts on two ranks against one rank that takes all their images at once."""

import importlib.util
from pathlib import Path

import pytest
import torch

from forked import run_ranks
from freeadv_fast.config.threat import ThreatModel
from freeadv_fast.models.batch_norm import apply_bn_groups
from freeadv_fast.step.warm_start import WarmStart

WORKER = Path(__file__).with_name("accumulate_worker.py")
# Twice two minibatches of 3 images; then 3 images, one part, on rank 0 and 4, two parts, on rank 1.
SIZES = [12, 7, 12]


@pytest.fixture(scope="module")
def worker():
    """The worker's own builder, so that both sides build the same thing."""
    spec = importlib.util.spec_from_file_location("accumulate_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _threat(monkeypatch):
    """The worker's builder replaces the random starts; they come back after the test."""
    monkeypatch.setattr(ThreatModel, "uniform_delta", ThreatModel.uniform_delta)


def minibatches():
    generator = torch.Generator().manual_seed(5)
    for size in SIZES:
        images = torch.randint(-60, 316, (size, 8, 8, 3), generator=generator)
        labels = torch.randint(0, 5, (size,), generator=generator)
        yield images.clamp(0, 255).to(torch.uint8), labels


def train_alone(worker, name, network, batches):
    """One rank takes all images in one pass, batch norm in groups of a minibatch.

    Where weights move by each part's own gradient, it takes them in the ranks' parts. Delta is laid
    out as the two ranks' rows end to end.
    """
    apply_bn_groups(network, worker.BATCH)
    method = worker.build(name, network, 1, 4)
    if name != "pgd-awp":
        method.learner.minibatch_size = None
    slots = torch.arange(4 * worker.BATCH)
    for images, labels in batches:
        counts = [len(images[worker.rows_of(rank, len(images))]) for rank in (0, 1)]
        rows = torch.cat([own[:n] for own, n in zip(slots.chunk(2), counts, strict=True)])
        if name == "free":
            whole, method.carried = method.carried, WarmStart(method.delta[rows])
        method.train_minibatch(images, labels, len(images))
        if name == "free":
            whole.delta[rows] = method.delta
            method.carried = whole
    return method


@pytest.mark.slow
def test_two_ranks_in_parts_equal_one_rank_with_all_images(worker, small_network, tmp_path):
    """Weights to 1e-9, delta exactly, and one reduction an update, however many passes it has."""
    batches = list(minibatches())
    fixture = tmp_path / "fixture.pt"
    torch.save({"network": small_network(torch.float64), "minibatches": batches}, fixture)
    done = run_ranks(2, WORKER, fixture, tmp_path, output=tmp_path / "output")
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name in worker.METHODS:
        network = small_network(torch.float64)
        method = train_alone(worker, name, network, batches)
        for state in (rank[name] for rank in ranks):
            assert state["updates"] == state["reductions"] == method.learner.updates
            for key, parameter in network.named_parameters():
                torch.testing.assert_close(
                    state["network"][key], parameter.detach(), rtol=0, atol=1e-9
                )
        if name == "free":
            delta = torch.cat([rank[name]["kept"]["delta"] for rank in ranks])
            assert torch.equal(delta, method.delta)
            assert delta.any()
