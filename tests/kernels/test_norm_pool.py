"""The door and reference of batch norm with ReLU and pooling: bit by bit what today's calls do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from freeadv_fast import ops
from freeadv_fast.kernels import norm_pool as kernel
from freeadv_fast.ops import dispatch, norms

OPTIONS = {"training": True, "momentum": 0.1, "eps": 1e-5}


def tensors(dtype=torch.float32, *, last=True):
    """Activations and a layer's parameters and running statistics."""
    torch.manual_seed(1)
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(7, 8, 5, 4).to(dtype, memory_format=layout)
    kind = dtype if dtype is torch.float64 else torch.float32
    vectors = [torch.randn(8, dtype=kind) for _ in range(3)]
    return [x, *vectors, torch.rand(8, dtype=kind) + 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("training", "num_groups"), [(True, 1), (True, 3), (False, 1)])
@pytest.mark.parametrize("last", [True, False])
def test_equals_batch_norm_act_and_pooling(dtype, training, num_groups, last):
    options = {**OPTIONS, "training": training, "num_groups": num_groups}
    results = []
    for is_fused in (True, False):
        norm = tensors(dtype, last=last)
        options["num_batches_tracked"] = counter = torch.tensor(3)
        wanted = [t.requires_grad_() for t in norm[:3]]
        if is_fused:
            y = ops.batch_norm_relu_pool(*norm, **options)
        else:
            y = F.max_pool2d(ops.batch_norm_act(*norm, **options), 3, 2, 1)
        assert y.shape == (7, 8, 3, 2)
        gradients = torch.autograd.grad(y.square().sum(), wanted)
        results.append([y.detach(), *gradients, *norm[3:], counter])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    reference = kernel.batch_norm_relu_pool_ref(
        *tensors(dtype, last=last), training, 0.1, 1e-5, num_groups
    )
    assert torch.equal(reference, results[0][0])
    assert reference.stride() == results[0][0].stride()


def test_a_fork_is_one_object():
    y, shortcut = ops.batch_norm_relu_pool(*tensors(), **OPTIONS, fork=True)
    assert y is shortcut
    assert torch.equal(y, ops.batch_norm_relu_pool(*tensors(), **OPTIONS))


class HostReads(TorchDispatchMode):
    """Counts reads of a tensor's value by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_host_reads_nothing():
    x, *norm = tensors()
    with HostReads() as reads:
        ops.batch_norm_relu_pool(x.requires_grad_(), *norm, **OPTIONS).sum().backward()
    assert reads.num == 0


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(4, 8), r"expected float \(N, C, H, W\)"),
        (1, torch.zeros(5), r"weight: expected \(8,\)"),
        (4, None, "both or neither"),
        (0, torch.zeros(1, 8, 1, 1), "two values a channel"),
    ],
)
@pytest.mark.parametrize("function", [ops.batch_norm_relu_pool, kernel.batch_norm_relu_pool])
def test_refuses(function, place, value, message):
    norm = tensors()
    norm[place] = value
    with pytest.raises(RuntimeError, match=message):
        function(*norm, **OPTIONS)


def test_a_gpu_runs_the_kernels_where_they_apply(monkeypatch):
    """Which function the door calls; the kernels themselves are tested elsewhere."""
    called = []
    monkeypatch.setattr(dispatch, "backend", lambda device: "triton")
    monkeypatch.setattr(kernel, "batch_norm_relu_pool", lambda *_, **given: called.append(given))
    monkeypatch.setattr(norms, "batch_norm_act", lambda x, *_, **given: x)
    options = {**OPTIONS, "num_groups": 2, "fork": True, "num_batches_tracked": None}
    ops.batch_norm_relu_pool(*tensors(), **options)
    assert called == [options]
    for norm in (tensors(last=False), tensors(torch.float64)):
        y, shortcut = ops.batch_norm_relu_pool(*norm, **options)
        assert y.shape == (7, 8, 3, 2)
        assert y is shortcut
    assert called == [options]
