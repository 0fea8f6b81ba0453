"""DAT on two ranks against one, in fp64 over gloo."""

import importlib.util
from pathlib import Path

import torch

from forked import run_ranks
from freeadv_fast.models.batch_norm import apply_bn_groups

WORKER = Path(__file__).with_name("dat_worker.py")
RANK_BATCH = 4
KINDS = {"labelled": False, "kl": True}


def load_worker():
    """The worker's own builder, so that both sides build the same thing."""
    spec = importlib.util.spec_from_file_location("dat_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def minibatches(has_marks):
    """Fixed minibatches; every other image is unlabelled where they are marked."""
    generator = torch.Generator().manual_seed(5)
    for size in (8, 8, 8):
        images = torch.randint(-60, 316, (size, 8, 8, 3), generator=generator)
        labels = torch.randint(0, 5, (size,), generator=generator)
        if has_marks:
            labels[::2] = ~labels[::2]
        yield images.clamp(0, 255).to(torch.uint8), labels


def test_two_ranks_equal_one_rank_of_twice_the_batch(small_network, tmp_path):
    """Weights to 1e-9, statistics as their mean, and one all-reduce an update."""
    cases = {
        name: (has_marks, small_network(torch.float64), list(minibatches(has_marks)))
        for name, has_marks in KINDS.items()
    }
    fixture = tmp_path / "fixture.pt"
    torch.save(cases, fixture)
    done = run_ranks(2, WORKER, fixture, tmp_path, output=tmp_path / "output")
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    for name, (has_marks, network, batches) in cases.items():
        apply_bn_groups(network, RANK_BATCH)
        dat = load_worker().build_dat(network, 1, has_marks)
        for images, labels in batches:
            dat.train_minibatch(images, labels, len(images))
        states = [rank[name]["network"] for rank in ranks]
        assert [rank[name]["reductions"] for rank in ranks] == [3, 3]
        for key, parameter in network.named_parameters():
            for state in states:
                torch.testing.assert_close(state[key], parameter.detach(), rtol=0, atol=1e-9)
        for key, buffer in network.named_buffers():
            if buffer.is_floating_point():
                mean = (states[0][key] + states[1][key]) / 2
                torch.testing.assert_close(mean, buffer, rtol=0, atol=1e-9)
