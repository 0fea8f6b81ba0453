"""Run by torchrun: four free minibatches in fp64 on this rank's half; the result goes to a file."""

import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from freeadv_fast.config.threat import Perturbation, ThreatModel
from freeadv_fast.distributed.world import join_world, leave_world
from freeadv_fast.methods.free import Free
from freeadv_fast.step.learner import Learner, Pixels
from freeadv_fast.step.optim import build_sgd

M = 2


def build_free(network, num_ranks, slots, net=None):
    """Free training in fp64; `net` is the network behind data parallelism."""
    optimizer = build_sgd(network, lr=0.05, momentum=0.9, weight_decay=5e-4, decay="all")
    pixels = Pixels(torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3]), torch.float64)
    learner = Learner(net or network, optimizer, lambda update: 0.05, pixels, num_ranks=num_ranks)
    threat = ThreatModel(Perturbation.parse("8/255"), Perturbation.parse("8/255"))
    shape = (slots, 8, 8, 3)
    return Free(learner, threat, m=M, minibatch_shape=shape, device=torch.device("cpu"))


def main(fixture, output):
    """Trains on rows r*n/2..(r+1)*n/2 of every fixed minibatch."""
    torch.set_num_threads(1)
    world = join_world()
    saved = torch.load(fixture, weights_only=False)
    network = saved["network"]
    net = DistributedDataParallel(network, broadcast_buffers=False) if world.size > 1 else None
    free = build_free(network, world.size, saved["rank_batch"], net)
    for images, labels in saved["minibatches"]:
        share = len(images) // world.size
        rows = slice(world.rank * share, (world.rank + 1) * share)
        free.train_minibatch(images[rows], labels[rows], len(images))
    state = {"network": network.state_dict(), "delta": free.delta}
    torch.save(state, Path(output) / f"rank{world.rank}.pt")
    leave_world()


if __name__ == "__main__":
    main(*sys.argv[1:])
