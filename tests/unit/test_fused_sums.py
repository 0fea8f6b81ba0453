"""A pre-activation block's sum tells the next norm its moments: when, and when it must not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from freeadv_fast import ops
from freeadv_fast.kernels import block_sum
from freeadv_fast.models.batch_norm import DualNetwork, add_auxiliary_bn
from freeadv_fast.models.fused.fuse import fuse_batch_norms
from freeadv_fast.models.preact_resnet import PreActBlock
from freeadv_fast.ops import dispatch
from fused_networks import FULLY_FUSED, assert_equal_training, randomize, small_wide


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def told(monkeypatch):
    """Whether each norm was told moments; those that it was told are its input's."""
    log = []

    def watching(function):
        def call(x, *tensors, moments=None, **options):
            log.append(moments is not None)
            if moments is not None:
                zeros, groups = torch.zeros_like(x), options.get("num_groups", 1)
                _, wanted = block_sum.block_sum_ref(x.detach(), zeros, groups)
                torch.testing.assert_close(moments, wanted)
                assert options["training"]
            return function(x, *tensors, **options)

        return call

    for name in ("batch_norm_act", "shared_norm_act"):
        monkeypatch.setattr(ops, name, watching(getattr(ops, name)))
    reference = block_sum.block_sum_ref
    monkeypatch.setattr(ops, "block_sum", lambda *both, num_groups: reference(*both, num_groups))
    return log


def blocks(*between):
    """Two blocks of a pre-activation network, and what may stand between them; plain and fused."""
    first, second = (PreActBlock(8, n, n // 8, raw_shortcut=False) for n in (8, 16))
    plain = randomize(nn.Sequential(first, *between, second))
    return fuse_batch_norms(copy.deepcopy(plain))[0], plain


FIRST, SECOND = [False, False], [True, False]  # of a block's two norms


@pytest.mark.parametrize(
    ("name", "num_blocks", "has_last_norm"),
    [
        ("preact-resnet18", 8, True),
        ("preact-resnet18-gradalign", 8, False),
        ("wide", 3, True),
        ("madry", 6, True),
    ],
)
def test_every_norm_behind_a_block_is_told(name, num_blocks, has_last_norm, told):
    plain = FULLY_FUSED[name]()
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    assert_equal_training(model, plain, torch.randn(4, 3, 16, 16))
    training, evaluating = told[: len(told) // 2], told[len(told) // 2 :]
    assert training == FIRST + SECOND * (num_blocks - 1) + [True] * has_last_norm
    assert not any(evaluating)


def test_both_branches_are_told_of_their_own_groups(told):
    plain = randomize(add_auxiliary_bn(small_wide(), 2))
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    duals = DualNetwork(copy.deepcopy(model)), DualNetwork(plain)
    for branch in ("main", "auxiliary"):
        told.clear()
        assert_equal_training(*duals, torch.randn(4, 3, 16, 16), branch)
        assert told[:7] == FIRST + SECOND * 2 + [True]


def test_residual_networks_of_the_first_kind_know_no_sums(told):
    model, _ = fuse_batch_norms(FULLY_FUSED["cifar"]())
    model(torch.randn(4, 3, 16, 16))
    assert told
    assert not any(told)


class Doubling(nn.Module):
    """Writes into its input."""

    def forward(self, x):
        with torch.no_grad():
            x.mul_(2)
        return x


def test_an_input_that_has_moved_on_is_not_what_was_summed(told):
    model, plain = blocks(Doubling())
    assert_equal_training(model, plain, torch.randn(4, 8, 6, 6))
    assert told[:4] == FIRST * 2


def test_a_hook_that_hands_on_another_tensor(told):
    model, plain = blocks()
    for network in (model, plain):
        network[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    assert_equal_training(model, plain, torch.randn(4, 8, 6, 6))
    assert told[:4] == FIRST * 2


def test_norms_of_other_groups_take_their_own_statistics(told):
    model, _ = blocks()
    model[1].bn1.group = 2
    model(torch.randn(4, 8, 6, 6))
    assert told == FIRST * 2
    told.clear()
    model[0].bn2.group = 2
    model(torch.randn(4, 8, 6, 6))
    assert told == FIRST + SECOND


@pytest.mark.parametrize("place", [(0, "bn2"), (1, "bn1")])
def test_frozen_norms_neither_tell_nor_ask(place, told):
    model, _ = blocks()
    getattr(model[place[0]], place[1]).eval()
    model(torch.randn(4, 8, 6, 6))
    assert told == FIRST * 2


def test_a_hooked_norm_is_told_as_well(told):
    model, _ = blocks()
    model[1].bn1.register_forward_hook(lambda *_: None)
    model(torch.randn(4, 8, 6, 6))
    assert told == FIRST + SECOND


def test_without_the_path_or_outside_training_nothing_is_kept(told, monkeypatch):
    model, _ = blocks()
    x = torch.randn(4, 8, 6, 6)
    with torch.inference_mode():  # its tensors have no versions
        model(x)
    assert told == FIRST * 2
    told.clear()
    monkeypatch.setattr(dispatch, "FAST_PATHS", dispatch.FAST_PATHS - {"block-sums"})
    model(x)
    assert told == FIRST * 2


def test_a_cpu_adds_and_tells_nothing():
    x, shortcut = torch.randn(2, 2, 8, 3, 3).unbind()
    y, moments = ops.block_sum(x, shortcut, num_groups=1)
    assert torch.equal(y, x + shortcut)
    assert moments is None


def test_a_gpu_sums_what_its_kernel_takes(monkeypatch):
    called = []
    monkeypatch.setattr(dispatch, "backend", lambda device: "triton")
    monkeypatch.setattr(block_sum, "block_sum", lambda *given: called.append(given) or given[:2])
    fits = torch.ones(2, 8, 3, 3)
    for x, shortcut in ((fits, fits), (fits.double(), fits), (fits[:, :4], fits[:, :4])):
        ops.block_sum(x, shortcut, num_groups=1)
    assert called == [(fits, fits, 1)]
