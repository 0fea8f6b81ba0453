"""A small network's training as recordings: the trainer's parts, and what stands for CUDA's."""

from __future__ import annotations

import contextlib

import torch

from freeadv_fast import methods
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.distributed.world import World
from freeadv_fast.session.method import RankShuffle
from freeadv_fast.step.learner import Learner, Pixels
from freeadv_fast.step.optim import build_sgd

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
# What the host knows of an update; a recording would freeze it.
HOSTS_HALF = ("lr_at", "updates", "attack_scale_at")
HOSTS_HALF_OF_AVERAGE = ("updates", "decay")


@contextlib.contextmanager
def hidden(owner, names):
    """In here attributes are None, and may not be set."""
    values = {name: getattr(owner, name) for name in names}
    vars(owner).update(dict.fromkeys(names))
    yield
    assert all(getattr(owner, name) is None for name in names)
    vars(owner).update(values)


class Recorder:
    """Stands for CUDA's on a CPU: recording does nothing on the device, a launch does it all.

    What a graph would freeze, it forbids: a launch may not ask the host about the update.
    """

    def __init__(self, error=None):
        self.num_recordings = 0
        self.num_launches = 0
        self.num_beginnings = 0
        self.error = error
        self.learner = None

    def begin_anew(self):
        self.num_beginnings += 1

    def has_ended(self, seconds):
        return True

    @contextlib.contextmanager
    def warming_up(self):
        yield

    def record(self, step):
        if self.error is not None:
            raise self.error
        self.num_recordings += 1

        def launch():
            self.num_launches += 1
            if self.learner is None:
                return step()
            with contextlib.ExitStack() as stack:
                stack.enter_context(hidden(self.learner, HOSTS_HALF))
                if self.learner.average is not None:
                    stack.enter_context(hidden(self.learner.average, HOSTS_HALF_OF_AVERAGE))
                step()

        return launch


def build_learner(network, device="cpu", dtype=torch.float32):
    """A learner with a falling learning rate, an attack that warms up and torch's fused SGD."""
    network.to(device)
    optimizer = build_sgd(network, lr=0.05, momentum=0.9, weight_decay=5e-4, decay="all")
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, False
    pixels = Pixels(torch.tensor(MEAN, device=device), torch.tensor(STD, device=device), dtype)
    # Powers of two: a float32 on the device is the same number as a float on the host.
    return Learner(
        network,
        optimizer,
        lambda update: 2.0 ** -(4 + update // 8),
        pixels,
        attack_scale_at=lambda update: min(1.0, (update + 1) / 4),
    )


def build_method(name, learner, device="cpu", accumulate=1):
    """A method as the trainer builds it, with few steps and updates of six images.

    ``pgd-awp`` is pgd with a perturbation of the weights.
    """
    device = torch.device(device)
    config = TrainConfig(
        method=name.removesuffix("-awp"), awp=0.05 if name.endswith("-awp") else 0.0,
        m={"free": 3, "natural": 2, "free-trades": 2}.get(name, 1),
        batch_size=6 // accumulate, accumulate=accumulate, image_size=8,
        eps=Perturbation.parse("8/255"), attack_steps=2, aux_bn_group=3,
        **{"gradalign": {"reg_every": 1}, "fast-advprop": {"p_adv": 0.5}}.get(name, {}),
    )  # fmt: skip
    shuffle = RankShuffle(World(0, 1, device), seed=3)
    method = methods.build_method(config, learner, device, 5, shuffle)
    learner.method_state = method.state_dict
    return method


def minibatches(sizes, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        images = torch.randint(-60, 316, (size, 8, 8, 3), generator=generator)
        labels = torch.randint(0, 5, (size,), generator=generator)
        yield images.clamp(0, 255).to(torch.uint8).to(device), labels.to(device)
