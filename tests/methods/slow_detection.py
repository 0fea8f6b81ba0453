"""Slow detection: torchvision's own padding and losses, on a list of images without padding."""

from __future__ import annotations

import torch
from torch.func import functional_call

import slow_advprop
import slow_steps as slow
from freeadv_fast.step.detection import Detection
from freeadv_fast.step.objects import Objects
from small_detector import as_torchvision_has_them


def torchvisions_loss_sum(detector, pixels, targets, parts, parameters=None):
    """Losses summed over images by torchvision's `batch_images` and `compute_loss`.

    `pixels` are padded grey levels, (n, H, W, 3), of which only the images themselves are read.
    """
    mean, std = (torch.tensor(values).double() for values in (slow.MEAN, slow.STD))
    images = [
        (((image[:height, :width].clamp(0, 255) / 255) - mean) / std).permute(2, 0, 1)
        for image, (height, width) in zip(pixels, Objects.of(targets).sizes.tolist(), strict=True)
    ]
    x = detector.transform.batch_images(images, size_divisible=pixels.shape[1])
    assert x.shape[2:] == pixels.shape[1:3]
    outputs = functional_call(detector, parameters or {}, x)
    heads = {"cls_logits": outputs.class_logits, "bbox_regression": outputs.box_deltas}
    targets = as_torchvision_has_them(targets)
    losses = detector.compute_loss(targets, heads, [outputs.anchors] * len(x))
    return sum(losses[part] for part in parts) * len(x)


SUM = ("classification", "bbox_regression")


class SlowDetector(slow.SlowTrainer):
    """A detector and SGD with momentum, written out."""

    def loss(self, images, delta, targets, parts=SUM):
        pixels = images.double() + delta
        return torchvisions_loss_sum(self.network, pixels, targets, parts) / len(images)


class SlowBranches(slow_advprop.SlowNetwork):
    """A detector's parameters, its batch norms' twice."""

    def loss_sum(self, pixels, targets, branch, groups):
        """Summed loss of (n, H, W, 3) grey levels, group by group."""
        chosen = {n: self.parameters.get(n, self.parameters.get(f"{branch}:{n}"))
                  for n, _ in self.network.named_parameters()}  # fmt: skip
        parts = zip(pixels.tensor_split(groups), targets.tensor_split(groups), strict=True)
        return sum(torchvisions_loss_sum(self.network, *part, SUM, chosen) for part in parts)


def build_learner(detector, net=None, dtype=torch.float64, **options):
    """A learner that detects; `net` stands around the detector."""
    learner = slow.build_learner(detector, dtype)
    learner.net, learner.task = net or detector, Detection(detector, **options)
    return learner
