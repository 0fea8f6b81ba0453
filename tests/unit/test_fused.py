"""Fused batch norms: on a CPU the network computes what it did before, to the last bit."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck

from freeadv_fast import ops
from freeadv_fast.errors import UserError
from freeadv_fast.models.batch_norm import (
    DualNetwork,
    GhostBatchNormAct2d,
    add_auxiliary_bn,
    apply_bn_groups,
)
from freeadv_fast.models.double_backward import FastDoubleBackward
from freeadv_fast.models.fused.fuse import fuse_batch_norms
from freeadv_fast.models.fused.norm import FusedBatchNorm2d
from freeadv_fast.ops import dispatch, norms
from freeadv_fast.step.learner import evaluating_tree
from fused_networks import (
    FULLY_FUSED,
    assert_equal_training,
    batch_norms,
    build,
    randomize,
    small_madry,
    small_wide,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("make", FULLY_FUSED.values(), ids=FULLY_FUSED)
def test_fused_networks_compute_the_same(make):
    plain = make()
    original = copy.deepcopy(plain)
    keys, parameters = list(original.state_dict()), dict(original.named_parameters())
    places = {key: value.data_ptr() for key, value in original.state_dict().items()}
    model, left = fuse_batch_norms(original)
    assert left == []
    assert batch_norms(model) == batch_norms(plain)
    assert isinstance(model, type(plain))
    assert list(model.state_dict()) == keys
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == places
    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert_equal_training(model, plain, torch.randn(4, 3, 32, 32))
    assert all(p.grad is not None for p in model.parameters())  # data parallelism waits for each


@pytest.mark.parametrize("group", [None, 2])
def test_fused_networks_in_float64_in_groups_and_after_deepcopy(group):
    plain = build("resnet18", bn_group=group).double()
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    x = torch.randn(5, 3, 32, 32, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    for network in (copy.deepcopy(model), model):
        assert_equal_training(network, copy.deepcopy(plain), x)
    groups = {layer.group for layer in model.modules() if isinstance(layer, FusedBatchNorm2d)}
    assert groups == {group}


def test_state_dicts_load_both_ways():
    plain, other = build("resnet18", bn_group=2), build("resnet18", bn_group=2)
    model, _ = fuse_batch_norms(other)
    x = torch.randn(4, 3, 32, 32)
    assert not torch.equal(model.eval()(x), plain.eval()(x))
    model.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(model(x), plain(x))
    randomize(model)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(x), plain(x))


def test_every_layer_runs_fused(monkeypatch):
    """The calls of `ops.batch_norm_act`: all norms of a ResNet, with what follows each."""
    calls, fused = [], ops.batch_norm_act

    def watch(x, *tensors, **options):
        calls.append((options["relu"], options["residual"] is not None, options["num_groups"]))
        return fused(x, *tensors, **options)

    for module in (ops, norms):  # what fused layers call, and what ends a block without kernels
        monkeypatch.setattr(module, "batch_norm_act", watch)
    model, _ = fuse_batch_norms(build("resnet18", bn_group=2))
    model(torch.randn(5, 3, 32, 32))
    plain, last, downsample = (True, False, 2), (True, True, 2), (False, False, 2)
    stages = [[plain, last, plain, last], *[[plain, downsample, last, plain, last]] * 3]
    assert calls == [plain, *[call for stage in stages for call in stage]]
    calls.clear()
    model.eval()(torch.randn(5, 3, 32, 32))
    assert {num_groups for *_, num_groups in calls} == {1}


def test_the_norm_that_ends_a_shortcut_joins_the_blocks_last(monkeypatch):
    """In training, unless it is hooked or averages otherwise, or the path is off; same output."""
    calls, joined = [], ops.joined_norms
    monkeypatch.setattr(ops, "joined_norms", lambda *a, **k: calls.append(k) or joined(*a, **k))
    model, _ = fuse_batch_norms(build("resnet18", bn_group=2))
    x = torch.randn(5, 3, 32, 32)

    def num_joined():
        calls.clear()
        assert torch.equal(model(x), expected)
        return len(calls)

    expected = model(x)
    assert calls == [{"num_groups": 2, "fork": True}] * 3
    norm = model.layer2[0].downsample[1]
    hook = norm.register_forward_hook(lambda *_: None)
    assert num_joined() == 2
    hook.remove()
    hook = model.layer3[0].downsample.register_forward_hook(lambda *_: None)
    assert num_joined() == 2
    hook.remove()
    norm.momentum = None
    assert num_joined() == 2
    norm.momentum = 0.1
    monkeypatch.setattr(dispatch, "FAST_PATHS", dispatch.FAST_PATHS - {"joined-norms"})
    assert num_joined() == 0
    monkeypatch.setattr(dispatch, "FAST_PATHS", {"joined-norms"})
    expected = model.eval()(x)
    assert num_joined() == 0


def test_a_convolution_that_ends_a_block_joins_its_norm(monkeypatch):
    """1x1 ones, in training, unhooked; with them what they project the shortcut by; same output."""
    calls, fused = [], ops.product_norm

    def watch(product, shortcut, **options):
        calls.append((len(product.w), isinstance(shortcut, ops.Product), *options.values()))
        return fused(product, shortcut, **options)

    monkeypatch.setattr(ops, "product_norm", watch)
    model, _ = fuse_batch_norms(build("resnet50"))
    x = torch.randn(2, 3, 32, 32)

    def num_joined():
        calls.clear()
        assert torch.equal(model(x), expected)
        return len(calls)

    expected = model(x)
    blocks = [(256, True), *[(256, False)] * 2, *[(512, False)] * 3, *[(1024, False)] * 5]
    assert calls == [(*block, 1, True) for block in (*blocks, *[(2048, False)] * 2)]
    block = model.layer1[1]
    for layer in (block.conv3, block.bn3, model.layer1[0].conv3, model.layer1[0].downsample[1]):
        hook = layer.register_forward_hook(lambda *_: None)
        assert num_joined() == len(blocks) + 1
        hook.remove()
    block.bn3.momentum = None
    assert num_joined() == len(blocks) + 1
    block.bn3.momentum = 0.1
    monkeypatch.setattr(dispatch, "FAST_PATHS", dispatch.FAST_PATHS - {"joined-norms"})
    assert num_joined() == len(blocks) + 1
    monkeypatch.setattr(dispatch, "FAST_PATHS", dispatch.FAST_PATHS - {"product-norm"})
    assert num_joined() == 0
    both = {"product-norm", "joined-norms"}
    monkeypatch.setattr(dispatch, "FAST_PATHS", dispatch.FAST_PATHS | both)
    expected = model.eval()(x)
    assert num_joined() == 0


def test_a_shortcut_of_another_dtype_than_its_block():
    """As behind an operation that autocast leaves in float32."""
    block = Bottleneck(64, 16)
    plain, x = nn.Sequential(copy.deepcopy(block)), torch.randn(2, 64, 4, 4)
    model, _ = fuse_batch_norms(nn.Sequential(block))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize(
    "make",
    [lambda: build("resnet18"), small_wide, small_madry],
    ids=["resnet18", "wide", "madry"],
)
@pytest.mark.parametrize("bn_group", [None, 4])
def test_both_branches_are_fused(make, bn_group):
    plain = make() if bn_group is None else apply_bn_groups(make(), bn_group)
    plain = randomize(add_auxiliary_bn(plain, 2))
    model, left = fuse_batch_norms(copy.deepcopy(plain))
    assert left == []
    assert list(model.state_dict()) == list(plain.state_dict())
    duals = DualNetwork(model), DualNetwork(plain)
    x = torch.randn(6, 3, 32, 32)
    for branch in ("main", "auxiliary", "attack"):
        tree, _ = (dual._branches[branch] for dual in duals)
        norms = [m for m in tree.modules() if isinstance(m, nn.BatchNorm2d)]
        assert {type(layer) for layer in norms} == {FusedBatchNorm2d}
        if branch != "main":
            assert {layer.group for layer in norms} == {2}
        assert_equal_training(*duals, x, branch)


def test_evaluating_tree():
    plain = build("resnet18")
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    tree = evaluating_tree(model)
    x = torch.randn(4, 3, 32, 32)
    model(x), plain.train()(x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert torch.equal(tree(x), plain.eval()(x))
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_moving_the_network_moves_what_twins_share():
    """A batch norm that stands at two places stays one, and so does a whole block."""
    norm, block = nn.BatchNorm2d(3), build("resnet18").layer1[0]
    model = nn.Sequential(
        nn.Sequential(norm, nn.ReLU()), norm, nn.Conv2d(3, 64, 1), block, nn.ReLU(), block
    )
    plain = copy.deepcopy(model)
    model, left = fuse_batch_norms(model)
    assert left == ["1"]
    model, plain = model.double(), plain.double()
    assert model[0][0].running_mean is model[1].running_mean
    assert model[3] is model[5]
    assert_equal_training(model, plain, torch.randn(4, 3, 5, 5, dtype=torch.float64))


def test_pairs_in_any_sequential():
    make = [
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU()),
        nn.BatchNorm2d(4),
        nn.ReLU6(),
        nn.BatchNorm2d(4),
    ]
    plain = randomize(nn.Sequential(*make))
    original = copy.deepcopy(plain)
    model, left = fuse_batch_norms(original)
    assert model is original
    assert left == ["3.1", "4", "6"]
    assert type(model[1]) is FusedBatchNorm2d
    assert type(model[2]) is nn.Identity
    assert_equal_training(model, plain, torch.randn(4, 3, 8, 8))


@pytest.mark.parametrize("group", [None, 2])
@pytest.mark.parametrize("apply_act", [True, False])
def test_timms_norm_with_its_own_activation(group, apply_act):
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), timm.layers.BatchNormAct2d(4, apply_act=apply_act))
    if group is not None:
        apply_bn_groups(plain, group)
        assert type(plain[1]) is GhostBatchNormAct2d
    randomize(add_auxiliary_bn(plain, 3))
    model, left = fuse_batch_norms(copy.deepcopy(plain))
    assert left == []
    assert type(model[1]) is type(model[1].aux_bn) is FusedBatchNorm2d
    assert model[1].relu is model[1].aux_bn.relu is apply_act
    assert_equal_training(model, plain, torch.randn(4, 3, 5, 5))


def test_a_second_call_changes_nothing():
    for make in (lambda: build("resnet18"), small_wide, small_madry):
        model, _ = fuse_batch_norms(make())
        modules = list(model.modules())
        again, left = fuse_batch_norms(model)
        assert left == []
        assert all(a is b for a, b in zip(modules, again.modules(), strict=True))


def test_the_network_that_was_handed_over_keeps_its_class():
    for make, name in ((lambda: build("preact-resnet18"), "bn"), (small_wide, "bn1")):
        original = add_auxiliary_bn(make(), 2)
        classes = {type(layer) for layer in original.get_submodule(name).modules()}
        before, plain = type(original), copy.deepcopy(original)
        model, _ = fuse_batch_norms(original)
        assert type(original) is before is not type(model)
        assert {type(layer) for layer in original.get_submodule(name).modules()} == classes
        assert_equal_training(original, plain, torch.randn(4, 3, 32, 32))


def test_order_of_conversions():
    """Groups and branches come first; afterwards they are refused, not silently lost."""
    model, _ = fuse_batch_norms(build("resnet18"))
    with pytest.raises(UserError, match="no groups for a layer of type FusedBatchNorm2d"):
        apply_bn_groups(model, 2)
    with pytest.raises(UserError, match="no groups for a layer of type FusedBatchNorm2d"):
        add_auxiliary_bn(model, 2)


@pytest.mark.parametrize("group", [None, 2])
def test_second_derivatives(group):
    """GradAlign's, through torch's own layers and through the fast ones."""
    plain = small_wide().double()
    if group is not None:
        apply_bn_groups(plain, group)
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    gradients = []
    for network, context in ((model, FastDoubleBackward()), (model, None), (plain, None)):
        rows = x.clone().requires_grad_()
        network.zero_grad()
        if context is None:
            loss = network(rows).square().sum()
        else:
            with context:
                loss = network(rows).square().sum()
        (gradient,) = torch.autograd.grad(loss, rows, create_graph=True)
        gradient.square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    fast, ours, wanted = gradients
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))
    for a, b in zip(fast, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * float(b.abs().max()))
