"""Fused batch norm's door and reference: bit by bit what the layers compute one after the other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from freeadv_fast import ops
from freeadv_fast.kernels import batch_norm as kernel
from freeadv_fast.kernels import batch_norm_forward as forward
from freeadv_fast.kernels import batch_norm_statistics as statistics
from freeadv_fast.kernels import joined_norms
from freeadv_fast.models.batch_norm import GhostBatchNorm2d
from freeadv_fast.ops import dispatch, norms


def example(shape, dtype=torch.float32, *, last=True):
    """Activations, residual and an output gradient of one dtype."""
    generator = torch.Generator().manual_seed(1)
    layout = torch.channels_last if last else torch.contiguous_format
    return [
        torch.randn(shape, generator=generator).to(dtype, memory_format=layout) for _ in range(3)
    ]


def layer(channels, group):
    """A layer with affine parameters and running statistics that are not the initial ones."""
    torch.manual_seed(2)
    norm = GhostBatchNorm2d(channels, group=group) if group else nn.BatchNorm2d(channels)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


def through_door(norm, x, num_groups, relu, residual, slope=0.0):
    """`ops.batch_norm_act` with a layer's tensors."""
    return ops.batch_norm_act(
        x,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        training=norm.training,
        momentum=norm.momentum,
        eps=norm.eps,
        num_groups=num_groups,
        relu=relu,
        residual=residual,
        negative_slope=slope,
    )


@pytest.mark.parametrize(("images", "group", "num_groups"), [(4, None, 1), (6, 3, 2), (7, 3, 3)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("relu", "with_residual"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_equals_the_layers(images, group, num_groups, training, dtype, relu, with_residual, slope):
    results = []
    for is_fused in (True, False):
        x, residual, dy = example((images, 6, 5, 4), dtype)
        norm = layer(6, group).train(training)
        if dtype is torch.float64:
            norm.double()
        inputs = [x.requires_grad_(), residual.requires_grad_()][: 1 + with_residual]
        if is_fused:
            y = through_door(norm, x, num_groups, relu, residual if with_residual else None, slope)
        else:
            y = norm(x)
            y = y + residual if with_residual else y
            y = F.leaky_relu(y, slope) if relu else y
        y.backward(dy)
        gradients = [t.grad for t in (*inputs, norm.weight, norm.bias)]
        assert y.is_contiguous(memory_format=torch.channels_last)
        results.append([y.detach(), *gradients, norm.running_mean, norm.running_var])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_groups_without_running_statistics():
    x, _, _ = example((7, 6, 5, 4))
    norm = layer(6, 3)
    options = {"training": True, "momentum": 0.1, "eps": norm.eps, "num_groups": 3}
    y = ops.batch_norm_act(x, norm.weight, norm.bias, None, None, **options)
    assert torch.equal(y, F.relu(norm(x)))


def test_a_fork_is_one_object_whose_gradients_autograd_sums():
    x, residual, dy = example((4, 6, 5, 4))
    norm = layer(6, None)
    options = {"training": True, "momentum": 0.1, "eps": norm.eps, "residual": residual}
    tensors = [norm.weight, norm.bias, None, None]
    y, shortcut = ops.batch_norm_act(x.requires_grad_(), *tensors, fork=True, **options)
    assert y is shortcut
    torch.autograd.backward([y, shortcut], [dy, 2 * dy])
    forked, x.grad = x.grad, None
    ops.batch_norm_act(x, *tensors, **options).backward(dy + 2 * dy)
    assert torch.equal(forked, x.grad)


def test_keeps_nchw_as_pytorch_does():
    x, _, _ = example((4, 6, 5, 4), last=False)
    norm = layer(6, None)
    y = through_door(norm, x, 1, True, None)
    assert y.is_contiguous()
    assert torch.equal(y, F.relu(layer(6, None)(x)))


def test_reference_has_second_derivatives():
    x, residual, _ = example((4, 3, 3, 2), torch.float64)
    norm = layer(3, None).double()
    norm.running_mean = norm.running_var = None

    def loss_of_gradient(x, residual, weight, bias):
        options = {"training": True, "momentum": 0.1, "eps": 1e-5, "num_groups": 2}
        y = ops.batch_norm_act(x, weight, bias, None, None, residual=residual, **options)
        (gradient,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return gradient.square().sum()

    inputs = [t.detach().requires_grad_() for t in (x, residual, norm.weight, norm.bias)]
    # Steps so small that no value crosses the ReLU's kink.
    assert torch.autograd.gradcheck(loss_of_gradient, inputs, eps=1e-7, atol=1e-3, rtol=1e-4)


def test_graph_of_one_group_survives_an_update_in_groups():
    x, _, dy = example((4, 6, 5, 4))
    norm = layer(6, None)
    y = through_door(norm, x.requires_grad_(), 1, True, None)
    through_door(norm, x, 2, True, None)
    y.backward(dy)
    assert x.grad.any()


class HostReads(TorchDispatchMode):
    """Counts reads of a tensor's value by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_host_reads_nothing():
    x, residual, dy = example((7, 6, 5, 4))
    with HostReads() as reads:
        through_door(layer(6, None), x.requires_grad_(), 3, True, residual).backward(dy)
        x[0, 0, 0, 0].detach().item()
    assert reads.num == 1  # the one above


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 6)}, r"expected float \(N, C, H, W\), got torch.float32 \(4, 6\)"),
        ({"x": torch.zeros(4, 6, 5, 5, dtype=torch.int32)}, "torch.int32"),
        ({"residual": torch.zeros(3, 6, 5, 5)}, r"\(3, 6, 5, 5\) and x torch.float32 \(4, 6, 5, 5"),
        ({"residual": torch.zeros(4, 6, 5, 5).double()}, "residual torch.float64"),
        ({"weight": torch.zeros(5)}, r"weight: expected \(6,\).*got \(5,\)"),
        ({"bias": torch.zeros(1, 6)}, r"bias: expected \(6,\)"),
        ({"running_var": None}, "both or neither"),
        ({"running_var": torch.zeros(7)}, r"running_var: expected \(6,\)"),
        ({"bias": torch.zeros(6, device="meta")}, "bias is on meta, x is on cpu"),
        ({"running_mean": None, "running_var": None, "training": False}, "eval mode without"),
        ({"num_groups": 5}, r"num_groups 5 of x \(4, 6, 5, 5\)"),
        ({"num_groups": 0}, "num_groups 0"),
        ({"x": torch.zeros(4, 6, 1, 1), "num_groups": 3}, "two values a channel"),
        ({"x": torch.zeros(1, 6, 1, 1)}, "two values a channel"),
        ({"negative_slope": -0.1}, "negative_slope: expected a finite number >= 0, got -0.1"),
        ({"negative_slope": float("inf")}, "negative_slope.*got inf"),
        ({"negative_slope": float("nan")}, "negative_slope.*got nan"),
    ],
)
@pytest.mark.parametrize("function", [ops.batch_norm_act, kernel.batch_norm_act])
def test_refuses(function, change, message):
    vectors = ("weight", "bias", "running_mean", "running_var")
    arguments = {
        "x": torch.zeros(4, 6, 5, 5),
        **{name: torch.ones(6) for name in vectors},
        **{"training": True, "momentum": 0.1, "eps": 1e-5, "num_groups": 1},
    }
    with pytest.raises(RuntimeError, match=message):
        function(**{**arguments, **change})


@pytest.mark.parametrize(
    ("dtype", "channels", "parameters", "is_supported"),
    [
        (torch.bfloat16, 8, torch.float32, True),
        (torch.float16, 2048, torch.float32, True),
        (torch.float32, 24, torch.float32, True),
        (torch.float64, 8, torch.float64, False),
        (torch.bfloat16, 12, torch.float32, False),
        (torch.bfloat16, 8, torch.bfloat16, False),
    ],
)
def test_what_the_kernels_take(dtype, channels, parameters, is_supported):
    x = torch.zeros(2, channels, 3, 3, dtype=dtype)
    vector, counter = torch.zeros(channels, dtype=parameters), torch.zeros((), dtype=torch.int64)
    norm = ops.Norm(vector, None, None, vector, counter, 0.1, 1e-5)
    assert statistics.supports(x, norm) is is_supported
    assert not statistics.supports(x[:0], norm)
    strided = torch.zeros(2 * channels)[::2]
    assert not statistics.supports(x, norm._replace(weight=strided))
    assert not statistics.supports(x, norm._replace(num_batches_tracked=counter.float()))


def test_a_gpu_runs_the_kernels_where_they_apply(monkeypatch):
    """Which function the door calls; the kernels themselves are tested elsewhere."""
    called = []
    monkeypatch.setattr(dispatch, "backend", lambda device: "triton")
    for name in ("batch_norm_act", "batch_norm_act_ref"):
        monkeypatch.setattr(
            kernel, name, lambda *_, name=name, **given: called.append((name, given))
        )
    options = {"training": True, "momentum": 0.1, "eps": 1e-5, "num_groups": 2, "relu": False}
    options |= {"residual": torch.zeros(1), "negative_slope": 0.1, "fork": True}
    options |= {"num_batches_tracked": None, "moments": None}
    for channels in (8, 12):
        ops.batch_norm_act(torch.zeros(2, channels, 3, 3), None, None, None, None, **options)
    assert called == [("batch_norm_act", options), ("batch_norm_act_ref", {})]


def norm_of(layer):
    """What `ops.joined_norms` takes of a layer."""
    buffers = (layer.running_mean, layer.running_var, layer.num_batches_tracked)
    return ops.Norm(layer.weight, layer.bias, *buffers, layer.momentum, layer.eps)


@pytest.mark.parametrize(("images", "group", "num_groups"), [(4, None, 1), (7, 3, 3)])
def test_a_shared_input_is_one_object_whose_gradients_autograd_sums(images, group, num_groups):
    results = []
    for is_ours in (True, False):
        x, factor, dy = example((images, 6, 5, 4))
        norm = layer(6, group)
        inner = x.requires_grad_() * 2
        if is_ours:
            options = {"training": True, "num_groups": num_groups, "negative_slope": 0.1}
            y, alias = ops.shared_norm_act(inner, norm_of(norm), **options)
            assert alias is inner
        else:
            y, alias = F.leaky_relu(norm(inner), 0.1), inner
        (y + factor * alias).backward(dy)
        results.append([y.detach(), x.grad, *(p.grad for p in norm.parameters()), *norm.buffers()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_a_gpu_shares_an_input_where_the_kernels_take_it(monkeypatch):
    called = []
    monkeypatch.setattr(dispatch, "backend", lambda device: "triton")
    monkeypatch.setattr(kernel, "shared_norm_act", lambda *_, **given: called.append(given))
    monkeypatch.setattr(norms, "batch_norm_act", lambda x, *_, **given: called.append(x) or x)
    fits, narrow = torch.zeros(2, 8, 3, 3), torch.zeros(2, 12, 3, 3)
    options = {"training": False, "num_groups": 1, "negative_slope": 0.1, "moments": None}
    for x in (fits, narrow):
        ops.shared_norm_act(x, ops.Norm(*[None] * 5, 0.1, 1e-5), **options)
    assert called[0] == options
    assert called[1] is narrow


@pytest.mark.parametrize(("images", "group", "num_groups"), [(4, None, 1), (7, 3, 3)])
def test_joined_norms_equal_the_layers(images, group, num_groups):
    results = []
    for is_joined in (True, False):
        x, shortcut, dy = example((images, 6, 5, 4))
        layers = [layer(6, group) for _ in range(2)]
        inputs = [x.requires_grad_(), shortcut.requires_grad_()]
        if is_joined:
            norm, shortcut_norm = map(norm_of, layers)
            y, _ = ops.joined_norms(
                x, norm, shortcut, shortcut_norm, num_groups=num_groups, fork=True
            )
        else:
            y = F.relu(layers[0](x) + layers[1](shortcut))
        y.backward(dy)
        results.append([y.detach(), *(t.grad for t in inputs)])
        for norm in layers:
            results[-1] += [p.grad for p in norm.parameters()] + list(norm.buffers())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_a_gpu_joins_norms_where_it_takes_both(monkeypatch):
    called = []
    monkeypatch.setattr(dispatch, "backend", lambda device: "triton")
    monkeypatch.setattr(joined_norms, "joined_norms", lambda *_, **given: called.append(given))
    monkeypatch.setattr(norms, "batch_norm_act", lambda x, *_, **given: called.append(x) or x)
    fits, narrow = torch.zeros(2, 8, 3, 3), torch.zeros(2, 12, 3, 3)
    norm, options = ops.Norm(*[None] * 5, 0.1, 1e-5), {"num_groups": 1, "fork": False}
    ops.joined_norms(fits, norm, fits, norm, **options)
    ops.joined_norms(fits, norm, narrow, norm, **options)
    assert called[0] == options
    assert called[1] is narrow
    assert called[2] is fits


@pytest.mark.parametrize("per_sm", [1, 6])
@pytest.mark.parametrize(
    ("images", "image_rows", "num_groups", "channels"),
    [(256, 112 * 112, 1, 64), (256, 49, 4, 2048), (7, 9, 3, 160), (1, 1, 1, 8), (2**16, 1, 5, 24)],
)
def test_every_row_is_in_one_tile(images, image_rows, num_groups, channels, per_sm, monkeypatch):
    rows = statistics.Rows(images, image_rows, num_groups, channels, 2)
    groups = torch.empty(images, 0).tensor_split(num_groups)
    assert rows.largest_group == len(groups[0]) * image_rows
    monkeypatch.setattr(statistics, "num_multiprocessors", lambda device: 132)
    schedule = statistics.Schedule(32, num_warps=8, per_sm=per_sm, depth=2, turn=1)
    tiled = rows.tiled(schedule)
    num_chunks, tile_rows = tiled.num_chunks(schedule, None), tiled.tile_rows(8)
    # No chunk is without a tile.
    assert 1 <= num_chunks <= -(-rows.largest_group // tile_rows)
    # All run at once, unless there are more columns and groups than that.
    assert channels == tiled.columns * tiled.column_blocks
    blocks = tiled.column_blocks * num_groups
    assert num_chunks * blocks <= max(132 * per_sm, blocks)
    grid, options = forward.elementwise(rows)
    per_column, rest = divmod(grid[0], rows.column_blocks)
    assert rest == 0
    assert per_column * forward.TILES * options["BM"] >= rows.largest_group
    assert channels % rows.columns == 0
