"""Detectors of torchvision's older versions keep all their weights, whatever they are called."""

from __future__ import annotations

import re

import pytest
import torch

from freeadv_fast.models.retinanet import build_detector
from freeadv_fast.runs.backbone import load_into_detector

ARCH = "retinanet_resnet18_fpn"


def as_before_0_13(state):
    """A state dict under older names; frozen batch norm had no count of its minibatches."""
    state = {
        re.sub(r"(_blocks\.\d)\.0\.", r"\1.", key): value
        for key, value in state.items()
        if not key.endswith("num_batches_tracked")
    }
    for place in range(3, -1, -1):
        old, new = f"_head.conv.{2 * place}.", f"_head.conv.{place}.0."
        state = {key.replace(new, old): value for key, value in state.items()}
    return state


@pytest.fixture(scope="module")
def saved():
    torch.manual_seed(1)
    return build_detector(ARCH, 3).state_dict()


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("num_classes", [3, 2])
def test_older_names_are_a_detectors(saved, prefix, num_classes):
    """What torchvision's own modules make of them is the reference."""
    older = as_before_0_13(saved)
    assert {"backbone.fpn.inner_blocks.0.weight", "backbone.fpn.layer_blocks.2.bias"} <= set(older)
    assert "head.regression_head.conv.6.bias" in older
    reference = build_detector(ARCH, 3)
    reference.load_state_dict(dict(older))
    detector = build_detector(ARCH, num_classes)
    state = {"model": {f"{prefix}{key}": value for key, value in older.items()}}
    (remark,) = load_into_detector(detector, state, ARCH, "--init-from a.pth")
    assert remark.startswith("--init-from a.pth: a detector's weights")
    own, wanted = detector.state_dict(), reference.state_dict()
    others = {key for key in own if not torch.equal(own[key], wanted[key])}
    classifier = "head.classification_head.cls_logits"
    fresh = {f"{classifier}.weight", f"{classifier}.bias"}
    assert others == (set() if num_classes == 3 else fresh)


@pytest.mark.parametrize("arch", [ARCH, "retinanet_resnet10_fpn_64"])
def test_newer_names_stay(arch):
    """Also of towers with GroupNorm, whose parameters stand beside the convolutions'."""
    torch.manual_seed(2)
    state = build_detector(arch, 2).state_dict()
    detector = build_detector(arch, 2)
    assert load_into_detector(detector, state, arch, "x") == ["x: a detector's weights"]
    assert all(torch.equal(value, state[key]) for key, value in detector.state_dict().items())
