"""The stem's convolution: its reference, its door, and three ops that are each other's derivatives.

What the kernels compute is told by compiled_stem_convolution.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from freeadv_fast import ops
from freeadv_fast.kernels import stem_convolution as kernel
from freeadv_fast.ops import dispatch


def example(dtype=torch.float64, out=2):
    """A packed input and weights, channels_last."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((1, 5, 6, 16), generator=generator, dtype=torch.float64)
    weight = torch.randn((out, 4, 4, 16), generator=generator, dtype=torch.float64)
    return [t.to(dtype).permute(0, 3, 1, 2).requires_grad_() for t in (x, weight)]


def test_first_and_second_derivatives():
    x, weight = example(out=1)
    assert torch.autograd.gradcheck(kernel.stem_convolution, (x, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(kernel.stem_convolution, (x, weight), fast_mode=True)


@pytest.mark.parametrize("op", ["stem_convolution", "stem_input_gradient", "stem_weight_gradient"])
def test_opcheck(op):
    x, weight = example(torch.float32)
    y = kernel.stem_convolution(x, weight).detach().requires_grad_()
    arguments = {
        "stem_convolution": (x, weight),
        "stem_input_gradient": (y, weight),
        "stem_weight_gradient": (x, y, torch.float32),
    }
    torch.library.opcheck(
        getattr(torch.ops.freeadv_fast, op).default,
        arguments[op],
        # What torch.compile does with them takes 18 s to try.
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_only_what_is_wanted_is_computed(monkeypatch):
    called = []
    for name in ("_input_gradient_op", "_weight_gradient_op"):
        op = getattr(kernel, name)
        monkeypatch.setattr(
            kernel, name, lambda *a, op=op, name=name: called.append(name) or op(*a)
        )
    x, weight = example()
    torch.autograd.grad(kernel.stem_convolution(x, weight).sum(), x)
    assert called == ["_input_gradient_op"]
    kernel.stem_convolution(x.detach(), weight).sum().backward()
    assert called == ["_input_gradient_op", "_weight_gradient_op"]
    kernel.stem_convolution(x, weight.detach()).sum().backward()
    assert called == ["_input_gradient_op", "_weight_gradient_op", "_input_gradient_op"]


def test_gradients_keep_layout_and_dtype_and_enter_grad_as_they_are():
    """The leaves' strides are the gradients': autograd would copy any other."""
    x, weight = example()
    x = x.detach().bfloat16().requires_grad_()
    weight = weight.detach().float().requires_grad_()
    y = kernel.stem_convolution(x, weight)
    assert y.dtype == torch.bfloat16
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y.backward(torch.ones_like(y))
    assert (x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    assert x.grad.stride() == x.stride()
    assert weight.grad.stride() == weight.stride()
    accumulated = [e for e in profile.events() if e.name == "torch::autograd::AccumulateGrad"]
    assert len(accumulated) == 2
    assert not any(child.name == "aten::copy_" for e in accumulated for child in e.cpu_children)


def on_a_gpu(monkeypatch, capability=(9, 0)):
    """Lets the door believe that there is a GPU; notes what reaches the kernels."""
    called = []
    monkeypatch.setattr(dispatch, "backend", lambda device: "triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(kernel, "stem_convolution", lambda *given: called.append(given))
    return called


def test_the_door_lets_in_what_fits(monkeypatch):
    called = on_a_gpu(monkeypatch)
    x, weight = example(torch.bfloat16, 16)
    ops.stem_convolution(x, weight)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    ops.stem_convolution(x, weight.detach().float())
    assert len(called) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w: (x.contiguous(), w),
        lambda x, w: (x.float(), w.float()),
        lambda x, w: (x[:0], w),
        lambda x, w: (x, w.repeat(3, 1, 1, 1)),
        lambda x, w: (x, w, torch.zeros(16, dtype=torch.bfloat16)),
        lambda x, w: (x[:, :8], w[:, :8]),
        lambda x, w: (x, w[..., :3]),
    ],
    ids=["layout", "float32", "empty", "48-channels", "bias", "8-channels", "3-columns"],
)
def test_the_door_keeps_out_what_does_not(change, monkeypatch):
    called = on_a_gpu(monkeypatch)
    given = change(*example(torch.bfloat16, 16))
    assert torch.equal(ops.stem_convolution(*given), F.conv2d(*given))
    assert not called


@pytest.mark.parametrize("obstacle", ["switched-off", "old-gpu"])
def test_the_door_is_shut(obstacle, monkeypatch):
    called = on_a_gpu(monkeypatch, (7, 5) if obstacle == "old-gpu" else (9, 0))
    if obstacle == "switched-off":
        monkeypatch.setattr(dispatch, "FAST_PATHS", dispatch.FAST_PATHS - {"stem"})
    given = example(torch.bfloat16, 16)
    assert torch.equal(ops.stem_convolution(*given), F.conv2d(*given))
    assert not called


@pytest.mark.parametrize("num_tasks", [1, 131, 132, 133, 50_176])
def test_every_task_is_somebodys(num_tasks, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(kernel, "_num_multiprocessors", lambda device: 132)
    tile = kernel.TILES[9].forward
    num_programs, share = kernel._shares(num_tasks, tile, torch.device("cuda"))
    assert (num_programs - 1) * share < num_tasks <= num_programs * share
    assert num_programs <= 132 * tile.per_sm
