"""A block's or a stem's output under two names: who reads which; that no gradient is lost."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

from freeadv_fast import ops
from freeadv_fast.models.batch_norm import DualNetwork, add_auxiliary_bn
from freeadv_fast.models.fused.fuse import fuse_batch_norms
from freeadv_fast.models.fused.norm import FusedBatchNorm2d
from freeadv_fast.ops import dispatch, norms
from fused_networks import (
    BLOCK,
    FULLY_FUSED,
    assert_equal_training,
    build,
    randomize,
    small_wide,
    with_own_block,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Split(torch.autograd.Function):
    """A fork as the kernels make it: two outputs in one memory, and both gradients in backward."""

    @staticmethod
    def forward(ctx, y, given):
        ctx.set_materialize_grads(False)
        ctx.given = given
        y = y.clone()
        return y, y.detach()

    @staticmethod
    def backward(ctx, *gradients):
        ctx.given.append(tuple(gradient is not None for gradient in gradients))
        return sum(gradient for gradient in gradients if gradient is not None), None


@pytest.fixture
def given(monkeypatch):
    """Which of a fork's two gradients were given, block by block, the last block first.

    A stem that pools comes after the first block.
    """
    log = []

    def forking(reference):
        def call(*tensors, fork=False, **options):
            y = reference(*tensors, fork=False, **options)
            if fork:
                return Split.apply(y, log) if y.requires_grad else (y, y)
            return y

        return call

    batch_norm_act = forking(ops.batch_norm_act)
    for module in (ops, norms):  # what fused layers call, and what ends a block without kernels
        monkeypatch.setattr(module, "batch_norm_act", batch_norm_act)
    monkeypatch.setattr(ops, "batch_norm_relu_pool", forking(ops.batch_norm_relu_pool))
    shared_norm_act = ops.shared_norm_act

    def sharing(x, norm, **options):
        x, alias = Split.apply(x, log) if x.requires_grad else (x, x)
        return shared_norm_act(x, norm, **options)[0], alias

    monkeypatch.setattr(ops, "shared_norm_act", sharing)
    return log


BOTH, OUTPUT = (True, True), (True, False)


@pytest.mark.parametrize(
    ("name", "num_forks"),
    [("resnet18", 9), ("resnet50", 17), ("timm/resnet18", 9), ("timm-deep-stem", 4)],
)
def test_shortcuts_read_the_alias(name, num_forks, given):
    """Of all blocks, and of the stem unless a convolution takes the pooling's place."""
    plain = FULLY_FUSED[name]()
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    assert_equal_training(model, plain, torch.randn(4, 3, 32, 32))
    assert given == [OUTPUT] + [BOTH] * (num_forks - 1)


def test_shortcuts_of_both_branches_read_the_alias(given):
    plain = randomize(add_auxiliary_bn(build("resnet18"), 2))
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    duals = DualNetwork(copy.deepcopy(model)), DualNetwork(plain)
    for branch in ("main", "auxiliary"):
        given.clear()
        assert_equal_training(*duals, torch.randn(4, 3, 32, 32), branch)
        assert given == [OUTPUT] + [BOTH] * 8


@pytest.mark.parametrize(
    ("name", "num_blocks"),
    [("preact-resnet18", 8), ("preact-resnet18-gradalign", 8), ("wide", 3), ("madry", 6)],
)
def test_shortcuts_of_blocks_that_normalise_first_read_an_alias(name, num_blocks, given):
    plain = FULLY_FUSED[name]()
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    assert_equal_training(model, plain, torch.randn(4, 3, 8, 8))
    assert given == [BOTH] * num_blocks


def test_a_first_norm_that_is_hooked_or_unknown_shares_nothing(given, monkeypatch):
    model, _ = fuse_batch_norms(small_wide())
    x = torch.randn(4, 3, 32, 32)

    def num_shared():
        given.clear()
        model(x).sum().backward()
        return len(given)

    assert num_shared() == 3
    for stage in (model.block1, model.block2):  # one reads the input twice, one the output
        norm = stage.layer[0].bn1
        hook = norm.register_forward_hook(lambda *_: None)
        assert num_shared() == 2
        hook.remove()
        norm.momentum = None
        assert num_shared() == 2
        norm.momentum = 0.1
    monkeypatch.setattr(dispatch, "FAST_PATHS", dispatch.FAST_PATHS - {"two-readers"})
    assert num_shared() == 0


def test_a_first_norm_refuses_what_its_layer_refuses():
    block = fuse_batch_norms(small_wide())[0].block1.layer[0]
    with pytest.raises(ValueError, match="expected 4D input"):
        block(torch.randn(4, 16))


def test_other_blocks_read_the_output(given):
    plain = with_own_block()
    plain.layer1[1], plain.layer1[0] = plain.layer1
    model, left = fuse_batch_norms(copy.deepcopy(plain))
    assert left == [name.replace("0", "1", 1) for name in BLOCK]
    assert_equal_training(model, plain, torch.randn(4, 3, 32, 32))
    assert given == [OUTPUT] + [BOTH] * 5 + [OUTPUT, BOTH]


def two_blocks(between):
    first, second = build("resnet18").layer1
    return nn.Sequential(nn.Conv2d(3, 64, 1), first, between, second)


def doubling(block, inputs, output):
    if output.requires_grad:
        output.register_hook(lambda gradient: 2 * gradient)


def retaining(block, inputs, output):
    if output.requires_grad:
        output.retain_grad()
        block.kept = output


def detaching(block, inputs, output):
    return output.detach_()


@pytest.mark.parametrize("hook", [doubling, retaining, detaching])
def test_who_takes_the_gradient_of_an_output_gets_all_of_it(hook, given):
    plain = two_blocks(nn.Identity())
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    for network in (model, plain):
        network[1].register_forward_hook(hook)
    assert_equal_training(model, plain, torch.randn(4, 3, 8, 8))
    assert set(given) == {OUTPUT}
    if hook is retaining:
        assert torch.equal(model[1].kept.grad, plain[1].kept.grad)


@pytest.mark.parametrize("position", [1, 3])
def test_full_backward_hooks_see_all_of_a_gradient(position, given):
    plain = two_blocks(nn.Identity())
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    seen = []
    for network in (model, plain):
        network[position].register_full_backward_hook(lambda *gradients: seen.append(gradients[1:]))
    assert_equal_training(model, plain, torch.randn(4, 3, 8, 8))
    ours, theirs = seen
    for got, wanted in zip(ours, theirs, strict=True):
        assert torch.equal(got[0], wanted[0])


def test_an_in_place_layer_between_blocks_is_in_both_gradients(given):
    plain = two_blocks(nn.Threshold(0.5, 0.1))
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    model[2].inplace = True
    assert_equal_training(model, plain, torch.randn(4, 3, 8, 8))
    assert given == [OUTPUT, OUTPUT]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_blocks(use_reentrant, given):
    plain = two_blocks(nn.Identity())
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    x, gradients = torch.randn(4, 3, 8, 8), []
    for network in (model, plain):
        rows = x.clone().requires_grad_()
        output = checkpoint_sequential(network, 2, rows, use_reentrant=use_reentrant)
        output.square().sum().backward()
        gradients.append([rows.grad, *(p.grad for p in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_shortcuts_under_autocast(given):
    plain = two_blocks(nn.Identity())
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal_training(model, plain, torch.randn(4, 3, 8, 8))
    assert given == [OUTPUT, BOTH]


def test_blocks_write_into_no_others_output(given):
    model, _ = fuse_batch_norms(build("resnet18"))
    blocks = [block for stage in range(1, 5) for block in model.get_submodule(f"layer{stage}")]
    outputs = []
    for block in blocks:
        block.register_forward_hook(lambda _, inputs, y: outputs.append((y, y._version)))
    model(torch.randn(4, 3, 32, 32))
    assert len(outputs) == 8
    assert all(y._version == version for y, version in outputs)


def test_outputs_are_freed_without_the_garbage_collector(given):
    layer, x = FusedBatchNorm2d(3), torch.randn(4, 3, 5, 5)
    for training in (True, False):
        y = layer.requires_grad_(training)(x, x)
        ref = weakref.ref(y)
        del y
        assert ref() is None
