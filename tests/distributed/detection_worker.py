"""Run by torchrun: a detector in fp64 on this rank's rows; the result goes to a file."""

import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from freeadv_fast.config.threat import Perturbation, ThreatModel
from freeadv_fast.distributed.world import join_world, leave_world
from freeadv_fast.methods.fast_advprop import FastAdvProp
from freeadv_fast.methods.free import Free
from freeadv_fast.methods.natural import Natural
from freeadv_fast.models.batch_norm import DualNetwork, add_auxiliary_bn, apply_bn_groups
from freeadv_fast.models.retinanet import build_detector
from freeadv_fast.step.detection import Detection
from freeadv_fast.step.learner import Learner, Pixels
from freeadv_fast.step.objects import Objects
from freeadv_fast.step.optim import build_sgd

ARCH, SIDE = "retinanet_resnet10_fpn_64", 64
NUM_CLEAN, NUM_ADV = 2, 2  # a rank
METHODS = ("natural", "free", "fast-advprop")
THREAT = ThreatModel(Perturbation.parse("4/255"), Perturbation.parse("4/255"))


def build_network():
    """The same weights everywhere; batch-norm groups of one rank's images."""
    torch.manual_seed(0)
    return apply_bn_groups(build_detector(ARCH, 3).double(), NUM_CLEAN)


def build(name, network, num_ranks, is_wrapped):
    """A method of one rank, or of as many ranks' images on one."""
    net = network
    if name == "fast-advprop":
        net = DualNetwork(add_auxiliary_bn(network, NUM_ADV)).train()
    if is_wrapped:
        net = DistributedDataParallel(net, broadcast_buffers=False)
    optimizer = build_sgd(network, lr=0.01, momentum=0.9, weight_decay=1e-4, decay="all")
    pixels = Pixels(torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3]), torch.float64)
    learner = Learner(
        net, optimizer, lambda update: 0.01, pixels, num_ranks=num_ranks, task=Detection(network)
    )
    shares = 1 if is_wrapped else 2
    if name == "natural":
        return Natural(learner)
    if name == "free":
        shape = (shares * NUM_CLEAN, SIDE, SIDE, 3)
        return Free(learner, THREAT, m=2, minibatch_shape=shape, device=torch.device("cpu"))
    return FastAdvProp(learner, THREAT, p_adv=0.5, uniform_start=False)


def minibatches(name):
    """Two of them, the images of both ranks; of Fast AdvProp all attacked ones come first."""
    generator = torch.Generator().manual_seed(7)
    size = 2 * NUM_CLEAN + (2 * NUM_ADV if name == "fast-advprop" else 0)
    for height in (SIDE, SIDE // 2):
        images = torch.randint(0, 256, (size, height, SIDE, 3), generator=generator)
        corners = torch.rand(size, 3, 2, 2, generator=generator) * torch.tensor([SIDE, height])
        low, high = corners.amin(2), corners.amax(2) + 4
        classes = torch.randint(-1, 3, (size, 3), generator=generator).sort(1, descending=True)
        sizes = torch.tensor([height, SIDE]).repeat(size, 1) - torch.arange(size)[:, None]
        boxes = torch.cat([low, high], dim=2)
        yield images.to(torch.uint8), Objects(sizes, boxes, classes.values).packed()


def rows_of(name, rank):
    """A rank's rows of a minibatch, its attacked ones first."""
    own = torch.arange(NUM_CLEAN) + rank * NUM_CLEAN
    if name != "fast-advprop":
        return own
    return torch.cat([torch.arange(NUM_ADV) + rank * NUM_ADV, own + 2 * NUM_ADV])


def main(output):
    """Trains with each method on this rank's rows."""
    torch.set_num_threads(1)
    world = join_world()
    states = {}
    for name in METHODS:
        network = build_network()
        method = build(name, network, world.size, is_wrapped=True)
        for images, targets in minibatches(name):
            rows = rows_of(name, world.rank)
            method.train_minibatch(images[rows], targets[rows], len(images))
        states[name] = {"network": network.state_dict(), "method": method.state_dict()}
    torch.save(states, Path(output) / f"rank{world.rank}.pt")
    leave_world()


if __name__ == "__main__":
    main(*sys.argv[1:])
