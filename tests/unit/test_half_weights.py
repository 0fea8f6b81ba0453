"""Layers that read half-precision copies of their weights, and the SGD that writes them."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import recorded_training
import torch
import torch.nn.functional as F
from torch import nn

from freeadv_fast.config.method_names import METHODS, SUMMING
from freeadv_fast.distributed.world import World
from freeadv_fast.models.half_weights import (
    HalfWeightConv2d,
    HalfWeightLinear,
    drop_half_weights,
    half_copy,
    use_half_weights,
    weight_for,
)
from freeadv_fast.ops import dispatch
from freeadv_fast.recipes.catalogue import RECIPES
from freeadv_fast.session.network import adds_gradients_up, wants_half_weights
from freeadv_fast.step.graphs import WARM_UP, CudaRecorder, GraphRunner
from freeadv_fast.step.learner import Learner, Pixels
from freeadv_fast.step.optim import build_sgd, is_capturable
from freeadv_fast.step.sgd import MasterSgd

HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
gpu = pytest.mark.gpu
needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def learner_of(network, half, *, has_copies, device="cpu", **options):
    network.to(device).to(memory_format=torch.channels_last)
    if has_copies:  # two kernels, a bias, and the last layer's two
        assert use_half_weights(network, half, **options) == 5
    optimizer = build_sgd(network, lr=0.1, momentum=0.9, weight_decay=1e-2, decay="kernels")
    assert isinstance(optimizer, MasterSgd) == has_copies
    pixels = Pixels(torch.zeros(3, device=device), torch.ones(3, device=device), half)
    return Learner(network, optimizer, lambda update: 0.1 / (update + 1), pixels)


def minibatch(seed, device="cpu"):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 3, 8, 8, generator=random)
    return x.to(device), torch.arange(6, device=device) % 5


def advance(learner, seeds, device="cpu"):
    def descend(x, labels):
        loss = F.cross_entropy(learner.forward(x), labels)
        learner.backward(loss)
        learner.apply_gradients()

    for seed in seeds:
        learner.update(descend, *minibatch(seed, device))


def assert_same_training(ours, theirs):
    """Weights, statistics and momentum, to the last bit and under the same keys."""
    mine, other = ours.net.state_dict(), theirs.net.state_dict()
    assert mine.keys() == other.keys()
    for key, value in other.items():
        assert torch.equal(mine[key], value), key
    mine, other = ours.optimizer.state_dict(), theirs.optimizer.state_dict()
    assert mine["param_groups"] == other["param_groups"]
    assert mine["state"].keys() == other["state"].keys()
    for index, state in other["state"].items():
        assert mine["state"][index].keys() == state.keys() == {"momentum_buffer"}
        assert torch.equal(mine["state"][index]["momentum_buffer"], state["momentum_buffer"])


def assert_copies_are_the_weights(network, half):
    copies = [(p, half_copy(p)) for p in network.parameters()]
    assert any(c is not None for _, c in copies)
    for parameter, found in copies:
        assert found is None or torch.equal(found.tensor, parameter.detach().to(half))


@HALVES
@pytest.mark.parametrize("has_half_gradients", [True, False])
def test_it_is_the_training_of_today(small_network, half, has_half_gradients):
    """To the last bit on a CPU: what is cast is what the copies hold, a gradient's cast adds none.

    In fp16 an overflow skips an update of both.
    """
    options = {"has_half_gradients": has_half_gradients}
    ours = learner_of(small_network(), half, has_copies=True, **options)
    theirs = learner_of(small_network(), half, has_copies=False)
    for learner in (ours, theirs):
        if half is torch.float16:
            learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17)
        advance(learner, range(6))
    assert_same_training(ours, theirs)
    assert not torch.equal(ours.net[0].weight, small_network()[0].weight)
    assert_copies_are_the_weights(ours.net, half)
    kernel, *others = [p.grad.dtype for p in ours.net[:2].parameters()]
    assert kernel is (half if has_half_gradients else torch.float32)
    assert others == [torch.float32] * 2
    if half is torch.float16:
        assert ours.scaler.get_scale() == theirs.scaler.get_scale() < 2.0**17
        assert 0 < int(ours.meters.skipped_updates) == int(theirs.meters.skipped_updates) < 6


@pytest.mark.parametrize("from_today", [False, True])
def test_either_goes_on_from_the_others_state(small_network, from_today):
    """A checkpoint says nothing of copies, and copies follow the weights that it brings."""
    straight = learner_of(small_network(), torch.bfloat16, has_copies=False)
    advance(straight, range(5))
    before = learner_of(small_network(), torch.bfloat16, has_copies=not from_today)
    advance(before, range(3))
    network = small_network()
    after = learner_of(network, torch.bfloat16, has_copies=from_today)
    advance(after, range(7, 9))  # something else to forget
    network.load_state_dict(copy.deepcopy(before.net.state_dict()))
    state = copy.deepcopy(before.state_dict())
    for entry in state["optimizer"]["state"].values():  # as a machine may save it
        entry["momentum_buffer"] = entry["momentum_buffer"].contiguous()
    after.load_state_dict(state)
    advance(after, range(3, 5))
    assert_same_training(after, straight)


def changed(weight, how):
    """Changes a weight as others do."""
    with torch.no_grad():
        match how:
            case "in place":
                weight.mul_(-2)
            case "loaded":
                nn.ParameterList([weight]).load_state_dict({"0": weight * -2})
            case "replaced":
                weight.data = weight * -2


@pytest.mark.parametrize("how", ["in place", "loaded", "replaced"])
@pytest.mark.parametrize("reader", ["forward", "recording", "step"])
def test_a_copy_is_never_out_of_date(small_network, how, reader):
    """Nor where an update reads no copy on the host, or leaves the weights as they are."""
    learner = learner_of(small_network(), torch.bfloat16, has_copies=True)
    advance(learner, range(2))
    weight = learner.net[0].weight
    changed(weight, how)
    before = weight.detach().clone()
    match reader:
        case "forward":
            with torch.no_grad(), learner.autocast():
                read = learner.net[0](torch.ones(1, 3, 8, 8))
                assert torch.equal(read, F.conv2d(torch.ones(1, 3, 8, 8), weight, padding=1))
        case "recording":
            learner.update(lambda x, labels: None, *minibatch(0))
        case "step":
            learner.zero_grad()
            learner.optimizer.step()
    assert torch.equal(weight, before)
    assert torch.equal(half_copy(weight).tensor, weight.detach().to(torch.bfloat16))


def test_who_reads_the_weight_itself(small_network):
    """Layers outside of autocast, or under another type; autocast's own cast has the way back."""
    network = small_network()
    use_half_weights(network, torch.bfloat16)
    x, weight = minibatch(0)[0], network[0].weight
    assert torch.equal(network[0](x), F.conv2d(x, weight, padding=1))
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(network[0](x), F.conv2d(x, weight, padding=1))
    assert weight_for(weight, torch.float16).dtype is torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        F.conv2d(x, weight, padding=1).sum().backward()
    by_cast, weight.grad = weight.grad, None
    network[0](x).sum().backward()
    assert by_cast.dtype is weight.grad.dtype is torch.bfloat16


def test_gradients_are_kept_as_they_come(small_network):
    """The layer's own gradient becomes `grad`, in its memory; second derivatives run through."""
    weight = small_network().to(memory_format=torch.channels_last)[0].weight
    layer = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False))
    layer[0].weight = weight
    use_half_weights(layer, torch.bfloat16)
    addresses = []
    read = weight_for(weight, torch.bfloat16)
    assert torch.equal(read, weight.to(torch.bfloat16))
    assert read.data_ptr() == half_copy(weight).tensor.data_ptr()
    read.register_hook(lambda g: addresses.append(g.data_ptr()))
    x = minibatch(0)[0].to(torch.bfloat16).requires_grad_()
    F.conv2d(x, read, padding=1).square().sum().backward()
    assert addresses == [weight.grad.data_ptr()]
    weight.grad = None
    loss = F.conv2d(x, weight_for(weight, torch.bfloat16), padding=1).square().sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    gradient.square().sum().backward()
    assert weight.grad.any()


class _Subclass(nn.Conv2d):
    """A layer that nobody knows."""


class _Reader(nn.Conv2d):
    """A layer that reads its copy."""

    reads_half_weights = True


def test_which_layers_have_copies():
    """Convolutions and linear layers themselves and classes that say so, in float32 training."""
    shared = nn.Conv2d(2, 2, 1)
    network = nn.ModuleDict(
        {
            "known": shared,
            "again": shared,
            "linear": nn.Linear(2, 2),
            "frozen": nn.Conv2d(2, 2, 1).requires_grad_(False),
            "wide": nn.Linear(2, 2).double(),
            "subclass": _Subclass(2, 2, 1),
            "reader": _Reader(2, 2, 1),
            "parametrised": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
            "norm": nn.BatchNorm2d(2),
        }
    )
    network["gaps"] = nn.Linear(2, 2, bias=False)
    network["gaps"].weight = nn.Parameter(torch.ones(2, 4)[:, ::2])
    before = dict(network.named_parameters())
    assert use_half_weights(network, torch.bfloat16) == 6
    after = dict(network.named_parameters())
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)
    assert {key.partition(".")[0] for key, p in after.items() if half_copy(p) is not None} == {
        "known", "linear", "reader",
    }  # fmt: skip
    assert type(network["known"]) is type(network["again"]) is HalfWeightConv2d
    assert network["known"] is network["again"]
    assert type(network["linear"]) is HalfWeightLinear
    assert all(half_copy(p) is None for p in copy.deepcopy(network).parameters())


FREE = dataclasses.replace(RECIPES["digits-free"], arch="resnet18", precision="bf16")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"precision": "fp16", "method": "pgd"}, True),
        ({"precision": "fp32"}, False),
        ({"precision": "auto"}, False),
        ({"fuse": "off"}, False),
        ({"optimizer": "sgd-foreach"}, False),
        ({"method": "gradalign"}, False),
        ({"on_collapse": "gradalign"}, False),
        ({"arch": "custom (Net)"}, False),
    ],
    ids=str,
)
def test_the_rule(monkeypatch, world, changes, expected):
    """What needs float32 or could hide a changed weight goes without copies."""
    config = dataclasses.replace(FREE, m=1) if "method" in changes else FREE
    config = dataclasses.replace(config, **changes)
    assert not wants_half_weights(config, world)  # a CPU trains as ever
    monkeypatch.setattr(dispatch, "backend", lambda device: "triton")
    assert wants_half_weights(config, world) == expected
    monkeypatch.setattr(dispatch, "FAST_PATHS", dispatch.FAST_PATHS - {"half-weights"})
    assert not wants_half_weights(config, world)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"method": "pgd", "m": 1}, False),
        ({"method": "trades", "m": 1}, True),  # two forward passes, one backward pass
        ({"accumulate": 2}, True),
        ({"method": "yopo", "m": 1, "attack_steps": 2}, True),
    ],
    ids=str,
)
def test_which_gradients_are_sums(world, changes, expected):
    config = dataclasses.replace(FREE, **changes)
    assert adds_gradients_up(config, world) == expected
    assert adds_gradients_up(config, World(0, 2, world.device))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in SUMMING])
def test_other_methods_make_one_pass_for_the_weights_an_update(small_network, name):
    learner, passes = recorded_training.build_learner(small_network()), []
    forward = learner.forward

    def counted(x, branch=None, *, attack=False, evaluating=False):
        passes.append(not attack)
        return forward(x, branch, attack=attack, evaluating=evaluating)

    learner.forward = counted
    method = recorded_training.build_method(name, learner)
    (minibatch,) = recorded_training.minibatches([6])
    method.train_minibatch(*minibatch, 6)
    assert sum(passes) == learner.updates


def test_a_finished_network_is_a_plain_one(small_network):
    network = small_network()
    learner = learner_of(network, torch.bfloat16, has_copies=True)
    advance(learner, [0])
    assert {p.grad.dtype for p in network.parameters()} == {torch.bfloat16, torch.float32}
    drop_half_weights(network)
    assert all(half_copy(p) is None for p in network.parameters())
    network(minibatch(1)[0]).sum().backward()
    assert {p.grad.dtype for p in network.parameters()} == {torch.float32}
    torch.optim.AdamW(network.parameters()).step()


@gpu
@needs_device
@HALVES
def test_a_recording_trains_as_casts_do(small_network, half):
    """Also after weights were loaded between two launches, and it never waits for the device."""
    lines, learners = [], []
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        for has_copies in (False, True):
            learner = learner_of(small_network(), half, has_copies=has_copies, device="cuda")
            learner.record_with(GraphRunner(lines.append, CudaRecorder()))
            assert is_capturable(learner.optimizer)
            weights = copy.deepcopy(learner.net.state_dict())
            advance(learner, range(WARM_UP + 2), "cuda")
            learner.net.load_state_dict(weights)
            torch.cuda.synchronize()
            x = minibatch(3, "cuda")
            torch.cuda.set_sync_debug_mode("error")
            try:
                learner.update(next(iter(learner.runner._recordings))[0], *x)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            learners.append(learner)
    assert not lines
    theirs, ours = learners
    assert_copies_are_the_weights(ours.net, half)
    for (key, a), b in zip(
        ours.net.state_dict().items(), theirs.net.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=key)
