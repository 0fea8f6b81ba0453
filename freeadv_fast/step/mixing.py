"""Mixup and CutMix: pairs of images with pairs of labels.

Both act on the network's input on the device. Normalisation is linear, so mixing normalised images
is mixing pixels; CutMix pastes. One partner and one share for the whole minibatch, as in both
papers' code. The share is drawn on the host from torch's CPU generator, the partners on the
device, so that a checkpoint of the generators continues them.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from freeadv_fast.config.choices import Mix

# ImageNet's values: Zhang et al. 2018 (section 3.1, 0.2 to 0.4), Yun et al. 2019 (section 4.1, 1).
DEFAULT_ALPHA: dict[Mix, float] = {"mixup": 0.2, "cutmix": 1.0}


class MixedLabels(NamedTuple):
    """Labels of images that each hold two.

    Attributes:
        own: (n,) int64, with weight `share`.
        other: (n,) int64, with weight 1 - `share`.
        share: Of the own image, in 0..1.
    """

    own: Tensor
    other: Tensor
    share: float


Labels: TypeAlias = Tensor | MixedLabels


def mix(x: Tensor, labels: Tensor, kind: Mix, alpha: float | None = None) -> tuple[Tensor, Labels]:
    """Mixes each image with another one of the minibatch.

    Args:
        x: (n, 3, H, W) network input without a perturbation.
        labels: (n,) int64.
        kind: ``mixup`` blends, ``cutmix`` pastes a rectangle, ``none`` returns what came.
        alpha: Both parameters of the Beta distribution of the share; the paper's by default.

    Returns:
        A new tensor like `x`, and its labels.

    Source: Zhang et al. 2018, "mixup"; Yun et al. 2019, "CutMix", Algorithm A1: the rectangle's
    centre is uniform, it is cut at the borders, and the share is what is left of the own image.
    """
    if kind == "none":
        return x, labels
    alpha = alpha or DEFAULT_ALPHA[kind]
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    partners = torch.randperm(len(x), device=x.device)
    if kind == "mixup":
        return torch.lerp(x[partners], x, share), MixedLabels(labels, labels[partners], share)
    height, width = x.shape[2:]
    rows, columns = _rectangle(height, width, 1 - share)
    x = x.clone(memory_format=torch.preserve_format)
    x[:, :, rows, columns] = x[partners][:, :, rows, columns]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return x, MixedLabels(labels, labels[partners], 1 - area / (height * width))


def _rectangle(height: int, width: int, area: float) -> tuple[slice, slice]:
    """Rows and columns of a rectangle of that share of the image, cut at its borders."""
    sides = []
    for size in (height, width):
        half = int(size * math.sqrt(area)) // 2
        centre = int(torch.randint(size, ()))
        sides.append(slice(max(centre - half, 0), min(centre + half, size)))
    return sides[0], sides[1]


def cross_entropy_sum(logits: Tensor, labels: MixedLabels, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy summed over images of mixed labels, by their shares.

    Args:
        logits: (n, classes). labels: (n,) each.
        smoothing: Share of a label, of both alike, that is spread over all classes, in [0, 1).
    """
    own, other = (
        F.cross_entropy(logits, y, reduction="sum", label_smoothing=smoothing) for y in labels[:2]
    )
    return labels.share * own + (1 - labels.share) * other


def num_hits(logits: Tensor, labels: Labels) -> Tensor:
    """() images classified right; a mixed image counts by the share of the label that is found."""
    guesses = logits.argmax(1)
    if not isinstance(labels, MixedLabels):
        return (guesses == labels).sum()
    own, other = ((guesses == y).sum() for y in labels[:2])
    return labels.share * own + (1 - labels.share) * other
