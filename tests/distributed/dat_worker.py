"""Run by torchrun: DAT minibatches in fp64 on this rank's rows; the result goes to a file."""

import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from freeadv_fast.config.threat import Perturbation, ThreatModel
from freeadv_fast.distributed.world import join_world, leave_world
from freeadv_fast.methods.dat import Dat
from freeadv_fast.step.learner import Learner, Pixels
from freeadv_fast.step.optim import build_sgd


class FixedStart(ThreatModel):
    """Starts that hang on the image alone, whichever rank has it."""

    def uniform_delta(self, images):
        return (images.float() * 7 % 17 - 8).add(images).clamp(0, 255).sub(images)


class FixedDat(Dat):
    """The same starts for unlabelled images, too."""

    def start(self, images, marked):
        return self.threat.uniform_delta(images)


def build_dat(network, num_ranks, has_marks, net=None):
    """DAT with attacks in training mode; `net` is the network behind data parallelism."""
    optimizer = build_sgd(network, lr=0.05, momentum=0.9, weight_decay=5e-4, decay="all")
    pixels = Pixels(torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3]), torch.float64)
    learner = Learner(net or network, optimizer, lambda update: 0.05, pixels, num_ranks=num_ranks)
    threat = FixedStart(Perturbation.parse("8/255"), Perturbation.parse("3/255"))
    return FixedDat(
        learner, threat, attack_steps=3, mode="train", clean_weight=0.3, has_marks=has_marks
    )


def main(fixture, output):
    """Trains on rows r*n/2..(r+1)*n/2 of every fixed minibatch; counts the all-reduces."""
    torch.set_num_threads(1)
    world = join_world()
    saved = torch.load(fixture, weights_only=False)
    state = {}
    for name, (has_marks, network, minibatches) in saved.items():
        net = DistributedDataParallel(network, broadcast_buffers=False)
        reductions = []

        def count_and_reduce(_, bucket, reductions=reductions):
            reductions.append(bucket.index())
            work = torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True)
            return work.get_future().then(lambda done: done.value()[0])

        net.register_comm_hook(None, count_and_reduce)
        dat = build_dat(network, world.size, has_marks, net)
        for images, labels in minibatches:
            share = len(images) // world.size
            rows = slice(world.rank * share, (world.rank + 1) * share)
            dat.train_minibatch(images[rows], labels[rows], len(images))
        state[name] = {"network": network.state_dict(), "reductions": reductions.count(0)}
    torch.save(state, Path(output) / f"rank{world.rank}.pt")
    leave_world()


if __name__ == "__main__":
    main(*sys.argv[1:])
