"""Fast AdvProp on two ranks against one rank that is handed their permutation."""

import copy
import importlib.util
from pathlib import Path

import torch

from forked import run_ranks
from freeadv_fast.distributed.shuffle import global_permutation

WORKER = Path(__file__).with_name("fast_advprop_worker.py")
NUM_UPDATES = 3


def load_worker():
    spec = importlib.util.spec_from_file_location("fast_advprop_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Handed:
    """An exchange whose rows have arrived already."""

    def __init__(self, images, labels):
        self.rows = images, labels

    def wait(self):
        return self.rows


def minibatches(num_images):
    """Each rank's minibatches."""
    generator = torch.Generator().manual_seed(5)
    ranks = []
    for _ in range(2):
        images = torch.randint(-60, 316, (NUM_UPDATES, num_images, 8, 8, 3), generator=generator)
        labels = torch.randint(0, 5, (NUM_UPDATES, num_images), generator=generator)
        ranks.append(list(zip(images.clamp(0, 255).to(torch.uint8), labels, strict=True)))
    return ranks


def train_alone(network, worker, ranks):
    """One rank, twice the batch: both ranks' adversarial shares, then both clean ones."""
    num_adv = worker.NUM_ADV

    def handed(images, labels, update):
        counts = [num_adv, num_adv]
        rows = torch.from_numpy(global_permutation(counts, seed=worker.SEED, step=update))
        return Handed(images[rows], labels[rows])

    method = worker.build(network, 1, handed, is_wrapped=False)
    draw = method.threat.uniform_delta
    for update in range(NUM_UPDATES):
        parts = [rank[update] for rank in ranks]
        halves = (slice(0, num_adv), slice(num_adv, None))
        images, labels = (
            torch.cat([part[kind][half] for half in halves for part in parts]) for kind in (0, 1)
        )

        def noise(attacked, update=update):
            drawn = []
            for rank, share in enumerate(attacked.chunk(2)):
                torch.manual_seed(100 * update + rank)
                drawn.append(draw(share))
            return torch.cat(drawn)

        method.start = lambda attacked, noise=noise: (noise(attacked), 1.0)
        method.train_minibatch(images, labels, len(images))


def test_two_ranks_equal_one_rank_of_twice_the_batch(small_network, tmp_path):
    """Weights of both branches to 1e-9, the same on both ranks; statistics as their mean."""
    worker = load_worker()
    network = small_network(torch.float64)
    ranks = minibatches(worker.NUM_CLEAN + worker.NUM_ADV)
    fixture = tmp_path / "fixture.pt"
    torch.save({"network": network, "minibatches": ranks}, fixture)
    done = run_ranks(2, WORKER, fixture, tmp_path, output=tmp_path / "output")
    assert done.returncode == 0, done.stderr
    states = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]

    alone = copy.deepcopy(network)
    train_alone(alone, worker, ranks)
    for name, parameter in alone.named_parameters():
        for state in states:
            torch.testing.assert_close(
                state["network"][name], parameter.detach(), rtol=0, atol=1e-9, msg=name
            )
        assert torch.equal(states[0]["network"][name], states[1]["network"][name]), name
    for name, buffer in alone.named_buffers():
        if buffer.is_floating_point():
            mean = (states[0]["network"][name] + states[1]["network"][name]) / 2
            torch.testing.assert_close(mean, buffer, rtol=0, atol=1e-9, msg=name)
    for state in states:
        assert state["complaint"].startswith("--seed: rank 1 has 7, rank 0 has 3")
