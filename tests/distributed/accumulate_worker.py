"""Run by torchrun: fp64 updates in two minibatches on this rank's part; the results go to files."""

import sys
from pathlib import Path

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.threat import Perturbation, ThreatModel
from freeadv_fast.distributed.world import join_world, leave_world
from freeadv_fast.methods.build import build_method
from freeadv_fast.step.learner import Learner, Pixels
from freeadv_fast.step.optim import build_sgd

# Several backward passes an update; replays and a delta; attacks through the network's inner tree;
# passes that leave no gradient.
METHODS = ("yopo", "free", "pgd", "pgd-awp")
BATCH = 3


def build(name, network, num_ranks, accumulate, net=None):
    """A method in fp64 that starts at the image; `net` is the network behind data parallelism."""
    ThreatModel.uniform_delta = lambda threat, images: torch.zeros(images.shape)
    optimizer = build_sgd(network, lr=0.05, momentum=0.9, weight_decay=5e-4, decay="all")
    pixels = Pixels(torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3]), torch.float64)
    learner = Learner(net or network, optimizer, lambda update: 0.05, pixels, num_ranks=num_ranks)
    config = TrainConfig(
        method=name.removesuffix("-awp"), awp=0.1 * name.endswith("-awp"),
        m=2 if name == "free" else 1, attack_steps=2, image_size=8,
        batch_size=BATCH, accumulate=accumulate, eps=Perturbation.parse("8/255"),
    )  # fmt: skip
    return build_method(config, learner, torch.device("cpu"), num_classes=5)


def rows_of(rank, num_images):
    """Half of the images: the smaller one for rank 0, which then has fewer parts."""
    middle = num_images // 2
    return slice(0, middle) if rank == 0 else slice(middle, num_images)


def main(fixture, output):
    """Trains every method on this rank's rows of each minibatch, and counts reductions."""
    torch.set_num_threads(1)
    world = join_world()
    state = {}
    for name in METHODS:
        saved = torch.load(fixture, weights_only=False)
        net, reductions = DistributedDataParallel(saved["network"], broadcast_buffers=False), []

        def counting_hook(group, bucket, reductions=reductions):
            reductions.append(bucket.is_last())
            return allreduce_hook(group, bucket)

        net.register_comm_hook(None, counting_hook)
        method = build(name, saved["network"], world.size, 2, net)
        for images, labels in saved["minibatches"]:
            rows = rows_of(world.rank, len(images))
            method.train_minibatch(images[rows], labels[rows], len(images))
        state[name] = {
            "network": saved["network"].state_dict(),
            "kept": method.state_dict(),
            "updates": method.learner.updates,
            "reductions": sum(reductions),
        }
    torch.save(state, Path(output) / f"rank{world.rank}.pt")
    leave_world()


if __name__ == "__main__":
    main(*sys.argv[1:])
