"""The mean over pixels: PyTorch's bits, and a gradient that lies in memory as the input does."""

from __future__ import annotations

import pytest
import torch

from freeadv_fast import ops
from freeadv_fast.kernels import global_average as kernel
from freeadv_fast.ops import dispatch

FORMATS = [torch.channels_last, torch.contiguous_format]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_has_the_bits_of_the_mean(dtype, memory_format, device):
    torch.manual_seed(0)
    x = torch.randn(3, 16, 7, 5, device=device).to(dtype).to(memory_format=memory_format)
    dy, results = torch.randn(3, 16, device=device).to(dtype), []
    for function in (kernel.global_average, kernel.global_average_ref):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        results.append([y.detach(), *torch.autograd.grad(y, leaf, dy)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    assert results[0][1].is_contiguous(memory_format=memory_format)
    assert results[0][1].dtype is dtype


def test_the_gradient_of_a_view_is_dense():
    """Every second image, and a spread out pixel: neither is contiguous."""
    for view in (torch.randn(4, 8, 3, 3)[::2], torch.randn(2, 8, 1, 1).expand(2, 8, 3, 3)):
        x = view.detach().requires_grad_()
        (dx,) = torch.autograd.grad(kernel.global_average(x).sum(), x)
        assert dx.is_contiguous()
        torch.testing.assert_close(dx, torch.full((2, 8, 3, 3), 1 / 9))


def test_differentiates_twice():
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    dy = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def cubes(rows):
        return kernel.global_average(rows) ** 3

    assert torch.autograd.gradcheck(cubes, x.requires_grad_())
    assert torch.autograd.gradgradcheck(cubes, x, dy)


def test_keeps_nothing_for_its_gradient():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kernel.global_average(torch.randn(2, 3, 4, 4, requires_grad=True))
    assert saved == []


def test_a_gpu_runs_it_unless_it_is_taken_out(monkeypatch):
    calls, x = [], torch.randn(2, 3, 4, 4)
    monkeypatch.setattr(kernel, "global_average", lambda x: calls.append(1) or x.mean((2, 3)))
    assert torch.equal(ops.global_average(x), x.mean(dim=(2, 3)))
    assert calls == []
    monkeypatch.setattr(dispatch, "backend", lambda device: "triton")
    assert torch.equal(ops.global_average(x), x.mean(dim=(2, 3)))
    assert calls == [1]
    monkeypatch.setattr(dispatch, "FAST_PATHS", dispatch.FAST_PATHS - {"global-average"})
    ops.global_average(x)
    assert calls == [1]
