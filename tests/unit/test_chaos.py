"""The yardsticks for chaotic runs find planted bugs, and nothing where there is none."""

from __future__ import annotations

import functools

import chaos
import pytest
import torch
from torch import nn

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.threat import Perturbation

NUM_RUNS = 8
CONFIG = TrainConfig(
    arch="mine", m=2, image_size=8, batch_size=16, bn_group=None, lr=0.1, epochs=400,
    eps=Perturbation.parse("16/255"), normalization="none", precision="fp32", fuse="off",
)  # fmt: skip


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def minibatches(seed, number=6):
    """Real digits of 8x8 pixels."""
    found = pytest.importorskip("sklearn.datasets").load_digits()
    grey = torch.from_numpy(found.images * (255 / 16)).round().to(torch.uint8)
    images, labels = grey[..., None].repeat(1, 1, 1, 3), torch.from_numpy(found.target).long()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        rows = torch.randint(len(images), (16,), generator=generator)
        yield images[rows], labels[rows]


def momentum_is_dropped(learner, method):
    learner.optimizer.param_groups[0]["momentum"] = 0.0


def eps_is_another(learner, method):
    method.eps *= 2


def delta_is_not_carried_over(learner, method):
    train = method.train_minibatch

    def train_from_zero(*minibatch):
        method.delta.zero_()
        return train(*minibatch)

    method.train_minibatch = train_from_zero


BUGS = [momentum_is_dropped, eps_is_another, delta_is_not_carried_over]


@functools.cache
def yardstick():
    """Eager runs from nudged weights, and the exact one."""
    start = network(0)
    eager = [chaos.train(CONFIG, chaos.nudged(start, seed), minibatches(0)) for seed in range(3)]
    return eager, chaos.train(CONFIG, start, minibatches(0), is_exact=True)


@pytest.mark.parametrize("bug", [None, *BUGS])
def test_weights_after_a_few_updates_tell_bugs_from_roundings(bug):
    found = chaos.excess(chaos.train(CONFIG, network(0), minibatches(0), spoil=bug), *yardstick())
    assert found < 1.5 if bug is None else found > 100


def losses(bug=None, nudge=None):
    """Of a few runs from their own weights on their own images."""
    size = chaos.NUDGES["fp32"]
    starts = [network(seed) for seed in range(NUM_RUNS)]
    if nudge is not None:
        starts = [chaos.nudged(start, nudge, size) for start in starts]
    return [
        chaos.train(CONFIG, start, minibatches(seed), spoil=bug).loss
        for seed, start in enumerate(starts)
    ]


eager_losses, nudged_losses = functools.cache(losses), functools.cache(lambda: losses(nudge=0))


@pytest.mark.parametrize("bug", [None, momentum_is_dropped, delta_is_not_carried_over])
def test_losses_of_many_short_runs_tell_bugs_from_chance(bug):
    found = chaos.bias(losses(bug, 1 if bug is None else None), eager_losses(), nudged_losses())
    assert found < 4 if bug is None else found > 8
