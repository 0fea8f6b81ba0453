"""Batch norm with ReLU and pooling against double precision; run as compiled_kernels.py is.

Tolerances are those of compiled_batch_norm.py: bfloat16 is truncated in the interpreter.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from freeadv_fast.kernels import norm_pool as kernel
from freeadv_fast.kernels.batch_norm import batch_norm_act, batch_norm_act_ref
from interpreted import DEVICE, IS_INTERPRETED

NAMES = ("x", "weight", "bias", "running_mean", "running_var")
OPTIONS = {"training": True, "momentum": 0.1, "eps": 1e-5}


@pytest.fixture
def _small_tiles(monkeypatch):
    """Programs of few windows and of two rows of them, so that small images take several."""
    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(kernel, name, kernel.Tile(128, 2, 1))


def example(shape, dtype, *, levels=None):
    """Activations in channels_last, parameters, running statistics and an output gradient.

    Of few `levels`, most windows have several maxima.
    """
    generator = torch.Generator().manual_seed(1)
    num, channels, height, width = shape

    def normal(*size):
        return torch.randn(*size, generator=generator)

    def last(t):
        return t.to(DEVICE, dtype, memory_format=torch.channels_last)

    x = normal(*shape) * 2 + 1 + torch.arange(channels)[:, None, None] / channels
    if levels is not None:
        x = torch.randint(-1, levels - 1, shape, generator=generator).float()
    vectors = {
        "weight": normal(channels),  # of both signs: where it is negative the least x wins
        "bias": normal(channels),
        "running_mean": normal(channels),
        "running_var": normal(channels).abs() + 0.5,
    }
    tensors = {"x": last(x), **{name: v.to(DEVICE) for name, v in vectors.items()}}
    return tensors, last(normal(num, channels, (height + 1) // 2, (width + 1) // 2))


def fused(tensors, **options):
    """The kernels, through autograd."""
    return kernel.batch_norm_relu_pool(*[tensors[n] for n in NAMES], **{**OPTIONS, **options})


def eager(tensors, *, training=True, num_groups=1, fork=False):
    """PyTorch's own operations."""
    y = kernel.batch_norm_relu_pool_ref(
        *[tensors[n] for n in NAMES], training, 0.1, 1e-5, num_groups
    )
    return (y, y) if fork else y


def outcome(function, tensors, dy, *, dtype=None, **options):
    """Output, all gradients and the running statistics after one pass, in double precision."""
    inputs = {n: t.detach().to(dtype or t.dtype, copy=True) for n, t in tensors.items()}
    wanted = [inputs[n].requires_grad_() for n in NAMES[:3]]
    y = function(inputs, **options)
    outputs, dys = (y, dy) if isinstance(dy, tuple) else ((y,), (dy,))  # of a fork, or of one
    y = outputs[0]
    assert y.dtype is (dtype or tensors["x"].dtype)
    assert y.is_contiguous(memory_format=torch.channels_last)
    given = [(t, d.to(t.dtype)) for t, d in zip(outputs, dys, strict=True) if d is not None]
    gradients = torch.autograd.grad([t for t, _ in given], wanted, [d for _, d in given])
    found = {"y": y, **dict(zip(("dx", "dweight", "dbias"), gradients, strict=True))}
    found |= {n: inputs[n] for n in NAMES[3:]}
    return {n: t.detach().double().cpu() for n, t in found.items()}


def assert_near_double(tensors, dy, **options):
    """Largest errors are at most twice the eager operations' in the same dtype."""
    exact = outcome(eager, tensors, dy, dtype=torch.float64, **options)
    ours = outcome(fused, tensors, dy, **options)
    theirs = outcome(eager, tensors, dy, **options)
    is_truncated = IS_INTERPRETED and tensors["x"].dtype is torch.bfloat16
    for name, value in exact.items():
        error, allowed = ((t[name] - value).abs().max() for t in (ours, theirs))
        ulp = 2**-7 if is_truncated and value.dim() == 4 else 2**-22
        assert error <= 2 * allowed + ulp * value.abs().max(), (name, error, allowed)


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((2, 8, 5, 5), torch.float32, {}),
        ((1, 24, 4, 4), torch.float16, {}),
        ((3, 8, 3, 4), torch.float32, {"num_groups": 2}),
        ((2, 8, 6, 5), torch.bfloat16, {}),
        ((2, 8, 5, 6), torch.float32, {"training": False}),
        ((2, 8, 1, 3), torch.float32, {}),
        ((2, 8, 2, 1), torch.float16, {"training": False}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("_small_tiles")
def test_equals_double_precision(shape, dtype, options):
    assert_near_double(*example(shape, dtype), **options)


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((2, 8, 5, 6), torch.float32, {}),
        ((3, 8, 3, 4), torch.float16, {"num_groups": 2}),
        ((2, 8, 5, 5), torch.float32, {"training": False}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("_small_tiles")
def test_two_gradients(shape, dtype, options):
    tensors, dy = example(shape, dtype)
    assert_near_double(tensors, (dy, 2 * dy.flip(0)), fork=True, **options)


@pytest.mark.parametrize("given", [0, 1])
def test_one_gradient_of_two(given):
    tensors, dy = example((2, 8, 3, 3), torch.float32)
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
    tensors, dy = example((2, 8, 3, 3), torch.float32)
    tensors["x"].requires_grad_()
    y = fused(tensors, fork=fork)
    NoGradient.apply(*(y if fork else (y, y))).backward(dy)
    assert tensors["x"].grad is None


def test_two_gradients_are_summed_before_rounding():
    """Their sum is beyond float16; both kernels take it, and a quarter of it is dx."""
    tensors, _ = example((1, 8, 1, 1), torch.float16)
    for name, value in {"weight": 0.25, "bias": 10, "running_mean": 0, "running_var": 1}.items():
        tensors[name].fill_(value)
    x, bias = tensors["x"].requires_grad_(), tensors["bias"].requires_grad_()
    outputs = fused(tensors, fork=True, training=False, eps=0.0)
    largest = torch.full_like(x, 65504)
    dx, dbias = torch.autograd.grad(outputs, (x, bias), (largest, largest))
    assert (dx == 65504 / 2).all()
    assert (dbias == 2 * 65504).all()


def test_a_fork_copies_nothing():
    tensors, _ = example((2, 8, 5, 6), torch.float16)
    same, shortcut = fused(tensors, fork=True)  # without gradients
    assert same is shortcut
    tensors["x"].requires_grad_()
    for training in (True, False):
        y, shortcut = fused(tensors, fork=True, training=training)
        assert shortcut is not y
        assert shortcut.data_ptr() == y.data_ptr()
        assert shortcut.stride() == y.stride()


@pytest.mark.parametrize("saved", [0, 1])
def test_a_fork_notices_in_place_operations(saved):
    tensors, _ = example((2, 8, 3, 4), torch.float32)
    tensors["x"].requires_grad_()
    outputs = fused(tensors, fork=True)
    square = outputs[saved].square()
    outputs[1 - saved].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.usefixtures("_small_tiles")
def test_the_first_of_equal_taps_wins(training):
    assert_near_double(*example((1, 8, 7, 8), torch.float32, levels=3), training=training)


def test_what_rounds_to_one_value_does_not_tie():
    """In bfloat16 all of 256 to 257 is one value."""
    tensors, _ = example((1, 8, 3, 3), torch.float32)
    tensors["x"] = tensors["x"].zero_().bfloat16()
    tensors["x"][0, :, 2, 1] = 0.5
    tensors["weight"].fill_(1)
    tensors["bias"].fill_(256)
    tensors["running_mean"].fill_(0)
    tensors["running_var"].fill_(1)
    tensors["x"].requires_grad_()
    y = fused(tensors, training=False)
    y.sum().backward()
    assert (y == 256).all()
    assert (tensors["x"].grad[0, :, 2, 1] != 0).all()


@pytest.mark.usefixtures("_small_tiles")
def test_the_last_nan_wins():
    """In eval mode, where only its own pixel is NaN."""
    tensors, dy = example((1, 8, 7, 8), torch.float32)
    is_nan = torch.rand(tensors["x"].shape, generator=torch.Generator().manual_seed(2)) < 0.3
    tensors["x"][is_nan.to(DEVICE)] = torch.nan
    ours, theirs = (outcome(f, tensors, dy, training=False) for f in (fused, eager))
    for name in ("y", "dx", "dbias"):
        torch.testing.assert_close(ours[name], theirs[name], equal_nan=True, rtol=1e-5, atol=1e-5)


def test_nan_fills_its_channel_in_training():
    tensors, dy = example((2, 8, 5, 5), torch.float32)
    tensors["x"][0, 1, 2, 2] = torch.nan
    found = outcome(fused, tensors, dy)
    for name in ("y", "dx"):
        assert found[name][:, 1].isnan().all()
        assert found[name][:, [0, *range(2, 8)]].isfinite().all()


def test_a_closed_relu_blocks_infinity():
    tensors, dy = example((2, 8, 5, 6), torch.float32)
    tensors["bias"] -= 1
    closed = fused(tensors) <= 0
    assert closed.any()
    dy[closed] = torch.inf
    assert all(t.isfinite().all() for t in outcome(fused, tensors, dy).values())


def test_output_is_bit_for_bit_that_of_norm_and_pooling():
    tensors, _ = example((2, 8, 7, 6), torch.float16)
    norm = [tensors[n].clone() for n in NAMES]
    apart = F.max_pool2d(batch_norm_act(*norm, **OPTIONS), 3, 2, 1)
    counter = torch.tensor(3, device=DEVICE)
    inputs = {**tensors, "x": tensors["x"].contiguous()}  # copied
    assert torch.equal(fused(inputs, num_batches_tracked=counter), apart)  # without gradients
    assert counter == 4
    assert all(torch.equal(tensors[n], t) for n, t in zip(NAMES, norm, strict=True))


@pytest.mark.parametrize(
    ("wanted", "training", "unused"),
    [
        ("weight", True, (kernel, "_norm_pool_backward_kernel")),
        ("x", False, (kernel, "reduced")),
    ],
)
def test_one_gradient_alone_takes_one_kernel(wanted, training, unused, monkeypatch):
    tensors, dy = example((2, 8, 3, 4), torch.float32)
    expected = outcome(fused, tensors, dy, training=training)[f"d{wanted}"]
    monkeypatch.setattr(*unused, None)  # a call would be an error
    tensors[wanted].requires_grad_()
    fused(tensors, training=training).backward(dy.contiguous())
    assert torch.equal(tensors[wanted].grad.double().cpu(), expected)


def test_keeps_a_quarter_of_the_input_and_a_byte():
    tensors, _ = example((2, 16, 6, 8), torch.float16)
    for name in NAMES[:3]:
        tensors[name].requires_grad_()
    saved = []
    without = fused({n: t.detach().clone() for n, t in tensors.items()})
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fused(tensors)
    assert torch.equal(y, without)
    sizes = {(t.numel(), t.dtype) for t in saved if t.numel() > 4 * 32}
    of_windows = {(y.numel(), torch.float16), (y.numel(), torch.uint8)}
    assert sizes == of_windows | {(4 * y.numel(), torch.float16)}
    assert all(t.data_ptr() != y.data_ptr() for t in saved)


@pytest.mark.parametrize("fork", [False, True])
def test_a_second_derivative_says_what_to_do(fork):
    tensors, dy = example((2, 8, 3, 3), torch.float32)
    tensors["x"].requires_grad_()
    y = fused(tensors, fork=fork)
    y = y[1] if fork else y
    (dx,) = torch.autograd.grad(y, tensors["x"], dy, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiated twice.*train with unfused batch norm"):
        dx.square().sum().backward()


on_gpu = pytest.mark.skipif(IS_INTERPRETED, reason="needs a CUDA device")


def where_relu_is_clear(tensors, dy, num_groups):
    """dy, zero where float32 statistics may decide ReLU otherwise than double precision."""
    norm = [tensors[n].double() for n in NAMES]
    z = batch_norm_act_ref(*norm, True, 0.1, 1e-5, num_groups, False, None)
    return dy.masked_fill(F.max_pool2d(z, 3, 2, 1).abs() < 1e-5, 0.0)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("shape", "num_groups"), [((32, 64, 112, 112), 1), ((31, 64, 113, 111), 3)], ids=str
)
def test_sizes_of_a_network(shape, dtype, num_groups):
    tensors, dy = example(shape, dtype)
    dy = where_relu_is_clear(tensors, dy, num_groups)
    assert_near_double(tensors, dy, num_groups=num_groups)
    assert_near_double(tensors, (dy, dy / 2), num_groups=num_groups, fork=True)


@on_gpu
def test_never_waits_is_captured_and_equal_in_every_run():
    tensors, dy = example((31, 64, 56, 56), torch.bfloat16)
    inputs = [tensors[name].requires_grad_() for name in NAMES[:3]]
    expected = torch.autograd.grad(fused(tensors), inputs, dy)  # compiles, which may wait
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.autograd.grad(fused(tensors), inputs, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(fused(tensors), inputs, dy)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
