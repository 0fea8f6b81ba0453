"""RetinaNet's losses in fixed shapes: no image, object or anchor changes what is launched.

torchvision's `RetinaNet.compute_loss` picks anchors out by boolean masks, whose counts the host
reads: it waits for the device, and nothing can be recorded. Here every anchor has a place in every
tensor, and those that do not take part count zero. Values and gradients are torchvision's, to
rounding.

The focal loss of n images has n A C terms, 258 million for 16 images of 800x1344 and 80 classes, 1
GB in float32. Its gradient is written with it, image by image, and is all that is kept: 3 GB at
most with the logits, where autograd keeps each of ten steps.

Shapes: n images, A anchors, C classes, K objects an image at most.

Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017; Rezatofighi et al.,
"Generalized Intersection over Union", CVPR 2019; torchvision's ``models/detection/retinanet.py``.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from freeadv_fast.step.objects import Objects

BoxLoss = Literal["l1", "giou"]

# What an anchor is without an object: nothing is there, or too little to tell. torchvision's.
BACKGROUND, IGNORED = -1, -2
FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.4
# The paper's: the weight of what is there, the rest for what is not.
ALPHA = 0.25
# Boxes grow to 62.5 times their anchor at most. torchvision's, of images 1000 pixels wide.
LARGEST_LOG_SCALE = math.log(1000 / 16)
GIOU_EPS = 1e-7


@torch.no_grad()
def match(objects: Objects, anchors: Tensor) -> Tensor:
    """Which object each anchor is to find, (n, A) int64: its number, `BACKGROUND` or `IGNORED`.

    The one that it overlaps most, by an IoU of half or more; an object's best anchors, all of equal
    ones, even if they overlap it less, and then for the object that they overlap most.

    Args:
        objects: Of n images; those of an image stand before its empty places.
        anchors: (A, 4) float32.

    Source: torchvision's `Matcher`, with low-quality matches.
    """
    # Empty places have no area, and overlap nothing.
    boxes = objects.boxes.masked_fill(~objects.is_object[:, :, None], 0.0)
    pairs = zip(boxes, objects.is_object, strict=True)
    return torch.stack([_match_image(*pair, anchors) for pair in pairs])


def _match_image(boxes: Tensor, is_object: Tensor, anchors: Tensor) -> Tensor:
    """The matches of one image, (A,), from (K, 4) boxes; (K,) bool says which there are."""
    iou: Tensor = box_iou(boxes, anchors)
    overlap, nearest = iou.max(dim=0)
    best = iou.amax(dim=1, keepdim=True).masked_fill(~is_object[:, None], torch.inf)
    is_foreground = (iou == best).any(dim=0) | (overlap >= FOREGROUND_IOU)
    nearest.masked_fill_(~is_foreground, IGNORED)
    return nearest.masked_fill_(~is_foreground & (overlap < BACKGROUND_IOU), BACKGROUND)


def class_losses(logits: Tensor, matches: Tensor, classes: Tensor) -> Tensor:
    """Sigmoid focal loss of each image over its matched anchors, at least 1: (n,).

    Args:
        logits: (n, A, C), differentiable once.
        matches: (n, A), see `match`.
        classes: (n, K) int64.
    """
    wanted = torch.where(matches >= 0, classes.gather(1, matches.clamp(min=0)), matches)
    losses: Tensor = _FocalLosses.apply(logits, wanted)  # type: ignore[no-untyped-call]
    return losses / _num_foreground(matches)


def box_losses(
    deltas: Tensor, anchors: Tensor, matches: Tensor, boxes: Tensor, kind: BoxLoss
) -> Tensor:
    """Loss of the boxes at matched anchors of each image, over their number, at least 1: (n,).

    Args:
        deltas: (n, A, 4), differentiable.
        anchors: (A, 4) float32.
        matches: (n, A), see `match`.
        boxes: (n, K, 4) float32.
        kind: ``l1`` of the deltas, or ``giou``, 1 - the generalised IoU of the boxes.
    """
    is_foreground = matches >= 0
    rows = matches.clamp(min=0)[:, :, None].expand(-1, -1, 4)
    # Elsewhere the anchor itself is wanted: finite, whatever an empty place holds.
    wanted = torch.where(is_foreground[:, :, None], boxes.gather(1, rows), anchors)
    if kind == "l1":
        losses = (deltas - encode(wanted, anchors)).abs().sum(dim=2)
    else:
        losses = giou_losses(decode(deltas, anchors), wanted)
    return losses.masked_fill(~is_foreground, 0.0).sum(dim=1) / _num_foreground(matches)


def _num_foreground(matches: Tensor) -> Tensor:
    """Matched anchors of each image, at least 1: (n,)."""
    return (matches >= 0).sum(dim=1).clamp(min=1)


class _FocalLosses(torch.autograd.Function):
    """Focal losses summed over an image's anchors and classes, with their gradient at once."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor) -> Tensor:
        """(n, A, C) logits and (n, A) classes, `BACKGROUND` or `IGNORED`, to (n,) losses."""
        gradients = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        losses = logits.new_empty(len(logits))
        for image, row in enumerate(logits):
            target = None if gradients is None else gradients[image]
            losses[image] = _focal_loss(row, wanted[image], target)
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient of each image, scaled; a graph of it (``create_graph``) there is not."""
        if torch.is_grad_enabled():
            raise RuntimeError("the focal loss is differentiable once")
        (gradients,) = ctx.saved_tensors
        return gradients * grad[:, None, None], None


def _focal_loss(logits: Tensor, wanted: Tensor, gradient: Tensor | None) -> Tensor:
    """The focal loss of one image, (), and its gradient.

    A class that is not there costs (1 - alpha) p^2 softplus(z) with p = sigmoid(z), z its logit;
    one that is there costs alpha times the same at -z.

    Args:
        logits: (A, C). wanted: (A,), a class, `BACKGROUND` or `IGNORED`.
        gradient: (A, C), written; None where nobody asks for it.
    """
    is_there, own = (wanted >= 0)[:, None].to(logits.dtype), wanted.clamp(min=0)[:, None]
    # At -inf nothing is lost, and the gradient is 0.
    z = logits.masked_fill((wanted == IGNORED)[:, None], -torch.inf)
    z.scatter_(1, own, z.gather(1, own) * (1 - 2 * is_there))
    softplus = F.softplus(z, threshold=80.0)  # exp(80) is finite in float32
    p = z.sigmoid_()
    losses = softplus.mul_(p).mul_(p)
    own_loss = (losses.gather(1, own) * is_there).sum()
    loss = (1 - ALPHA) * losses.sum() - (1 - 2 * ALPHA) * own_loss
    if gradient is not None:
        # p^3 + 2 (1 - p) p^2 softplus(z), by z.
        torch.mul(p, p, out=gradient).mul_(p).addcmul_(losses, p.neg_().add_(1), value=2)
        gradient.mul_(1 - ALPHA)
        gradient.scatter_(1, own, gradient.gather(1, own) * (1 - is_there / (1 - ALPHA)))
    return loss


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Deltas that lead from anchors to boxes, (..., 4) each: `BoxCoder.encode_single`."""
    centre, side = _centre_and_side(boxes)
    anchor_centre, anchor_side = _centre_and_side(anchors)
    return torch.cat(
        [(centre - anchor_centre) / anchor_side, torch.log(side / anchor_side)], dim=-1
    )


def decode(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Boxes to which deltas lead from anchors, (..., 4) each: `BoxCoder.decode_single`."""
    anchor_centre, anchor_side = _centre_and_side(anchors.to(deltas.dtype))
    centre = deltas[..., :2] * anchor_side + anchor_centre
    side = deltas[..., 2:].clamp(max=LARGEST_LOG_SCALE).exp() * anchor_side
    return torch.cat([centre - 0.5 * side, centre + 0.5 * side], dim=-1)


def _centre_and_side(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of the centre, width and height, (..., 2) each."""
    side = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * side, side


def giou_losses(boxes: Tensor, others: Tensor) -> Tensor:
    """1 - the generalised IoU of boxes with others, (...): `generalized_box_iou_loss`.

    Args:
        boxes: (..., 4), x1, y1, x2, y2, differentiable. others: Likewise.
    """
    overlap = torch.min(boxes[..., 2:], others[..., 2:]) - torch.max(
        boxes[..., :2], others[..., :2]
    )
    is_overlap = (overlap > 0).all(dim=-1)
    intersection = _area(overlap).masked_fill(~is_overlap, 0.0)
    union = _area(boxes[..., 2:] - boxes[..., :2]) + _area(others[..., 2:] - others[..., :2])
    union = union - intersection
    hull = torch.max(boxes[..., 2:], others[..., 2:]) - torch.min(boxes[..., :2], others[..., :2])
    area = _area(hull)
    iou = intersection / (union + GIOU_EPS)
    return 1 - (iou - (area - union) / (area + GIOU_EPS))


def _area(side: Tensor) -> Tensor:
    """Width times height, (..., 2) to (...)."""
    return side[..., 0] * side[..., 1]
