"""Detectors are torchvision's networks, and batch norm in them is what it is in classifiers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import detection
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import box_iou

from freeadv_fast.errors import UserError
from freeadv_fast.models.batch_norm import DualNetwork, add_auxiliary_bn, apply_bn_groups
from freeadv_fast.models.fused.fuse import fuse_batch_norms
from freeadv_fast.models.fused.norm import FusedBatchNorm2d
from freeadv_fast.models.retinanet import (
    DETECTORS,
    Detector,
    build_detector,
    feature_pyramid,
    is_detector,
)
from freeadv_fast.runs.backbone import load_into_detector
from freeadv_fast.step.learner import evaluating_tree
from small_detector import small_detector

SMALL = "retinanet_resnet10_fpn_64"
# Images of a minibatch, which torchvision leaves at their sizes and pads to 64x96.
SIZES = [(64, 75), (64, 96)]


def torchvisions(arch, num_classes):
    """torchvision's own, for images that are normalised already and of `SIZES`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return detection.__dict__[arch](
            weights=None, weights_backbone=None, num_classes=num_classes,
            image_mean=[0.0] * 3, image_std=[1.0] * 3, min_size=64, max_size=96,
        )  # fmt: skip


@pytest.mark.parametrize("arch", ["retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"])
def test_it_is_torchvisions_network(arch):
    """Keys, initial weights, what trains, and what it finds in images of different sizes."""
    torch.manual_seed(0)
    ours = build_detector(arch, 5)
    torch.manual_seed(0)
    theirs = torchvisions(arch, 5)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(p.requires_grad for p in ours.parameters())
    assert ours.head.regression_head._loss_type == theirs.head.regression_head._loss_type
    nn.init.normal_(ours.head.classification_head.cls_logits.weight, std=0.3)
    theirs.load_state_dict(ours.state_dict())
    for detector in (ours.eval(), theirs.eval()):
        detector.topk_candidates = 20
    images = [torch.randn(3, *size) for size in SIZES]
    with torch.no_grad():
        wanted = theirs(images)
        outputs = ours(theirs.transform.batch_images(images))
    found = ours.predictions(outputs, torch.tensor(SIZES))
    for a, b in zip(found, wanted, strict=True):
        assert a.keys() == b.keys()
        assert len(b["boxes"]) > 5
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_an_unknown_name_gets_one_line():
    with pytest.raises(UserError, match="--arch retinanet_vgg: no such detector; use one of"):
        build_detector("retinanet_vgg", 3)


def test_small_ones_have_the_same_parts():
    assert [arch for arch in DETECTORS if is_detector(arch)] == list(DETECTORS)
    assert not is_detector("resnet18")
    detector = build_detector(SMALL, 3)
    outputs = detector(torch.randn(2, 3, 96, 64))
    num_anchors = [9 * cells for cells in (12 * 8, 6 * 4, 3 * 2, 2 * 1, 1 * 1)]
    assert outputs.level_sizes == tuple(num_anchors)
    assert outputs.class_logits.shape == (2, sum(num_anchors), 3)
    assert outputs.box_deltas.shape == (2, sum(num_anchors), 4)
    assert outputs.anchors.shape == (sum(num_anchors), 4)
    widths = {p.shape[0] for name, p in detector.named_parameters() if ".fpn." in name}
    assert widths == {64}


def test_a_toys_anchors_reach_its_objects_wherever_they_lie():
    detector = build_detector(SMALL, 3).eval()
    anchors = detector(torch.zeros(1, 3, 128, 128)).anchors
    torch.manual_seed(0)
    for side in range(20, 77, 2):
        corners = torch.rand(200, 2) * (128 - side)
        squares = torch.cat([corners, corners + side], dim=1)
        assert box_iou(squares, anchors).amax(dim=1).min() >= 0.5, side


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_are_float32_under_autocast(dtype):
    detector = small_detector().eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain = detector(x)
        with torch.autocast("cpu", dtype):
            half = detector(x)
    assert {tensor.dtype for tensor in half[:3]} == {torch.float32}
    assert torch.equal(half.anchors, plain.anchors)
    assert not torch.equal(half.class_logits, plain.class_logits)
    torch.testing.assert_close(half.class_logits, plain.class_logits, rtol=0.1, atol=0.1)


def outputs_of(network, x, *branch):
    outputs = network(x, *branch)
    return torch.cat([outputs.class_logits, outputs.box_deltas], dim=2)


def randomize(detector):
    """Affines and statistics that show a missing layer, a missing ReLU or a wrong order."""
    for layer in detector.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
            layer.running_mean.uniform_(-0.5, 0.5)
            layer.running_var.uniform_(0.5, 1.5)
    return detector


def trained(network, x, *branch):
    """Outputs, all gradients and all buffers after a training pass."""
    rows = x.clone().requires_grad_()
    network.zero_grad()
    outputs = outputs_of(network.train(), rows, *branch)
    (outputs * torch.arange(outputs.numel()).view_as(outputs)).sum().backward()
    gradients = {f"{name}.grad": p.grad for name, p in network.named_parameters()}
    return {"outputs": outputs, "x": rows.grad, **network.state_dict(), **gradients}


def assert_equal(found, wanted):
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert (value is None) is (found[name] is None), name
        assert value is None or torch.equal(found[name], value), name


@pytest.mark.parametrize("group", [None, 2])
def test_fused_detectors_compute_the_same_in_every_branch(group):
    """Fused is the backbone, its stem with the pooling; there is no other batch norm."""
    plain = small_detector() if group is None else apply_bn_groups(small_detector(), group)
    plain = randomize(add_auxiliary_bn(plain, 2))
    fused, left = fuse_batch_norms(copy.deepcopy(plain))
    assert isinstance(fused, Detector)
    assert left == []
    norms = [layer for layer in fused.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert sum(isinstance(layer, FusedBatchNorm2d) for layer in norms) == len(norms) == 24
    x = torch.randn(5, 3, 64, 64)
    duals = DualNetwork(fused), DualNetwork(plain)
    for branch in ("main", "auxiliary", "attack"):
        assert_equal(*(trained(dual, x, branch) for dual in duals))
    trees = [evaluating_tree(network) for network in (fused, plain)]
    assert torch.equal(*(outputs_of(tree, x) for tree in trees))


def test_the_auxiliary_branch_has_statistics_and_affines_of_its_own():
    plain = small_detector()
    dual = DualNetwork(add_auxiliary_bn(small_detector(), 8))
    x, other = torch.randn(2, 4, 3, 64, 64)
    assert torch.equal(outputs_of(dual, x), outputs_of(plain, x))
    main = {k: v.clone() for k, v in dual.state_dict().items() if "aux_bn" not in k}
    first = outputs_of(dual, other, "auxiliary")
    assert all(torch.equal(value, dual.state_dict()[key]) for key, value in main.items())
    assert torch.equal(first, outputs_of(small_detector(), other))
    attack = outputs_of(dual, x, "attack")
    assert torch.equal(attack, outputs_of(dual, x, "attack"))  # no statistics move
    for layer in dual.model.modules():
        if "aux_bn" in layer._modules:
            nn.init.constant_(layer.aux_bn.bias, 0.7)
    assert not torch.allclose(outputs_of(dual, x, "attack"), attack)
    assert all(torch.equal(value, dual.state_dict()[key]) for key, value in main.items())


def test_groups_are_images_that_share_statistics():
    x = torch.randn(6, 3, 64, 64)
    grouped = apply_bn_groups(small_detector(), 2)
    parts = [outputs_of(small_detector(), part) for part in x.split(2)]
    torch.testing.assert_close(outputs_of(grouped, x), torch.cat(parts), rtol=1e-4, atol=1e-5)


def test_the_evaluating_tree_is_the_network_in_eval_mode():
    detector = randomize(small_detector())
    tree, x = evaluating_tree(detector), torch.randn(2, 3, 64, 64)
    before = copy.deepcopy(detector.state_dict())
    assert torch.equal(outputs_of(tree, x), outputs_of(copy.deepcopy(detector).eval(), x))
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(5)
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10).state_dict()


def load(detector, state):
    return load_into_detector(detector, state, SMALL, "--init-from a.pth")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_classifiers_weights_become_the_backbones(classifier, prefix):
    torch.manual_seed(0)
    detector = build_detector(SMALL, 3)
    others = {k: v.clone() for k, v in detector.state_dict().items() if "backbone.body" not in k}
    state = {"model": {f"{prefix}{key}": value for key, value in classifier.items()}}
    state["model"] |= {f"{prefix}bn1.aux_bn.weight": torch.ones(64)}  # of a run with two branches
    assert load(detector, state) == [
        "--init-from a.pth: the backbone's weights; pyramid and head start afresh"
    ]
    body = detector.backbone.body.state_dict()
    assert len(body) == len(classifier) - 2
    assert all(torch.equal(value, classifier[key]) for key, value in body.items())
    assert all(torch.equal(value, detector.state_dict()[key]) for key, value in others.items())


def test_a_detectors_weights_are_taken_whole_and_its_classifier_where_it_fits():
    torch.manual_seed(1)
    saved = build_detector(SMALL, 3).state_dict()
    afresh = "; it is for other classes, its classifier starts afresh"
    classifier = "head.classification_head.cls_logits"
    for num_classes, remark, others in (
        (3, "", set()),
        (2, afresh, {f"{classifier}.weight", f"{classifier}.bias"}),
    ):
        detector = build_detector(SMALL, num_classes)
        remarks = load(detector, {"model": saved})
        assert remarks == [f"--init-from a.pth: a detector's weights{remark}"]
        own = detector.state_dict()
        assert {key for key in own if not torch.equal(own[key], saved[key])} == others


def test_of_another_kind_of_detector_the_backbone_is_taken():
    torch.manual_seed(1)
    saved = Detector(feature_pyramid(ResNet(BasicBlock, [1, 1, 1, 1]), 32), 3).state_dict()
    detector = build_detector(SMALL, 3)
    assert "the backbone's weights" in load(detector, saved)[0]
    body = detector.backbone.body.state_dict()
    assert all(torch.equal(value, saved[f"backbone.body.{key}"]) for key, value in body.items())


def test_misfits_are_told_in_a_line(classifier):
    deep = torchvision.models.resnet18(num_classes=2).state_dict()
    partial = {key: value for key, value in classifier.items() if "layer4" not in key}
    other = f"holds no backbone of --arch {SMALL}"
    for state, message in (
        ({"epoch": 3}, "holds no weights"),
        (deep, f"{other} (layer1.1.conv1.weight has no place here)"),
        (partial, f"{other} (layer4.0.conv1.weight is missing)"),
    ):
        with pytest.raises(UserError) as error:
            load(build_detector(SMALL, 2), state)
        assert str(error.value) == f"--init-from a.pth: {message}"
