"""The stem's pooling: when a fused batch norm takes it over, and that nothing else changes."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from freeadv_fast.models.batch_norm import DualNetwork, GhostBatchNorm2d, add_auxiliary_bn
from freeadv_fast.models.fused.fuse import fuse_batch_norms
from freeadv_fast.models.fused.norm import FusedBatchNorm2d
from freeadv_fast.ops import dispatch
from fused_networks import assert_equal_training, randomize, timm_resnet


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def torchvision_resnet():
    """A stem and a block."""
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    model.layer2 = model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(64, 10)
    return randomize(model)


def sequence(pool):
    return randomize(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), pool, nn.Conv2d(3, 4, 1)))


def stem_pool():
    return nn.MaxPool2d(kernel_size=(3, 3), stride=2, padding=1)


@pytest.mark.parametrize(
    ("make", "norm", "pool"),
    [
        (torchvision_resnet, "bn1", "maxpool"),
        (timm_resnet, "bn1", "maxpool"),
        (lambda: timm_resnet(stem_type="deep"), "bn1", "maxpool"),
        (lambda: sequence(stem_pool()), "0", "2"),
    ],
    ids=["torchvision", "timm", "timm-deep-stem", "sequence"],
)
def test_the_norm_pools(make, norm, pool):
    plain = make()
    model, left = fuse_batch_norms(copy.deepcopy(plain))
    assert left == []
    assert type(model.get_submodule(norm)) is FusedBatchNorm2d
    assert type(model.get_submodule(pool)) is nn.Identity
    assert [m.pool for m in model.modules() if isinstance(m, FusedBatchNorm2d)].count(True) == 1
    assert model.get_submodule(norm).pool
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert_equal_training(model, plain, torch.randn(4, 3, 33, 31))
    again, _ = fuse_batch_norms(model)
    assert again.get_submodule(norm) is model.get_submodule(norm)


def hooked():
    pool = stem_pool()
    pool.register_forward_hook(lambda *_: None)
    return pool


class OwnPool(nn.MaxPool2d):
    """Somebody's pooling."""


@pytest.mark.parametrize(
    "make",
    [
        hooked,
        lambda: OwnPool(3, 2, 1),
        lambda: nn.MaxPool2d(2, 2, 1),
        lambda: nn.MaxPool2d(3, 1, 1),
        lambda: nn.MaxPool2d(3, (2, 1), 1),
        lambda: nn.MaxPool2d(3, 2),
        lambda: nn.MaxPool2d(3, 2, 1, dilation=2),
        lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        lambda: nn.AvgPool2d(3, 2, 1),
    ],
)
def test_other_poolings_stay(make):
    plain = sequence(make())
    model, left = fuse_batch_norms(copy.deepcopy(plain))
    assert left == []
    assert not model[0].pool
    assert type(model[2]) is type(plain[2])
    assert_equal_training(model, plain, torch.randn(4, 3, 8, 8))


def test_a_pooling_that_returns_indices_stays():
    model, _ = fuse_batch_norms(
        nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(3, 2, 1, return_indices=True))
    )
    assert len(model(torch.randn(2, 3, 5, 5))) == 2


@pytest.mark.parametrize("hook", ["bn1", "relu", "maxpool"])
def test_hooks_see_what_they_saw(hook):
    plain = torchvision_resnet()
    original = copy.deepcopy(plain)
    shapes = []
    for network in (original, plain):
        network.get_submodule(hook).register_forward_hook(
            lambda layer, inputs, output: shapes.append((inputs[0].shape, output.shape))
        )
    model, left = fuse_batch_norms(original)
    assert left == ([] if hook == "maxpool" else ["bn1"])
    assert type(model.maxpool) is nn.MaxPool2d
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), plain(x))
    assert shapes[0] == shapes[1]


def test_a_replaced_pooling_stays():
    """timm's options put other layers in its place; for small images users put none."""
    for make in (
        lambda: timm_resnet(replace_stem_pool=True),
        lambda: timm_resnet(aa_layer=timm.layers.BlurPool2d),
    ):
        model, _ = fuse_batch_norms(make())
        assert not model.bn1.pool
    model = torchvision_resnet()
    model.maxpool = nn.Identity()
    fuse_batch_norms(model)
    assert not model.bn1.pool


def test_without_its_name_among_the_fast_paths(monkeypatch):
    monkeypatch.setattr(dispatch, "FAST_PATHS", dispatch.FAST_PATHS - {"norm-pool"})
    model, _ = fuse_batch_norms(sequence(stem_pool()))
    assert type(model[0]) is FusedBatchNorm2d
    assert type(model[2]) is nn.MaxPool2d


def test_both_branches_pool():
    plain = randomize(add_auxiliary_bn(sequence(stem_pool()), 2))
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    assert model[0].pool
    assert model[0].aux_bn.pool
    duals = DualNetwork(model), DualNetwork(plain)
    for branch in ("main", "auxiliary", "attack"):
        assert_equal_training(*duals, torch.randn(6, 3, 7, 8), branch)


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
)
@pytest.mark.parametrize("group", [None, 2])
def test_layer_options(options, group):
    """Also those that no kernel has, and a residual, which no network adds there."""
    fused = FusedBatchNorm2d(3, group=group, pool=True, **options).double()
    plain = nn.BatchNorm2d(3, **options) if group is None else GhostBatchNorm2d(
        3, group=group, **options
    )  # fmt: skip
    plain = plain.double()
    for training in (True, False):
        x, residual = torch.randn(2, 5, 3, 4, 5, dtype=torch.float64)
        for addend in (None, residual):
            expected = plain.train(training)(x)
            expected = expected if addend is None else expected + addend
            assert torch.equal(
                fused.train(training)(x, addend), F.max_pool2d(expected.relu(), 3, 2, 1)
            )


def test_a_layer_says_that_it_pools():
    assert repr(FusedBatchNorm2d(3, pool=True)).endswith("relu=True, pool=True)")
