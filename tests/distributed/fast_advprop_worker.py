"""Run by torchrun: Fast AdvProp in fp64 on this rank's minibatches; the result goes to a file."""

import dataclasses
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from freeadv_fast.config.threat import Perturbation, ThreatModel
from freeadv_fast.distributed.world import join_world, leave_world
from freeadv_fast.errors import UserError
from freeadv_fast.methods.fast_advprop import FastAdvProp
from freeadv_fast.models.batch_norm import DualNetwork, add_auxiliary_bn, apply_bn_groups
from freeadv_fast.recipes.catalogue import RECIPES
from freeadv_fast.session.prepare import refuse_different_configs
from freeadv_fast.step.learner import Learner, Pixels
from freeadv_fast.step.optim import build_sgd

SEED, NUM_CLEAN, NUM_ADV = 11, 6, 3  # a rank


def build(network, num_ranks, shuffle, is_wrapped):
    """The method in fp64, batch-norm groups of one rank's shares."""
    apply_bn_groups(network, NUM_CLEAN)
    net = DualNetwork(add_auxiliary_bn(network, NUM_ADV)).train()
    if is_wrapped:
        net = DistributedDataParallel(net, broadcast_buffers=False)
    optimizer = build_sgd(network, lr=0.05, momentum=0.9, weight_decay=5e-4, decay="all")
    pixels = Pixels(torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3]), torch.float64)
    learner = Learner(net, optimizer, lambda update: 0.05, pixels, num_ranks=num_ranks)
    threat = ThreatModel(Perturbation.parse("8/255"), Perturbation.parse("8/255"))
    return FastAdvProp(learner, threat, p_adv=1 / 3, shuffle=shuffle)


def main(fixture, output):
    """Trains on this rank's minibatches; then the ranks disagree about the seed."""
    torch.set_num_threads(1)
    world = join_world()
    saved = torch.load(fixture, weights_only=False)

    def shuffle(images, labels, update):
        return world.shuffle(images, labels, seed=SEED, step=update)

    method = build(saved["network"], world.size, shuffle, is_wrapped=True)
    for update, (images, labels) in enumerate(saved["minibatches"][world.rank]):
        torch.manual_seed(100 * update + world.rank)
        method.train_minibatch(images, labels, world.size * len(images))
    config = dataclasses.replace(RECIPES["digits-fast-advprop"], seed=3 + 4 * world.rank)
    try:
        refuse_different_configs(config, world)
        complaint = ""
    except UserError as error:
        complaint = str(error)
    state = {"network": saved["network"].state_dict(), "complaint": complaint}
    torch.save(state, Path(output) / f"rank{world.rank}.pt")
    leave_world()


if __name__ == "__main__":
    main(*sys.argv[1:])
