"""Convolutions and the norms behind them against double precision; run as compiled_kernels.py is.

The interpreter multiplies the bits of bfloat16 instead of its values: float32 and float16 stand for
it there.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from freeadv_fast.kernels import batch_norm, joined_norms
from freeadv_fast.kernels import product_norm as kernel
from freeadv_fast.kernels.batch_norm_statistics import Norm
from freeadv_fast.kernels.product_norm import Product
from interpreted import DEVICE, IS_INTERPRETED

# (N, H, W, K, K of the projection or 0, C); rows end within a tile. Interpreted, 32 columns are two
# tiles, as 256 are on a GPU.
SHAPES = [(2, 5, 7, 16, 0, 64), (3, 4, 5, 32, 16, 96)]
LARGE_SHAPES = [
    (3, 56, 56, 64, 64, 256),
    (5, 28, 28, 128, 0, 512),
    (5, 14, 14, 256, 0, 1024),
    (1, 3, 5, 64, 0, 256),
    (64, 56, 56, 64, 0, 256),
]
DTYPES = [torch.float32, torch.float16] if IS_INTERPRETED else [torch.bfloat16]
CASES = [(s, d) for s in SHAPES + (LARGE_SHAPES if not IS_INTERPRETED else []) for d in DTYPES]
cases = pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
SMALL, DTYPE = (2, 4, 5, 16, 0, 32), torch.float32 if IS_INTERPRETED else torch.bfloat16


def normal(*shape, dtype=torch.float32):
    """(N, H, W, C) random values, as (N, C, H, W)."""
    return torch.randn(shape, device=DEVICE).to(dtype).permute(0, 3, 1, 2)


def make_product(num, height, width, narrow, wide, dtype):
    """What a ReLU lets through, weights, and a norm in use; leaves that want gradients."""
    x = normal(num, height, width, narrow, dtype=dtype).relu()
    w = normal(wide, 1, 1, narrow) / narrow**0.5
    weight, bias = torch.rand(wide, device=DEVICE) + 0.5, torch.randn(wide, device=DEVICE)
    running = torch.rand(2, wide, device=DEVICE).unbind()
    counter = torch.tensor(3, device=DEVICE)
    leaves = [x, w.to(dtype), weight, bias]
    x, w, weight, bias = (leaf.detach().requires_grad_() for leaf in leaves)
    return Product(x, w, Norm(weight, bias, *running, counter, 0.1, 1e-5))


def example(shape, dtype):
    """A product, its shortcut, and the gradients of both outputs, which have a mean."""
    torch.manual_seed(1)
    num, height, width, narrow, projected, wide = shape
    product = make_product(num, height, width, narrow, wide, dtype)
    shortcut = normal(num, height, width, wide, dtype=dtype).requires_grad_()
    if projected:
        shortcut = make_product(num, height, width, projected, wide, dtype)
    dys = [(normal(num, height, width, wide) + 0.5).to(dtype) for _ in range(2)]
    return product, shortcut, dys


def leaves_of(*given):
    """All that has a gradient."""
    leaves = []
    for one in given:
        own = [one]
        if isinstance(one, Product):
            own = [one.x, one.w, one.norm.weight, one.norm.bias]
        leaves += own
    return leaves


def in_double(one):
    """The same in double precision, with statistics of its own."""
    if not isinstance(one, Product):
        return one.detach().double().requires_grad_()
    x, w, norm = one
    x, w, weight, bias = (
        t.detach().double().requires_grad_() for t in (x, w, norm.weight, norm.bias)
    )
    running = (norm.running_mean.double(), norm.running_var.double())
    counter = norm.num_batches_tracked.clone()
    return Product(x, w, Norm(weight, bias, *running, counter, *norm[5:]))


def gradients(outputs, leaves, dys):
    """Of all leaves, by both outputs' readers."""
    return torch.autograd.grad(list(outputs), leaves, dys)


def error(result, expected):
    """Relative, of the whole tensor."""
    result, expected = result.detach().double(), expected.detach()
    return float((result - expected).norm() / expected.norm())


def by_batch_norm(product, shortcut):
    """What the other kernels make of it, forked."""

    def given(one):
        return F.conv2d(one.x, one.w), one.norm

    y, norm = given(product)
    if isinstance(shortcut, Product):
        return joined_norms.joined_norms(y, norm, *given(shortcut), fork=True)
    numbers = {"momentum": norm.momentum, "eps": norm.eps, "fork": True}
    return batch_norm.batch_norm_act(y, *norm[:4], training=True, residual=shortcut, **numbers)


@cases
def test_output_statistics_and_gradients(shape, dtype):
    product, shortcut, dys = example(shape, dtype)
    exact, exact_shortcut = in_double(product), in_double(shortcut)
    outputs = kernel.product_norm(product, shortcut, fork=True)
    found = gradients(outputs, leaves_of(product, shortcut), dys)
    expected = kernel.product_norm_ref(exact, exact_shortcut)
    wanted = gradients(
        [expected], leaves_of(exact, exact_shortcut), [dys[0].double() + dys[1].double()]
    )
    # Rounded inputs and gradients; ReLU's gradient turns over where z is rounded past zero.
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 5e-2}[dtype]
    assert outputs[0].data_ptr() == outputs[1].data_ptr()
    assert outputs[0].is_contiguous(memory_format=torch.channels_last)
    assert error(outputs[0], expected) < tolerance
    for result, leaf, value in zip(found, leaves_of(product, shortcut), wanted, strict=True):
        assert (result.shape, result.dtype) == (leaf.shape, leaf.dtype)
        assert error(result, value) < tolerance
    for one, other in ((product, exact), (shortcut, exact_shortcut)):
        if isinstance(one, Product):
            # Of the product before it is rounded.
            torch.testing.assert_close(one.norm.running_mean.double(), other.norm.running_mean)
            torch.testing.assert_close(one.norm.running_var.double(), other.norm.running_var)
            assert one.norm.num_batches_tracked == 4


@pytest.mark.skipif(IS_INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(16, 56, 56, 64, 0, 256), (8, 28, 28, 128, 64, 512)], ids=str)
def test_errors_are_those_of_the_other_kernels(shape):
    """In bfloat16, where most of the error is rounding that both have."""
    errors = []
    for run in (lambda *given: kernel.product_norm(*given, fork=True), by_batch_norm):
        product, shortcut, dys = example(shape, torch.bfloat16)
        exact, exact_shortcut = in_double(product), in_double(shortcut)
        found = gradients(run(product, shortcut), leaves_of(product, shortcut), dys)
        expected = kernel.product_norm_ref(exact, exact_shortcut)
        total = dys[0].double() + dys[1].double()
        wanted = gradients([expected], leaves_of(exact, exact_shortcut), [total])
        errors.append([error(*pair) for pair in zip(found, wanted, strict=True)])
    for here, there in zip(*errors, strict=True):
        assert here < 1.1 * there + 1e-4


def test_the_mean_of_dx_is_kept():
    """Of dy it is zero, whatever dz's: what is rounded must not bring one back to dx."""
    dtype = torch.float16 if IS_INTERPRETED else torch.bfloat16
    product, shortcut, dys = example((4, 8, 8, 32, 0, 128), dtype)
    dx, *_ = gradients(kernel.product_norm(product, shortcut, fork=True), [product.x], dys)
    share = dx.double().sum((0, 2, 3)).abs() / dx.double().abs().sum((0, 2, 3))
    # 256 values a channel, each rounded by itself: 2^-9 / sqrt(256) = 1.2e-4 in bfloat16.
    assert float(share.max()) < torch.finfo(dtype).eps / 8


def test_one_reader_or_none():
    product, shortcut, dys = example(SMALL, DTYPE)
    both = kernel.product_norm(product, shortcut, fork=True)
    leaves = leaves_of(product, shortcut)
    first = torch.autograd.grad(both[0], leaves, dys[0], retain_graph=True)
    second = torch.autograd.grad(both[1], leaves, dys[0], retain_graph=True)
    alone = torch.autograd.grad(
        kernel.product_norm(product, shortcut), leaves, dys[0], retain_graph=True
    )
    for here, there, other in zip(first, second, alone, strict=True):
        assert torch.equal(here, there)
        assert torch.equal(here, other)


def test_only_what_is_wanted_is_returned():
    product, shortcut, dys = example(SMALL, DTYPE)
    fixed = Product(product.x, product.w.detach(), product.norm._replace(weight=None, bias=None))
    z = kernel.product_norm(fixed, shortcut)
    dx, ds = torch.autograd.grad(z, [fixed.x, shortcut], dys[0])
    ones = product.norm._replace(
        weight=torch.ones_like(product.norm.weight), bias=torch.zeros_like(product.norm.bias)
    )
    like = kernel.product_norm(product._replace(norm=ones), shortcut)
    assert torch.equal(z, like)
    for result, expected in zip(
        (dx, ds), torch.autograd.grad(like, [product.x, shortcut], dys[0]), strict=True
    ):
        assert torch.equal(result, expected)


def test_all_runs_give_the_same_bits():
    results = []
    for _ in range(2):
        product, shortcut, dys = example(CASES[1][0], DTYPE)
        outputs = kernel.product_norm(product, shortcut, fork=True)
        found = gradients(outputs, leaves_of(product, shortcut), dys)
        results.append([*outputs, *found, product.norm.running_var])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_second_derivative_is_an_error():
    product, shortcut, dys = example(SMALL, DTYPE)
    z = kernel.product_norm(product, shortcut)
    (dx,) = torch.autograd.grad(z, product.x, dys[0].requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="unfused batch norm"):
        dx.float().sum().backward()


def test_shapes_that_disagree_are_refused():
    product, shortcut, _ = example(SMALL, DTYPE)
    with pytest.raises(RuntimeError, match="residual"):
        kernel.product_norm(product, shortcut[:1])
    other, *_ = example((2, 4, 5, 16, 0, 64), DTYPE)
    with pytest.raises(RuntimeError, match="shortcut: expected"):
        kernel.product_norm(product, other)
    alone, shortcut, _ = example((1, 1, 1, 16, 0, 32), DTYPE)
    with pytest.raises(RuntimeError, match="two values"):
        kernel.product_norm(alone, shortcut)
