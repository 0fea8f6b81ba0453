"""What a network is trained to do: all that an update knows of it.

Methods ask a learner for losses and gradients; what these are of, labels or boxes, is the task's.
Targets are one tensor with a row an image: (n,) int64 labels of a classifier, `step.objects` of a
detector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from freeadv_fast import ops
from freeadv_fast.step.mixing import Labels, MixedLabels, cross_entropy_sum, num_hits


class Task(Protocol):
    """What an update asks of a task.

    Attributes:
        has_hits: Whether an image is right or wrong, so that training has an accuracy.
    """

    has_hits: bool

    def seen(self, x: Tensor, targets: Any) -> Tensor:
        """What the network sees of its input (n, 3, H, W); the rest has no gradient."""
        ...

    def loss_sum(self, outputs: Any, targets: Any, sums: Tensor) -> Tensor:
        """The loss that trains weights, summed over the images of a pass.

        Args:
            outputs: The network's. targets: A row an image.
            sums: A role's row of the meters, into which the pass is counted.
        """
        ...

    def attack_losses(self, outputs: Any, targets: Any, *, smoothed: bool) -> tuple[Tensor, ...]:
        """What attacks ascend, summed over the images of a pass and counted nowhere.

        Args:
            outputs: The network's. targets: A row an image.
            smoothed: Whether it is the loss that trains weights, with smoothed labels.

        Returns:
            A loss; or several, of which each image's attack takes the strongest.
        """
        ...


class Classification:
    """One label an image, by cross-entropy.

    Attributes:
        label_smoothing: Share of a label that is spread over all classes, in [0, 1), in the losses
            that train weights.
    """

    has_hits = True

    def __init__(self, label_smoothing: float = 0.0) -> None:
        """Keeps the share."""
        self.label_smoothing = label_smoothing

    def seen(self, x: Tensor, targets: Labels) -> Tensor:
        """All of it."""
        return x

    def loss_sum(self, outputs: Tensor, targets: Labels, sums: Tensor) -> Tensor:
        """Cross-entropy of (n, classes) logits, and of (n,) int64 labels or mixed ones."""
        if not isinstance(targets, MixedLabels):
            return ops.cross_entropy_sum_(outputs, targets, sums, self.label_smoothing)
        loss_sum = cross_entropy_sum(outputs, targets, self.label_smoothing)
        hits = num_hits(outputs.detach(), targets)
        ops.count_pass_(sums, loss_sum.detach(), hits, len(outputs))
        return loss_sum

    def attack_losses(
        self, outputs: Tensor, targets: Tensor, *, smoothed: bool
    ) -> tuple[Tensor, ...]:
        """Cross-entropy, of smoothed labels where they are and it is asked for."""
        share = self.label_smoothing if smoothed else 0.0
        return (F.cross_entropy(outputs, targets, reduction="sum", label_smoothing=share),)


def steepest(gradients: Sequence[Tensor], std: Tensor) -> Tensor:
    """Of each image the gradient along whose sign the sum of all losses rises fastest.

    To first order, which spares the passes in which Det-AdvProp compares what the attacks lead to
    (Chen et al., CVPR 2021).

    Args:
        gradients: (n, 3, H, W) of each loss at the network's input.
        std: (3,) that pixels were divided by: a step in pixels is so much longer there.

    Returns:
        (n, 3, H, W).
    """
    stacked = torch.stack(list(gradients))
    slope = stacked.sum(dim=0) / std.view(-1, 1, 1)
    rises = (slope * stacked.sign()).flatten(2).sum(dim=2)
    return stacked[rises.argmax(dim=0), torch.arange(len(slope), device=slope.device)]
