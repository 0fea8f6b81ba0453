"""Fused batch norm's kernels against double precision; run as compiled_kernels.py is.

The interpreter truncates where hardware rounds float32 to bfloat16, so the statement "at most twice
the eager operation's error" is made of float32 and float16 there; bfloat16 may be an ulp low.
"""

from __future__ import annotations

import pytest
import torch

from freeadv_fast.kernels import batch_norm as kernel
from freeadv_fast.kernels import batch_norm_backward as backward
from freeadv_fast.kernels import batch_norm_forward as forward
from freeadv_fast.kernels import batch_norm_statistics as statistics
from freeadv_fast.kernels import joined_norms as joined
from interpreted import DEVICE, IS_INTERPRETED

if IS_INTERPRETED:  # loads far ahead of the few tiles here are loads of nothing
    SHALLOW = statistics.Schedule(128, num_warps=8, per_sm=2, depth=1, turn=1)
    statistics.STATISTICS = backward.REDUCTION = joined.REDUCTION = SHALLOW
    statistics.MERGE_LOADS = 1
NAMES = ("x", "weight", "bias", "running_mean", "running_var", "residual")
# Several chunks, the last one ragged; one image; 96 channels (tiles of 32); 24 (tiles of 8).
SHAPES = [(3, 32, 9, 11), (1, 64, 13, 7), (2, 96, 3, 3), (5, 24, 5, 5)]


def example(shape, dtype, *, residual=True, mean=1.0, deviation=2.0):
    """Activations in channels_last, parameters, running statistics and an output gradient."""
    generator = torch.Generator().manual_seed(1)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    def last(t):
        return t.to(DEVICE, dtype, memory_format=torch.channels_last)

    channels = shape[1]
    # Channels differ: a column read in another's place would show.
    x = normal(*shape) * deviation + mean * (1 + torch.arange(channels)[:, None, None] / channels)
    vectors = {
        "weight": normal(channels),
        "bias": normal(channels),
        "running_mean": normal(channels),
        "running_var": normal(channels).abs() + 0.5,
    }
    tensors = {"x": last(x), **{name: v.to(DEVICE) for name, v in vectors.items()}}
    tensors["residual"] = last(normal(*shape)) if residual else None
    return tensors, last(normal(*shape))


def fused(tensors, **options):
    """The kernels, through autograd."""
    options = {"training": True, "momentum": 0.1, "eps": 1e-5, **options}
    residual = tensors["residual"]
    return kernel.batch_norm_act(*[tensors[n] for n in NAMES[:5]], residual=residual, **options)


def eager(tensors, *, training=True, num_groups=1, relu=True, negative_slope=0.0, fork=False):
    """PyTorch's own operations."""
    norm, residual = [tensors[name] for name in NAMES[:5]], tensors["residual"]
    if norm[0].is_cuda and norm[1] is None:
        # torch 2.11's own kernel then gives the bias a gradient of no elements, an error.
        norm[1] = torch.ones(norm[0].shape[1], dtype=norm[0].dtype, device=norm[0].device)
    return kernel.batch_norm_act_ref(
        *norm, training, 0.1, 1e-5, num_groups, relu, residual, negative_slope, fork
    )


def outcome(function, tensors, dy, *, dtype=None, **options):
    """Output, all gradients and the running statistics after one pass, in double precision."""
    inputs = {}
    for name, value in tensors.items():
        value = value if value is None else value.detach().to(dtype or value.dtype, copy=True)
        if value is not None and "running" not in name:
            value.requires_grad_()
        inputs[name] = value
    y = function(inputs, **options)
    if isinstance(dy, tuple):  # of a fork's outputs
        y, shortcut = y
        given = [(t, d) for t, d in zip((y, shortcut), dy, strict=True) if d is not None]
        torch.autograd.backward([t for t, _ in given], [d.to(t.dtype) for t, d in given])
    else:
        y.backward(dy.to(y.dtype))
    gradients = {f"d{n}": v.grad for n, v in inputs.items() if v is not None and v.requires_grad}
    running = {n: v for n, v in inputs.items() if "running" in n and v is not None}
    assert y.dtype is (dtype or tensors["x"].dtype)
    return {n: v.detach().double().cpu() for n, v in ({"y": y} | gradients | running).items()}


def assert_near_double(tensors, dy, *, function=fused, reference=eager, **options):
    """Largest errors are at most twice the eager operations' in the same dtype."""
    exact = outcome(reference, tensors, dy, dtype=torch.float64, **options)
    ours = outcome(function, tensors, dy, **options)
    theirs = outcome(reference, tensors, dy, **options)
    assert exact.keys() == ours.keys()
    is_truncated = IS_INTERPRETED and tensors["x"].dtype is torch.bfloat16
    for name, value in exact.items():
        error, allowed = ((t[name] - value).abs().max() for t in (ours, theirs))
        is_activation = value.dim() == 4
        # Arithmetic is in float32, whose own last digits are two ulp.
        ulp = 2**-7 if is_truncated and is_activation else 2**-22
        assert error <= 2 * allowed + ulp * value.abs().max(), (name, error, allowed)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "residual"),
    [(torch.float32, False), (torch.float32, True), (torch.float16, True)],
    ids=str,
)
def test_equals_double_precision(shape, dtype, residual):
    assert_near_double(*example(shape, dtype, residual=residual))


@pytest.mark.parametrize(("relu", "residual"), [(True, False), (True, True), (False, True)])
def test_bfloat16(relu, residual):
    assert_near_double(*example((2, 32, 5, 7), torch.bfloat16, residual=residual), relu=relu)


@pytest.mark.parametrize("residual", [False, True])
def test_without_relu(residual):
    assert_near_double(*example((2, 24, 5, 7), torch.float32, residual=residual), relu=False)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", statistics.DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_leaky_relu(dtype, residual, training):
    example_ = example((3, 24, 5, 5), dtype, residual=residual)
    assert_near_double(*example_, training=training, negative_slope=0.1)


def test_a_slope_needs_a_relu():
    assert_near_double(*example((2, 8, 5, 5), torch.float32), relu=False, negative_slope=0.1)


@pytest.mark.parametrize(("images", "num_groups"), [(6, 2), (7, 3), (5, 4)])
@pytest.mark.parametrize("residual", [False, True])
def test_groups(images, num_groups, residual):
    example_ = example((images, 16, 5, 5), torch.float32, residual=residual)
    assert_near_double(*example_, num_groups=num_groups)


@pytest.mark.parametrize(("relu", "residual"), [(True, False), (True, True), (False, False)])
def test_eval_mode(relu, residual):
    tensors, dy = example((3, 24, 5, 5), torch.float32, residual=residual)
    # Running statistics have no groups.
    assert_near_double(tensors, dy, relu=relu, training=False, num_groups=2)


@pytest.mark.parametrize("missing", [("weight",), ("bias",), ("weight", "bias"), NAMES[3:5]])
@pytest.mark.parametrize("training", [True, False])
def test_without_parameters_or_running_statistics(missing, training):
    if missing == NAMES[3:5] and not training:
        return
    tensors, dy = example((2, 8, 5, 5), torch.float32)
    assert_near_double({**tensors, **dict.fromkeys(missing)}, dy, training=training)


def test_keeps_digits_far_from_zero():
    tensors, dy = example((4, 8, 21, 21), torch.float32, residual=False, mean=1000.0)
    exact = outcome(eager, tensors, dy, dtype=torch.float64)
    ours = outcome(fused, tensors, dy)
    tolerance = {"running_var": 2e-5, "running_mean": 1e-6, "y": 1e-4, "dx": 1e-4}
    for name, allowed in tolerance.items():
        error = (ours[name] - exact[name]).abs().max()
        assert error <= allowed * exact[name].abs().max(), (name, error)


@pytest.mark.parametrize(("depth", "turn", "num_groups"), [(2, 1, 1), (3, 3, 2)])
def test_number_of_chunks_does_not_show(depth, turn, num_groups, monkeypatch):
    tensors, dy = example((3, 16, 19, 17), torch.float32)
    schedule = statistics.Schedule(8, num_warps=1, per_sm=10, depth=depth, turn=turn)
    for module, name in ((statistics, "STATISTICS"), (backward, "REDUCTION")):
        monkeypatch.setattr(module, name, schedule)
    monkeypatch.setattr(statistics, "num_multiprocessors", lambda device: 1)
    monkeypatch.setattr(statistics, "MERGE_LOADS", depth)
    # Two blocks of columns. Of one group 61 tiles of 16 rows for 5 programs, of two 41 for 2 each.
    rows = forward.Mode(True, num_groups, True, 0.0).rows(tensors["x"]).tiled(schedule)
    assert rows.num_chunks(schedule, DEVICE) == 5 // num_groups
    assert_near_double(tensors, dy, num_groups=num_groups)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("slope", [0.0, 0.25])
def test_mask_is_exact(training, slope):
    tensors, dy = example((2, 32, 7, 9), torch.float32)
    tensors["residual"].requires_grad_()
    y = fused(tensors, training=training, negative_slope=slope)
    y.backward(dy)
    assert torch.equal(tensors["residual"].grad, torch.where(y > 0, dy, slope * dy))
    # Without a residual it is recomputed. dbias sums dz, and ones and quarters sum exactly.
    tensors["residual"] = None
    tensors["bias"].requires_grad_()
    y = fused(tensors, training=training, negative_slope=slope)
    y.backward(torch.ones_like(y))
    assert torch.equal(tensors["bias"].grad, torch.where(y > 0, 1.0, slope).sum((0, 2, 3)))


@pytest.mark.parametrize(("residual", "fork"), [(False, False), (True, False), (True, True)])
def test_a_closed_relu_blocks_infinity(residual, fork):
    tensors, dy = example((2, 8, 3, 3), torch.float32, residual=residual)
    dy[fused(tensors) <= 0] = torch.inf
    found = outcome(fused, tensors, (dy, dy) if fork else dy, fork=fork)
    assert all(t.isfinite().all() for t in found.values())


@pytest.mark.parametrize("residual", [False, True])
def test_nan_passes_the_relu(residual):
    tensors, dy = example((2, 8, 3, 3), torch.float32, residual=residual)
    tensors["x"][0, 1, 2, 2] = torch.nan
    tensors["x"].requires_grad_()
    y = fused(tensors)
    y.backward(dy)
    for t in (y, tensors["x"].grad):
        assert t[:, 1].isnan().all()
        assert t[:, [0, *range(2, 8)]].isfinite().all()


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("training", [True, False])
def test_one_gradient_alone(wanted, training):
    tensors, dy = example((2, 8, 5, 5), torch.float32)
    expected = outcome(fused, tensors, dy, training=training)[f"d{wanted}"]
    tensors[wanted].requires_grad_()
    fused(tensors, training=training).backward(dy)
    assert torch.equal(tensors[wanted].grad.double().cpu(), expected)


def two_gradients(tensors, dy):
    """That of the output, and another of the shortcut."""
    return dy, (dy.flip(0) + tensors["x"]).to(dy.dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((3, 32, 9, 11), torch.float32, {}),
        ((3, 32, 9, 11), torch.float16, {}),
        ((5, 24, 5, 5), torch.bfloat16, {"negative_slope": 0.1}),
        ((7, 96, 3, 3), torch.float16, {"num_groups": 3}),
        ((2, 16, 5, 5), torch.float32, {"training": False}),
        ((2, 16, 5, 5), torch.float32, {"relu": False}),
    ],
    ids=str,
)
def test_two_gradients(shape, dtype, options):
    tensors, dy = example(shape, dtype)
    assert_near_double(tensors, two_gradients(tensors, dy), fork=True, **options)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float16, {"negative_slope": 0.1, "num_groups": 2}),
        (torch.float16, {"training": False}),
    ],
    ids=str,
)
def test_two_gradients_without_a_residual(dtype, options):
    tensors, dy = example((5, 8, 5, 5), dtype, residual=False)
    assert_near_double(tensors, two_gradients(tensors, dy), fork=True, **options)


@pytest.mark.parametrize("given", [0, 1])
def test_one_gradient_of_two(given):
    tensors, dy = example((3, 16, 5, 5), torch.float32)
    dys = (dy, None) if given == 0 else (None, dy)
    forked, single = outcome(fused, tensors, dys, fork=True), outcome(fused, tensors, dy)
    assert all(torch.equal(forked[name], single[name]) for name in single)


class NoGradient(torch.autograd.Function):
    """A reader that gives none."""

    @staticmethod
    def forward(ctx, y, shortcut):
        return y + shortcut

    @staticmethod
    def backward(ctx, gradient):
        return None, None


@pytest.mark.parametrize("fork", [False, True])
def test_no_gradient_at_all(fork):
    tensors, dy = example((2, 8, 5, 5), torch.float32)
    tensors["x"].requires_grad_()
    y = fused(tensors, fork=fork)
    NoGradient.apply(*(y if fork else (y, y))).backward(dy)
    assert tensors["x"].grad is None


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("training", [True, False])
def test_two_gradients_for_one_input(wanted, training):
    tensors, dy = example((2, 8, 5, 5), torch.float32)
    dys = two_gradients(tensors, dy)
    expected = outcome(fused, tensors, dys, fork=True, training=training)[f"d{wanted}"]
    tensors[wanted].requires_grad_()
    torch.autograd.backward(fused(tensors, fork=True, training=training), dys)
    assert torch.equal(tensors[wanted].grad.double().cpu(), expected)


def test_two_gradients_are_summed_before_rounding():
    """In float16, 2048 + 1 is 2048."""
    tensors, dy = example((2, 8, 5, 5), torch.float16)
    tensors["bias"].requires_grad_()
    y, shortcut = fused(tensors, fork=True)
    torch.autograd.backward([y, shortcut], [torch.full_like(y, 2048), torch.ones_like(y)])
    assert torch.equal(tensors["bias"].grad, 2049.0 * (y > 0).sum((0, 2, 3)))


def test_a_fork_copies_nothing():
    tensors, dy = example((2, 16, 5, 7), torch.float16)
    y = fused(tensors)
    for options in ({}, {"training": False}, {"relu": False}):
        same, shortcut = fused(tensors, fork=True, **options)  # without gradients
        assert same is shortcut
    tensors["x"].requires_grad_()
    forked, shortcut = fused(tensors, fork=True)
    assert torch.equal(forked, y)
    assert shortcut is not forked
    assert shortcut.data_ptr() == forked.data_ptr()
    assert shortcut.stride() == forked.stride()
    same, shortcut = fused(tensors, fork=True, relu=False)
    assert same is shortcut


@pytest.mark.parametrize("saved", [0, 1])
def test_a_fork_notices_in_place_operations(saved):
    tensors, _ = example((2, 8, 5, 7), torch.float32)
    tensors["x"].requires_grad_()
    outputs = fused(tensors, fork=True)
    square = outputs[saved].square()
    outputs[1 - saved].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


def shared(tensors, *, training=True, **options):
    """The kernels that hand x on."""
    norm = statistics.Norm(*[tensors[name] for name in NAMES[1:5]], None, 0.1, 1e-5)
    return kernel.shared_norm_act(tensors["x"], norm, training=training, **options)


def shared_eager(tensors, **options):
    """PyTorch's own operations, and x."""
    x = tensors["x"] * 1.0  # no leaf, which is where autograd sums
    return eager({**tensors, "x": x}, **options), x


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((3, 32, 9, 11), torch.float16, {}),
        ((2, 96, 3, 3), torch.float32, {}),
        ((2, 24, 5, 5), torch.bfloat16, {"negative_slope": 0.1}),
        ((5, 8, 3, 3), torch.float16, {"num_groups": 2}),
        ((2, 16, 5, 5), torch.float16, {"training": False, "negative_slope": 0.1}),
    ],
    ids=str,
)
def test_shared_input(shape, dtype, options):
    tensors, dy = example(shape, dtype, residual=False)
    dys = two_gradients(tensors, dy)
    assert_near_double(tensors, dys, function=shared, reference=shared_eager, **options)


def test_shared_input_with_one_gradient_of_two():
    tensors, dy = example((2, 8, 3, 3), torch.float32, residual=False)
    single, alone = outcome(fused, tensors, dy), outcome(shared, tensors, (dy, None))
    assert all(torch.equal(alone[name], single[name]) for name in single)
    for name in ("x", "weight"):
        tensors[name].requires_grad_()
    _, alias = shared(tensors)
    alias.backward(dy)
    assert torch.equal(tensors["x"].grad, dy)
    assert tensors["weight"].grad is None
    NoGradient.apply(*shared({**tensors, "x": tensors["x"].detach().requires_grad_()})).backward(dy)


def test_shared_input_copies_nothing():
    tensors, _ = example((2, 16, 5, 7), torch.float16, residual=False)
    x = tensors["x"]
    expected = fused(tensors)
    tensors["weight"].requires_grad_()
    assert shared(tensors)[1] is x  # wants no gradient
    x.requires_grad_()
    with torch.no_grad():
        assert shared(tensors)[1] is x
    y, alias = shared(tensors)
    assert torch.equal(y, expected)
    assert alias is not x
    assert (alias.data_ptr(), alias.stride()) == (x.data_ptr(), x.stride())


def test_shared_input_notices_in_place_operations():
    tensors, _ = example((2, 8, 5, 7), torch.float32, residual=False)
    tensors["x"].requires_grad_()
    y, alias = shared(tensors)
    alias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_shared_inputs_gradients_are_summed_before_rounding():
    """In float16, 1 + 2**-11 is 1, and 2048 + 1 is 2048."""
    x = torch.ones(2, 8, 3, 3, dtype=torch.float16, device=DEVICE, requires_grad=True)
    ones, zeros = (torch.full((8,), value, device=DEVICE) for value in (1.0, 0.0))
    norm = statistics.Norm(ones + 2**-11, zeros, zeros, ones, None, 0.1, 0.0)
    outputs = kernel.shared_norm_act(x, norm, training=False)
    torch.autograd.backward(outputs, [torch.ones_like(x), torch.full_like(x, 2048)])
    assert torch.equal(x.grad, torch.full_like(x, 2050))


def test_a_shared_input_in_any_layout():
    tensors, dy = example((2, 16, 5, 5), torch.float32, residual=False)
    dys = two_gradients(tensors, dy)
    last = outcome(shared, tensors, dys)
    first = {name: None if t is None else t.contiguous() for name, t in tensors.items()}
    for name, value in outcome(shared, first, tuple(d.contiguous() for d in dys)).items():
        assert torch.equal(value, last[name])


def test_a_shared_input_differentiates_once():
    tensors, dy = example((2, 8, 3, 3), torch.float32, residual=False)
    tensors["x"].requires_grad_()
    outputs = shared(tensors)
    (dx,) = torch.autograd.grad(outputs, tensors["x"], (dy, 2 * dy), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        dx.square().sum().backward()


def test_input_gradient_in_eval_mode_reduces_nothing(monkeypatch):
    tensors, dy = example((2, 8, 5, 5), torch.float32)
    monkeypatch.setattr(backward, "_batch_norm_reduce_kernel", None)  # a launch would be an error
    tensors["x"].requires_grad_()
    fused(tensors, training=False).backward(dy)
    assert tensors["x"].grad.any()


def test_any_layout_and_no_input_changes():
    tensors, dy = example((2, 16, 5, 5), torch.float32)
    last = outcome(fused, tensors, dy)
    first = {n: v.contiguous() for n, v in tensors.items()}
    before = {n: v.clone() for n, v in first.items()}
    strided = dy.new_zeros(*dy.shape[:3], 10)[..., ::2].copy_(dy)
    for name, value in outcome(fused, first, strided).items():
        assert torch.equal(value, last[name])
    assert all(torch.equal(first[n], before[n]) for n in before)
    forked = outcome(fused, tensors, (dy, dy), fork=True)
    for name, value in outcome(fused, first, (dy.contiguous(), strided), fork=True).items():
        assert torch.equal(value, forked[name])
    y = fused(first)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_keeps_neither_output_nor_residual():
    tensors, _ = example((2, 32, 5, 7), torch.float16)
    for name in ("x", "weight", "bias", "residual"):
        tensors[name].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fused(tensors)
        tensors["residual"] = None
        fused(tensors)
    sizes = sorted((t.numel(), t.dtype) for t in saved)
    per_pass = [(32, torch.float32), (4 * 32, torch.float32), (y.numel(), torch.float16)]
    assert sizes == sorted([*per_pass, *per_pass, (y.numel() // 8, torch.uint8)])
    assert all(t.data_ptr() != y.data_ptr() for t in saved)


@pytest.mark.parametrize("fork", [False, True])
def test_a_second_derivative_says_what_to_do(fork):
    tensors, dy = example((2, 8, 3, 3), torch.float32)
    dys = (None, dy) if fork else dy
    expected = outcome(fused, tensors, dys, fork=fork)["dx"]
    tensors["x"].requires_grad_()
    y = fused(tensors, fork=fork)
    y = y[1] if fork else y
    (dx,) = torch.autograd.grad(y, tensors["x"], dy, create_graph=True)
    assert torch.equal(dx.detach().double().cpu(), expected)
    with pytest.raises(RuntimeError, match=r"differentiated twice.*train with unfused batch norm"):
        dx.square().sum().backward()


def test_eval_graph_survives_a_training_pass():
    tensors, dy = example((2, 8, 5, 5), torch.float32)
    expected = outcome(fused, tensors, dy, training=False)["dx"]
    tensors["x"].requires_grad_()
    y = fused(tensors, training=False)
    with torch.no_grad():
        fused(tensors)  # moves the running statistics
    y.backward(dy)
    assert torch.equal(tensors["x"].grad.double().cpu(), expected)


def test_counts_minibatches_of_training():
    tensors, _ = example((5, 24, 5, 5), torch.float32)
    counter = torch.tensor(2**40, device=DEVICE)
    for training in (True, False, True):
        fused(tensors, training=training, num_groups=2, num_batches_tracked=counter)
    assert counter == 2**40 + 2
    assert all(not counters.any() for counters in statistics._COUNTERS.values())


def joined_example(shape, dtype, **options):
    """Two examples: of a block, and of its shortcut in the place of its residual."""
    tensors, dy = example(shape, dtype, residual=False)
    others, other_dy = example(shape, dtype, residual=False, **options)
    del tensors["residual"], others["residual"]
    # Else the sums of both would be the same.
    others["x"] = others["x"].flip(0, 2)
    return tensors | {f"shortcut_{name}": t for name, t in others.items()}, (dy, other_dy.flip(0))


def joined_by(function):
    """A function of both norms, as one of all tensors."""

    def call(tensors, **options):
        norms = [
            statistics.Norm(*[tensors[f"{side}{n}"] for n in NAMES[1:5]], None, 0.1, 1e-5)
            for side in ("", "shortcut_")
        ]
        return function(tensors["x"], norms[0], tensors["shortcut_x"], norms[1], **options)

    return call


def joined_eager(*inputs, num_groups=1, fork=False):
    """PyTorch's own operations."""
    y = joined.joined_norms_ref(*inputs, num_groups)
    return (y, y) if fork else y


JOINED = {"function": joined_by(joined.joined_norms), "reference": joined_by(joined_eager)}


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((3, 32, 9, 11), torch.float32, {"fork": True}),
        ((7, 24, 3, 3), torch.float16, {"fork": True, "num_groups": 3}),
        ((2, 16, 5, 5), torch.float32, {}),
    ],
    ids=str,
)
def test_joined_norms(shape, dtype, options, monkeypatch):
    schedule = statistics.Schedule(128, num_warps=4, per_sm=2, depth=2, turn=2 if options else 1)
    monkeypatch.setattr(joined, "REDUCTION", schedule)
    tensors, dys = joined_example(shape, dtype, deviation=3.0)
    dy = dys if options.get("fork") else dys[0]
    assert_near_double(tensors, dy, **JOINED, **options)


@pytest.mark.parametrize("given", [0, 1])
def test_joined_norms_with_one_gradient_of_two(given):
    tensors, (dy, _) = joined_example((2, 8, 3, 3), torch.float32)
    function, dys = JOINED["function"], (dy, None) if given == 0 else (None, dy)
    forked = outcome(function, tensors, dys, fork=True)
    single = outcome(function, tensors, dy)
    assert all(torch.equal(forked[name], single[name]) for name in single)
    tensors["shortcut_x"].requires_grad_()
    (alone,) = torch.autograd.grad(function(tensors), tensors["shortcut_x"], dy)
    assert torch.equal(alone.double().cpu(), single["dshortcut_x"])


def test_joined_norms_differentiate_once():
    tensors, (dy, _) = joined_example((2, 8, 3, 3), torch.float32)
    y = JOINED["function"]({**tensors, "x": tensors["x"].requires_grad_()})
    (dx,) = torch.autograd.grad(y, tensors["x"], dy, create_graph=True)
    with pytest.raises(RuntimeError, match=r"joined_norms was differentiated twice"):
        dx.square().sum().backward()


on_gpu = pytest.mark.skipif(IS_INTERPRETED, reason="needs a CUDA device")


def where_relu_is_clear(tensors, dy, num_groups=1):
    """dy, zero where float32 statistics may decide ReLU otherwise than double precision.

    Of 25 million values some lie that near to zero, and each would count as a whole gradient.
    """
    double = {name: None if t is None else t.double() for name, t in tensors.items()}
    z = eager(double, num_groups=num_groups, relu=False)
    return dy.masked_fill(z.abs() < 1e-5, 0.0)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("shape", [(32, 64, 112, 112), (31, 256, 56, 56), (16, 2048, 7, 7)])
def test_sizes_of_a_network(shape, dtype, residual, num_groups):
    tensors, dy = example(shape, dtype, residual=residual)
    dy = where_relu_is_clear(tensors, dy, num_groups=num_groups)
    assert_near_double(tensors, dy, num_groups=num_groups)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(31, 256, 56, 56), (16, 2048, 7, 7)])
def test_two_gradients_at_sizes_of_a_network(shape, dtype):
    tensors, dy = example(shape, dtype)
    given = tuple(where_relu_is_clear(tensors, d) for d in two_gradients(tensors, dy))
    assert_near_double(tensors, given, fork=True)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(125, 160, 32, 32), (128, 512, 4, 4)])
def test_a_block_that_normalises_first_at_sizes_of_a_network(shape, dtype):
    tensors, dy = example(shape, dtype, residual=False)
    dy, other = two_gradients(tensors, dy)
    given = where_relu_is_clear(tensors, dy), where_relu_is_clear(tensors, other)
    assert_near_double(tensors, given, fork=True)
    assert_near_double(tensors, (given[0], other), function=shared, reference=shared_eager)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(31, 256, 56, 56), (16, 2048, 7, 7)])
def test_joined_norms_at_sizes_of_a_network(shape, dtype):
    tensors, dys = joined_example(shape, dtype)
    z = joined_by(joined.joined_norms_ref)({n: t.double() for n, t in tensors.items()})
    given = tuple(dy.masked_fill(z.abs() < 1e-5, 0.0) for dy in dys)
    assert_near_double(tensors, given, **JOINED, fork=True)


@on_gpu
def test_more_elements_than_an_int32_counts():
    if torch.cuda.get_device_properties(DEVICE).total_memory < 24 << 30:
        pytest.skip("needs 24 GB")
    num = 175  # 2.25e9 elements
    layout = {"dtype": torch.bfloat16, "device": DEVICE, "memory_format": torch.channels_last}
    x, dy = (torch.empty(num, 1024, 112, 112, **layout).zero_() for _ in range(2))
    x[-1], dy[0] = 3.0, 1.0
    x.requires_grad_()
    options = {"training": True, "momentum": 0.1, "eps": 1e-5, "relu": False}
    y = kernel.batch_norm_act(x, None, None, None, None, **options)
    y.backward(dy)
    # One image in num is 3, one of the others has a gradient of 1.
    a = (9 / num * (1 - 1 / num) + 1e-5) ** -0.5
    wanted = (
        (y[0], -3 / num * a),
        (y[-1], (3 - 3 / num) * a),
        (x.grad[0], (1 - 1 / (num - 1)) * a),
    )
    for values, value in wanted:
        expected = torch.full_like(values, value)
        torch.testing.assert_close(values, expected, rtol=2**-7, atol=0)
    assert (x.grad[-1].abs() < 1e-3 * a).all()


def _network_pass(tensors, dy):
    """Forward and backward in eval and in training mode; dx of the latter's fork."""
    inputs = [tensors["x"], tensors["weight"], tensors["bias"]]
    for training in (False, True):
        for residual in (None, tensors["residual"]):
            y = fused({**tensors, "residual": residual}, training=training)
            torch.autograd.grad(y, inputs, dy)
    torch.autograd.grad(shared(tensors), inputs, (dy, 2 * dy))
    dx, _, _ = torch.autograd.grad(fused(tensors, fork=True), inputs, (dy, 2 * dy))
    return dx


def _trainable(shape, dtype):
    """An example whose inputs want gradients."""
    tensors, dy = example(shape, dtype)
    for name in ("x", "weight", "bias", "residual"):
        tensors[name].requires_grad_()
    return tensors, dy


@on_gpu
def test_never_waits_for_the_device():
    tensors, dy = _trainable((4, 64, 14, 14), torch.bfloat16)
    _network_pass(tensors, dy)  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        _network_pass(tensors, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_is_captured_in_a_graph():
    tensors, dy = _trainable((4, 64, 14, 14), torch.bfloat16)
    start = tensors["running_mean"].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = _network_pass(tensors, dy)
        moved = tensors["running_mean"].clone()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dx = _network_pass(tensors, dy)
    tensors["running_mean"].copy_(start)
    graph.replay()
    assert torch.equal(tensors["running_mean"], moved)
    assert torch.equal(dx, expected)


@on_gpu
def test_runs_are_equal():
    tensors, dy = example((31, 256, 56, 56), torch.bfloat16)
    first, *others = (outcome(fused, tensors, dy) for _ in range(5))
    assert all(torch.equal(first[name], other[name]) for name in first for other in others)


@on_gpu
@pytest.mark.parametrize("residual", [False, True])
def test_keeps_less_memory_than_eager(residual):
    """For backward, by an output. At the peak, inside backward, ReLU's bits are more with it."""
    tensors, dy = _trainable((32, 256, 56, 56), torch.bfloat16)
    tensors = tensors if residual else {**tensors, "residual": None}

    def kept_and_peak(function):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        y = function(tensors) * 1.0  # keeps no reference to the output
        kept = torch.cuda.memory_allocated()
        y.backward(dy)
        return kept, torch.cuda.max_memory_allocated()

    kept_and_peak(fused)  # leaves gradients allocated, for both alike
    (ours, our_peak), (theirs, their_peak) = kept_and_peak(fused), kept_and_peak(eager)
    num_bits, sums = dy.numel(), 1 << 20
    assert theirs - ours > 0.9 * dy.nbytes
    assert our_peak < their_peak + (num_bits // 8 + sums if residual else 0)
