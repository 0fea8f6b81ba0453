"""Finding objects as a task: RetinaNet's losses of a detector's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from freeadv_fast import ops
from freeadv_fast.config.choices import AttackLoss
from freeadv_fast.models.retinanet import Detector, HeadOutputs
from freeadv_fast.step.detection_loss import BoxLoss, box_losses, class_losses, match
from freeadv_fast.step.objects import Objects

Part = Literal["classification", "box"]
PARTS: tuple[Part, ...] = ("classification", "box")


class Detection:
    """The objects of an image, by RetinaNet's loss: classes at all anchors, boxes at matched ones.

    An image's loss is torchvision's, both parts over the number of its matched anchors.

    Args:
        detector: Whose box loss it is.
        attack_loss: What attacks ascend that train nothing: the sum, a part, or of each image the
            stronger part. An attack whose pass trains weights as well has the sum.
    """

    has_hits = False

    def __init__(self, detector: Detector, attack_loss: AttackLoss = "sum") -> None:
        """Notes what the losses are."""
        self.box_loss: BoxLoss = detector.head.regression_head._loss_type
        self.attack_loss = attack_loss

    def seen(self, x: Tensor, targets: Tensor) -> Tensor:
        """The images; padding is 0 after normalisation, as in torchvision's `batch_images`.

        Args:
            x: (n, 3, H, W) network input. targets: (n, 1 + K, 5), see `step.objects`.
        """
        # Not `masked_fill`, whose result and gradient are not channels_last.
        return torch.where(Objects.of(targets).is_image(*x.shape[2:]), x, 0.0)

    def loss_sum(self, outputs: HeadOutputs, targets: Tensor, sums: Tensor) -> Tensor:
        """Class and box loss, summed over the images of a pass; no image is a hit.

        Args:
            outputs: Of n images. targets: (n, 1 + K, 5), see `step.objects`.
            sums: (4,) float64, updated, see `ops.count_pass_`.
        """
        loss_sum = torch.stack(self.parts(outputs, targets)).sum()
        ops.count_pass_(sums, loss_sum.detach(), torch.zeros_like(sums[1]), len(targets))
        return loss_sum

    def attack_losses(
        self, outputs: HeadOutputs, targets: Tensor, *, smoothed: bool
    ) -> tuple[Tensor, ...]:
        """What attacks ascend, summed over the images of a pass; no label is smoothed."""
        if self.attack_loss == "stronger":
            return tuple(self.parts(outputs, targets))
        which = PARTS if self.attack_loss == "sum" else (self.attack_loss,)
        return (torch.stack(self.parts(outputs, targets, which)).sum(),)

    def parts(
        self, outputs: HeadOutputs, targets: Tensor, which: Sequence[Part] = PARTS
    ) -> list[Tensor]:
        """Parts of the loss, each summed over the images: (), in the outputs' dtype.

        Args:
            outputs: Of n images. targets: (n, 1 + K, 5), see `step.objects`.
            which: Of the parts, in their order.
        """
        objects, anchors = Objects.of(targets), outputs.anchors
        matches = match(objects, anchors)
        losses = []
        if "classification" in which:
            losses.append(class_losses(outputs.class_logits, matches, objects.classes))
        if "box" in which:
            boxes = objects.boxes
            losses.append(box_losses(outputs.box_deltas, anchors, matches, boxes, self.box_loss))
        return [loss.sum() for loss in losses]
