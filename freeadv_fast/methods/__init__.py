"""The algorithms, one a file, each readable beside its paper.

A method trains on one minibatch at a time. It knows neither where images come from nor where
results go: it sees tensors and a `Learner`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from freeadv_fast.config import TrainConfig
from freeadv_fast.learner import Learner
from freeadv_fast.methods.free import Free
from freeadv_fast.methods.natural import Natural


class TrainingMethod(Protocol):
    """What the trainer asks of an algorithm."""

    is_adversarial: bool
    """Whether the network trains on perturbed images, so that its training accuracy is one."""

    def train_minibatch(self, images: Tensor, labels: Tensor, global_size: int) -> None:
        """Trains on one minibatch: images (n, H, W, 3) uint8, labels (n,) int64.

        `global_size` counts the minibatch's images over all ranks.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What outlives a minibatch, such as the perturbation; saved per rank."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved state."""
        ...


def build_method(config: TrainConfig, learner: Learner, device: torch.device) -> TrainingMethod:
    """The algorithm that a config names, bound to a learner."""
    if config.method == "natural":
        return Natural(learner, m=config.m)
    shape = (config.batch_size, config.image_size, config.image_size, 3)
    return Free(learner, config.threat, m=config.m, minibatch_shape=shape, device=device)
