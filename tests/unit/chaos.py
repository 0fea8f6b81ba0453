"""Training runs that should end alike, judged although free training is chaotic.

A sign turns a rounded gradient into a whole step of the perturbation, so that differences of one
rounding grow with every replay: of two eager float32 runs on digits whose weights differed by 1e-6
one had a loss of .796 after 40 minibatches, the other one .660 (H200). Their curves need not agree.
What can be asked of a run is that it ends no further from the exact one, in float64, than eager
runs from nudged weights do; and that the losses of many short runs are neither higher nor lower.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from freeadv_fast.config.budget import Budget
from freeadv_fast.distributed.world import World
from freeadv_fast.methods.build import build_method
from freeadv_fast.session.network import build_learner

# Relative, of each weight. A few roundings of float32, for weights after a few updates; and what is
# beyond all that roundings of a precision come to, for losses after more of them.
ROUNDINGS = 1e-6
NUDGES = {"fp32": 1e-4, "fp16": 2**-11, "bf16": 2**-8}


class Run(NamedTuple):
    """How a run ended: its weights and running statistics, flat in float64; its last loss."""

    weights: Tensor
    loss: float


def train(config, network, minibatches, device="cpu", *, is_exact=False, spoil=None):
    """Trains a copy of a network.

    Args:
        config: The run. network: As it starts.
        minibatches: (images, labels) of each.
        device: Where; an exact run is a CPU's.
        is_exact: Whether to compute in float64, eagerly.
        spoil: Plants a bug into the learner and the method.
    """
    world, network = (
        World(0, 1, torch.device("cpu" if is_exact else device)),
        copy.deepcopy(network),
    )
    if is_exact:
        network.double()
        config = dataclasses.replace(config, precision="fp32", fuse="off", graphs="off")
    learner = build_learner(network, config, world, Budget.of(config, [1000]))
    if is_exact:
        learner.pixels = dataclasses.replace(learner.pixels, dtype=torch.float64)
    method = build_method(config, learner, world.device, 10)
    if spoil is not None:
        spoil(learner, method)
    loss = 0.0
    for images, labels in minibatches:
        method.train_minibatch(images.to(world.device), labels.to(world.device), len(images))
        loss = learner.meters.read(world).loss
    tensors = [t for t in network.state_dict().values() if t.is_floating_point()]
    return Run(torch.cat([t.detach().double().flatten().cpu() for t in tensors]), loss)


def nudged(network, seed, size=ROUNDINGS):
    """A copy whose weights are others by a little."""
    twin, generator = copy.deepcopy(network), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.mul_(1 + size * torch.randn(weight.shape, generator=generator))
    return twin


def excess(run, eager, exact):
    """How far a run ended from the exact one, where the furthest of eager ones ended at 1.

    Args:
        run: On trial. eager: Eager runs from nudged weights. exact: In float64, on a CPU.
    """
    furthest = max((other.weights - exact.weights).norm() for other in eager)
    return float((run.weights - exact.weights).norm() / furthest)


def bias(losses, eager, nudged):
    """How far losses lie on one side of eager ones, in standard errors of a mean without bias.

    Args:
        losses: Of runs on trial. eager: Of eager runs from the same weights on the same images.
        nudged: Of eager runs from nudged weights, whose differences are what chance does.
    """
    off, chance = (torch.tensor(other) - torch.tensor(eager) for other in (losses, nudged))
    return float(off.mean().abs() / (chance.square().mean() / len(off)).sqrt())
