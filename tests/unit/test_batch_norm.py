"""Ghost batch norm against separate `nn.BatchNorm2d` calls, one a group."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from freeadv_fast.errors import UserError
from freeadv_fast.models.batch_norm import (
    DualNetwork,
    GhostBatchNorm2d,
    add_auxiliary_bn,
    apply_bn_groups,
    branch_parameters,
    without_auxiliary,
)
from freeadv_fast.models.zoo import build_model


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_pair(num_features, group, **options):
    """A ghost layer and the stock layer that it replaces, with separate equal tensors."""
    stock = nn.BatchNorm2d(num_features, **options)
    if stock.affine:
        nn.init.uniform_(stock.weight, 0.5, 1.5)
        nn.init.uniform_(stock.bias, -1, 1)
    if stock.track_running_stats:
        stock.running_mean.uniform_(-1, 1)
        stock.running_var.uniform_(0.5, 2)
    ghost = apply_bn_groups(nn.Sequential(copy.deepcopy(stock)), group)[0]
    assert type(ghost) is GhostBatchNorm2d
    return ghost, stock


@pytest.mark.parametrize(
    ("num_images", "group", "sizes"),
    [(8, 4, [4, 4]), (10, 4, [4, 3, 3]), (7, 2, [3, 2, 2]), (5, 1, [3, 2])],
)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_groups_equal_separate_batch_norms(num_images, group, sizes, momentum):
    ghost, stock = make_pair(6, group, momentum=momentum)
    ghost, stock = ghost.double(), stock.double()
    x = torch.randn(num_images, 6, 3, 5, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    weights = torch.randn_like(x)
    for step in range(2):
        groups = [copy.deepcopy(stock) for _ in sizes]
        outputs = [bn(rows) for bn, rows in zip(groups, twin.split(sizes), strict=True)]
        loss = (torch.cat(outputs) * weights).sum()
        output = ghost(x)
        torch.testing.assert_close(output, torch.cat(outputs), rtol=1e-12, atol=1e-12)
        x.grad = twin.grad = ghost.weight.grad = ghost.bias.grad = None
        (output * weights).sum().backward()
        loss.backward()
        torch.testing.assert_close(x.grad, twin.grad, rtol=1e-10, atol=1e-10)
        for name in ("weight", "bias"):
            expected = sum(getattr(bn, name).grad for bn in groups)
            torch.testing.assert_close(getattr(ghost, name).grad, expected, rtol=1e-10, atol=1e-10)
        for name in ("running_mean", "running_var"):
            expected = torch.stack([getattr(bn, name) for bn in groups]).mean(0)
            getattr(stock, name).copy_(expected)
            torch.testing.assert_close(getattr(ghost, name), expected, rtol=1e-12, atol=1e-12)
        stock.num_batches_tracked += 1
        assert ghost.num_batches_tracked == stock.num_batches_tracked == step + 1


@pytest.mark.parametrize("group", [6, 100])
def test_one_group_is_batch_norm_to_the_last_bit(group):
    ghost, stock = make_pair(8, group)
    x = torch.randn(6, 8, 7, 7).contiguous(memory_format=torch.channels_last)
    grads = []
    for layer in (ghost, stock):
        rows = x.clone().requires_grad_()
        (layer(rows) * torch.arange(6.0)[:, None, None, None]).sum().backward()
        grads.append(rows.grad)
    assert torch.equal(*grads)
    for (key, a), (_, b) in zip(
        ghost.state_dict().items(), stock.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), key


def test_eval_mode_is_batch_norms():
    ghost, stock = make_pair(4, 2)
    x = torch.randn(5, 4, 6, 6)
    assert torch.equal(ghost.eval()(x), stock.eval()(x))
    assert ghost.num_batches_tracked == 0


def test_memory_format_and_dtype_are_kept():
    ghost, _ = make_pair(4, 2)
    x = torch.randn(5, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    assert ghost(x).is_contiguous(memory_format=torch.channels_last)
    assert ghost(x.bfloat16()).dtype == torch.bfloat16


def test_without_affine_or_running_statistics():
    ghost, stock = make_pair(4, 3, affine=False, track_running_stats=False)
    x = torch.randn(6, 4, 5, 5)
    expected = torch.cat([stock(rows) for rows in x.split(3)])
    torch.testing.assert_close(ghost(x), expected)


def test_double_backward():
    ghost, _ = make_pair(2, 2)
    ghost = ghost.double()
    x = torch.randn(5, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(ghost, x)


def test_layers_share_tensors_with_the_network_they_replace():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4)))
    before = dict(model.named_parameters())
    keys = list(model.state_dict())
    model.eval()
    assert apply_bn_groups(model, 8) is model
    assert list(model.state_dict()) == keys
    assert all(before[name] is p for name, p in model.named_parameters())
    assert not model[1][0].training
    assert "group=8" in repr(model)


def test_timm_layers_keep_their_activation():
    layer = timm.layers.BatchNormAct2d(4)
    ghost = apply_bn_groups(nn.Sequential(copy.deepcopy(layer)), 2)[0]
    x = torch.randn(4, 4, 3, 3)
    expected = torch.cat([copy.deepcopy(layer)(rows) for rows in x.split(2)])
    torch.testing.assert_close(ghost(x), expected)
    assert expected.min() == 0


def test_networks_without_batch_norm_are_refused():
    with pytest.raises(UserError, match="--bn-group 64: this network has no batch normalisation"):
        apply_bn_groups(nn.Sequential(nn.GroupNorm(2, 4)), 64)
    with pytest.raises(UserError, match="--bn-group 64: no groups for a layer of type BatchNorm1d"):
        apply_bn_groups(nn.Sequential(nn.BatchNorm1d(4)), 64)


ARCHITECTURES = ["resnet18", "timm/resnet26", "timm/test_resnet", "preact-resnet18", "densenet121"]


def dual(arch, group=2, bn_group=None, image_size=32):
    model = build_model(arch, 10, image_size=image_size, bn_group=bn_group)
    return DualNetwork(add_auxiliary_bn(model, group)).train()


@pytest.mark.parametrize("bn_group", [None, 4])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_branches_touch_their_own_statistics_and_affines_only(arch, bn_group):
    side = 64 if arch == "densenet121" else 32
    network = dual(arch, bn_group=bn_group, image_size=side)
    model, x = network.model, torch.randn(8, 3, side, side)
    main, auxiliary = branch_parameters(model)
    for branch, moved, still in (("main", main, auxiliary), ("auxiliary", auxiliary, main)):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        model.zero_grad()
        network(x, branch).square().sum().backward()
        changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        assert changed
        assert all((".aux_bn." in key) is (branch == "auxiliary") for key in changed)
        assert all(p.grad is not None for p in moved)
        assert all(p.grad is None for p in still)
        others = {id(p) for p in main + auxiliary}
        assert all(p.grad is not None for p in model.parameters() if id(p) not in others)


def test_auxiliary_branch_is_the_network_with_the_auxiliary_tensors():
    network = dual("resnet18", group=4)
    model = network.model
    with torch.no_grad():
        for parameter in branch_parameters(model)[1]:
            parameter.add_(torch.rand_like(parameter))
    twin = build_model("resnet18", 10, image_size=32, bn_group=4)
    state = without_auxiliary(model.state_dict())
    state |= {
        key.replace(".aux_bn.", "."): value.clone()
        for key, value in model.state_dict().items()
        if ".aux_bn." in key
    }
    twin.load_state_dict(state)
    x = torch.randn(8, 3, 32, 32)
    assert torch.equal(network(x, "auxiliary"), twin.train()(x))
    assert torch.equal(network(x, "attack"), twin.eval()(x))


def test_attack_branch_moves_no_statistics_whatever_the_mode():
    network = dual("resnet18")
    before = {key: value.clone() for key, value in network.model.state_dict().items()}
    network(torch.randn(4, 3, 32, 32), "attack")
    assert all(torch.equal(v, before[k]) for k, v in network.model.state_dict().items())


def test_the_plain_network_is_unchanged_and_twins_are_added_once():
    plain = build_model("resnet18", 10, image_size=32)
    keys, x = list(plain.state_dict()), torch.randn(4, 3, 32, 32)
    expected = plain.eval()(x)
    model = add_auxiliary_bn(plain, 4)
    assert torch.equal(model(x), expected)
    assert list(without_auxiliary(model.state_dict())) == keys
    num_keys = len(model.state_dict())
    assert len(add_auxiliary_bn(model, 4).state_dict()) == num_keys


def test_a_network_without_batch_norm_has_no_branches():
    with pytest.raises(UserError, match="no batch normalisation"):
        add_auxiliary_bn(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), 4)


def test_two_forwards_of_different_group_counts_before_one_backward():
    """A whole minibatch in one group, then a larger one in several: both can go back."""
    layer = apply_bn_groups(nn.Sequential(nn.BatchNorm2d(3)), 4)
    small, large = torch.randn(4, 3, 5, 5), torch.randn(8, 3, 5, 5)
    (layer(small).square().mean() + layer(large).square().mean()).backward()
    assert layer[0].weight.grad is not None
