"""Losses in fixed shapes against torchvision's own, which pick anchors out."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import box_iou, generalized_box_iou_loss

from freeadv_fast.models.retinanet import HeadOutputs
from freeadv_fast.step.detection import Detection
from freeadv_fast.step.detection_loss import (
    BACKGROUND,
    IGNORED,
    class_losses,
    decode,
    encode,
    giou_losses,
    match,
)
from freeadv_fast.step.objects import Objects
from small_detector import NUM_CLASSES, SIZES, as_torchvision_has_them, objects_of, small_detector

CANVAS, GRIDS = (64, 64), (8, 4, 2, 1, 1)


def anchors_of(detector):
    grids = [torch.Size((side, side)) for side in GRIDS]
    return torch.cat(detector.anchors(grids, torch.Size(CANVAS), torch.device("cpu")))


def crafted(anchors):
    """Six images: ordinary, empty, full, out of every anchor's reach, ties, an object twice."""
    objects = objects_of(SIZES, torch.Generator().manual_seed(1))
    objects.boxes[3, 1] = torch.tensor([900.0, 900, 910, 920])
    objects.boxes[4, 0] = anchors[100]
    objects.boxes[5, 1] = objects.boxes[5, 0]
    return objects


@pytest.fixture(params=["l1", "giou"])
def detector(request):
    return small_detector(box_loss=request.param)


def random_outputs(anchors, dtype):
    n, generator = len(SIZES), torch.Generator().manual_seed(2)
    logits = torch.randn(n, len(anchors), NUM_CLASSES, generator=generator, dtype=dtype) * 8
    deltas = torch.randn(n, len(anchors), 4, generator=generator, dtype=dtype)
    deltas[0, ::5] *= 8  # beyond the largest scale
    return HeadOutputs(logits.requires_grad_(), deltas.requires_grad_(), anchors, ())


def torchvisions(detector, outputs, targets):
    """Class and box loss, summed over the images."""
    losses = detector.compute_loss(
        as_torchvision_has_them(targets),
        {"cls_logits": outputs.class_logits, "bbox_regression": outputs.box_deltas},
        [outputs.anchors] * len(targets),
    )
    return {part: loss * len(targets) for part, loss in losses.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_torchvisions(detector, dtype):
    anchors = anchors_of(detector)
    outputs, targets = random_outputs(anchors, dtype), crafted(anchors).packed()
    sums = torch.zeros(4, dtype=torch.float64)
    ours = Detection(detector).loss_sum(outputs, targets, sums)
    theirs = sum(torchvisions(detector, outputs, targets).values())
    torch.testing.assert_close(ours, theirs)
    assert sums.tolist() == [pytest.approx(ours.item()), 0, len(targets), 0]
    found, wanted = (torch.autograd.grad(loss, outputs[:2]) for loss in (ours, theirs))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype is torch.float32 else 1e-12, atol=1e-7)
        assert b.count_nonzero() > 100


@pytest.mark.parametrize(
    ("attack_loss", "parts"),
    [
        ("sum", ["classification", "bbox_regression"]),
        ("classification", ["classification"]),
        ("box", ["bbox_regression"]),
    ],
)
def test_attacks_ascend_the_loss_or_a_part_of_it(detector, attack_loss, parts):
    anchors = anchors_of(detector)
    outputs, targets = random_outputs(anchors, torch.float64), crafted(anchors).packed()
    task = Detection(detector, attack_loss)
    (ours,) = task.attack_losses(outputs, targets, smoothed=True)
    theirs = torchvisions(detector, outputs, targets)
    torch.testing.assert_close(ours, sum(theirs[part] for part in parts))


def test_matches_are_torchvisions_with_its_ties(detector):
    anchors = anchors_of(detector)
    objects = crafted(anchors)
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
    matches = match(objects, anchors)
    for image, target in enumerate(as_torchvision_has_them(objects.packed())):
        if len(target["boxes"]):
            iou = box_iou(target["boxes"], anchors)
            assert torch.equal(matches[image], matcher(iou)), image
        else:
            assert (matches[image] == BACKGROUND).all()
    assert {BACKGROUND, IGNORED} < set(matches[0].tolist()) | set(matches[4].tolist())
    assert (matches[3] >= 0).sum() > len(anchors) // 2  # the object out of reach ties with all


def test_what_an_empty_place_holds_does_not_matter(detector):
    anchors = anchors_of(detector)
    outputs, objects = random_outputs(anchors, torch.float32), crafted(anchors)
    filled = Objects(objects.sizes, objects.boxes.clone(), objects.classes)
    filled.boxes[~objects.is_object] = torch.tensor([0.0, 0, 64, 64])
    losses = []
    for one in (objects, filled):
        (loss,) = Detection(detector).attack_losses(outputs, one.packed(), smoothed=False)
        losses.append((loss, *torch.autograd.grad(loss, outputs[:2])))
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))


def test_an_ignored_anchor_may_hold_anything():
    logits = torch.zeros(1, 3, 2, requires_grad=True)
    spoilt = torch.tensor([[[0.0, 0], [torch.inf, -torch.inf], [0, 0]]], requires_grad=True)
    matches, classes = torch.tensor([[0, IGNORED, BACKGROUND]]), torch.tensor([[1]])
    losses = [class_losses(z, matches, classes).sum() for z in (logits, spoilt)]
    assert torch.equal(*losses)
    (gradient,) = torch.autograd.grad(losses[1], spoilt)
    assert torch.isfinite(gradient).all()
    assert gradient[0, 1].count_nonzero() == 0


def test_a_second_derivative_is_refused_and_a_second_backward_pass_is_not():
    logits = torch.zeros(1, 2, 2, requires_grad=True)
    loss = class_losses(logits, torch.tensor([[0, BACKGROUND]]), torch.tensor([[1]])).sum()
    first, again = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="the focal loss is differentiable once"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_boxes_and_deltas_are_torchvisions():
    torch.manual_seed(0)
    boxes, anchors = (torch.rand(50, 4) * 30 + torch.tensor([0, 0, 31, 31]) for _ in range(2))
    coder, deltas = BoxCoder((1.0, 1.0, 1.0, 1.0)), torch.randn(50, 4) * 4
    torch.testing.assert_close(encode(boxes, anchors), coder.encode_single(boxes, anchors))
    torch.testing.assert_close(decode(deltas, anchors), coder.decode_single(deltas, anchors))
    torch.testing.assert_close(decode(encode(boxes, anchors), anchors), boxes)
    others = torch.cat([boxes[:25] + 100, boxes[25:].roll(1, 0)])
    wanted = generalized_box_iou_loss(boxes, others, reduction="none")
    torch.testing.assert_close(giou_losses(boxes, others), wanted)


def test_the_network_sees_zero_for_padding_and_padding_has_no_gradient(detector):
    task, targets = Detection(detector), crafted(anchors_of(detector)).packed()
    x = torch.randn(6, 3, 64, 64).contiguous(memory_format=torch.channels_last).requires_grad_()
    seen = task.seen(x, targets)
    assert seen.is_contiguous(memory_format=torch.channels_last)
    (loss,) = task.attack_losses(detector(seen), targets, smoothed=False)
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    for image, (height, width) in enumerate(SIZES):
        inside = torch.zeros(64, 64, dtype=torch.bool)
        inside[:height, :width] = True
        assert torch.equal(seen[image][:, inside], x[image][:, inside])
        assert seen[image][:, ~inside].count_nonzero() == 0
        assert gradient[image][:, ~inside].count_nonzero() == 0
        assert gradient[image][:, inside].count_nonzero() > 0
