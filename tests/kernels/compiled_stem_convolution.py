"""The stem's convolution against double precision; run as compiled_kernels.py is.

The interpreter multiplies the bits of bfloat16 instead of its values: float32 stands for it there.
"""

from __future__ import annotations

import pytest
import torch

from freeadv_fast import ops
from freeadv_fast.kernels import stem_convolution as kernel
from freeadv_fast.ops import dispatch
from interpreted import DEVICE, IS_INTERPRETED

on_the_device = pytest.mark.skipif(IS_INTERPRETED, reason="needs a CUDA device")
# (N, H, W, O): odd and even widths; shares that end within a block of columns, and the next begins.
SHAPES = [(2, 5, 14, 16), (1, 1, 1, 32), (3, 9, 5, 64)]
LARGE_SHAPES = [(3, 112, 112, 64), (7, 16, 17, 32), (2, 75, 64, 16), (1, 256, 2, 64)]
CASES = (
    list(zip(SHAPES, [torch.float16, torch.float16, torch.float32], strict=True))
    if IS_INTERPRETED
    else [(s, d) for s in SHAPES + LARGE_SHAPES for d in kernel.DTYPES]
)
cases = pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)


@pytest.fixture(autouse=True)
def _few_operations(monkeypatch):
    """The interpreter takes 1 ms for each."""
    if IS_INTERPRETED:
        monkeypatch.setattr(kernel, "MERGE_COLUMNS", 1024)


def example(shape, dtype, weight_dtype=torch.float32):
    """x, weights and a gradient of y; the weights rounded to `dtype` and in double precision."""
    num, height, width, out = shape
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((num, height + 3, width + 3, 16), generator=generator).to(DEVICE, dtype)
    weight = torch.randn((out, 4, 4, 16), generator=generator).to(DEVICE, weight_dtype)
    dy = torch.randn((num, height, width, out), generator=generator).to(DEVICE, dtype)
    return [t.permute(0, 3, 1, 2) for t in (x, weight, dy)]


def fill_memory(num_bytes):
    """Leaves NaN in memory that the allocator may hand out next."""
    torch.full((num_bytes // 4 + 1,), torch.nan, device=DEVICE)


def assert_rounded(result, expected, layout):
    """Rounded once from sums in float32, in memory as `layout` is, and all of it written."""
    eps = torch.finfo(result.dtype).eps
    assert result.stride() == layout.stride()
    torch.testing.assert_close(
        result.double(), expected, rtol=0.51 * eps, atol=1e-5 * float(expected.abs().max())
    )


@cases
def test_forward(shape, dtype):
    x, weight, dy = example(shape, dtype)
    expected = kernel.stem_convolution_ref(x.double(), weight.to(dtype).double())
    fill_memory(dy.nbytes)
    assert_rounded(kernel._forward(x, weight), expected, dy)


@cases
def test_input_gradient(shape, dtype):
    x, weight, dy = example(shape, dtype)
    expected = kernel.input_gradient_ref(dy.double(), weight.to(dtype).double())
    fill_memory(x.nbytes)
    assert_rounded(kernel._input_gradient(dy, weight), expected, x)


@cases
def test_weight_gradient(shape, dtype):
    x, weight, dy = example(shape, dtype)
    expected = kernel.weight_gradient_ref(x.double(), dy.double(), torch.float64)
    fill_memory(2**20)
    result = kernel._weight_gradient(x, dy, torch.float32)
    assert_rounded(result, expected, weight)
    if not IS_INTERPRETED:
        assert torch.equal(result, kernel._weight_gradient(x, dy, torch.float32))


@on_the_device
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_through_the_door_and_autograd(weight_dtype):
    x, weight, dy = example((4, 33, 30, 64), torch.bfloat16, weight_dtype)
    leaves = x.requires_grad_(), weight.requires_grad_()
    results = []
    for names in (set(), {"stem"}):
        with pytest.MonkeyPatch.context() as patch, torch.autocast("cuda", torch.bfloat16):
            patch.setattr(dispatch, "FAST_PATHS", names)
            y = ops.stem_convolution(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for eager, ours in zip(*results, strict=True):
        assert ours.dtype == eager.dtype
        scale = float(eager.abs().max())
        torch.testing.assert_close(ours, eager, rtol=2**-7, atol=2**-8 * scale)
    assert "_Convolution" in results[1][0].grad_fn.name()


@on_the_device
def test_a_step_is_captured_in_a_graph_and_never_waits():
    x, weight, dy = example((2, 16, 16, 64), torch.bfloat16)
    leaves = x.requires_grad_(), weight.requires_grad_()

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            return torch.autograd.grad(ops.stem_convolution(*leaves), leaves, dy)

    expected = step()  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
