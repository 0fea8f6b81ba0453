"""Which networks average over their pixels by `ops.global_average`, and that nothing else does."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from freeadv_fast import ops
from freeadv_fast.models.fused.fuse import fuse_batch_norms
from freeadv_fast.models.global_average import GlobalAverage2d
from fused_networks import (
    assert_equal_training,
    build,
    randomize,
    small_cifar,
    small_madry,
    small_wide,
    timm_resnet,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def shapes(monkeypatch):
    """What `ops.global_average` was given."""
    given, average = [], ops.global_average
    monkeypatch.setattr(ops, "global_average", lambda x: given.append(x.shape) or average(x))
    return given


@pytest.mark.parametrize(
    ("make", "channels"),
    [
        (lambda: build("resnet18"), 512),
        (timm_resnet, 16),
        (small_cifar, 16),
        (lambda: build("preact-resnet18"), 512),
        (small_wide, 64),
        (small_madry, 128),
    ],
    ids=["torchvision", "timm", "cifar", "preact", "wide", "madry"],
)
def test_networks_average_by_it(make, channels, shapes):
    plain = make()
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    x = torch.randn(2, 3, 32, 32)
    for kind in (torch.contiguous_format, torch.channels_last):
        x = x.to(memory_format=kind)
        assert torch.equal(model.eval()(x), plain.eval()(x))
    assert [shape[:2] for shape in shapes] == [(2, channels)] * 2


def head(*layers):
    return randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *layers))


@pytest.mark.parametrize("size", [1, (1, 1), [1, 1]], ids=str)
def test_a_pooling_to_one_pixel(size, shapes):
    plain = head(nn.AdaptiveAvgPool2d(size), nn.Flatten(), nn.Linear(4, 5))
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    assert type(model[3]) is GlobalAverage2d
    assert repr(model[3]) == repr(plain[3]).replace("AdaptiveAvgPool2d", "GlobalAverage2d")
    assert fuse_batch_norms(model)[0][3] is model[3]
    x = torch.randn(4, 3, 7, 8)
    assert_equal_training(model, plain, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype is plain(x).dtype
        assert torch.equal(model(x), plain(x))
    assert shapes
    shapes.clear()
    image = torch.randn(4, 5, 6)  # without a dimension of images
    assert torch.equal(model[3](image), plain[3](image))
    assert shapes == []


def hooked():
    pool = nn.AdaptiveAvgPool2d(1)
    pool.register_forward_hook(lambda *_: None)
    return pool


class OwnPool(nn.AdaptiveAvgPool2d):
    """Somebody's pooling."""


@pytest.mark.parametrize(
    "make",
    [
        hooked,
        lambda: OwnPool(1),
        lambda: nn.AdaptiveAvgPool2d(2),
        lambda: nn.AdaptiveAvgPool2d((1, None)),
        lambda: nn.AdaptiveMaxPool2d(1),
        lambda: timm.layers.SelectAdaptivePool2d(pool_type="catavgmax"),
    ],
)
def test_other_poolings_stay(make, shapes):
    plain = head(make(), nn.Flatten())
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    assert type(model[3]) is type(plain[3])
    assert_equal_training(model, plain, torch.randn(4, 3, 7, 8))
    assert shapes == []
