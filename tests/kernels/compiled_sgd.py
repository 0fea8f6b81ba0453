"""The kernel of SGD with half-precision copies in double precision; as compiled_kernels.py is run.

Values in bfloat16 are compared on a GPU alone: the interpreter truncates where it should round.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from freeadv_fast.kernels import sgd as kernel
from freeadv_fast.models.half_weights import half_copy, state_of, use_half_weights
from freeadv_fast.ops import dispatch
from freeadv_fast.step.optim import build_sgd, is_capturable
from freeadv_fast.step.sgd import MasterSgd
from interpreted import DEVICE, IS_INTERPRETED

if IS_INTERPRETED:  # seconds instead of minutes
    kernel.TILES, kernel.CHUNK = 2, 2 * kernel.BLOCK
# Two chunks and a ragged one, one whole chunk, a kernel in channels_last, one value, none; a
# tensor without a gradient.
SHAPES = [(2, kernel.CHUNK + 5), (kernel.CHUNK,), (6, 3, 5, 5), (), (0,), (7,)]
HALVES = [torch.float16] if IS_INTERPRETED else [torch.float16, torch.bfloat16]


def example(half=torch.float16, offset=0, *, copied=(0, 2, 3, 5), grad=None):
    """Weights, gradients, momentum buffers and copies, each `offset` values behind a start."""
    random = torch.Generator().manual_seed(1)

    def draw(shape, dtype=torch.float32):
        memory = torch.randn(offset + torch.Size(shape).numel(), generator=random)
        memory = memory.to(DEVICE, dtype)
        if len(shape) == 4:
            n, c, h, w = shape
            return memory[offset:].view(n, h, w, c).permute(0, 3, 1, 2)
        return memory[offset:].view(shape)

    weights, buffers = ([draw(shape) for shape in SHAPES] for _ in range(2))
    dtypes = [(grad or half) if i in copied else torch.float32 for i in range(len(SHAPES))]
    grads = [draw(shape, dtype) for shape, dtype in zip(SHAPES, dtypes, strict=True)]
    copies = [draw(s, half) if i in copied else None for i, s in enumerate(SHAPES)]
    for weight, held in zip(weights, copies, strict=True):
        if held is not None:
            held.copy_(weight)
    grads[-1] = None
    return weights, grads, buffers, copies


def update(tensors, *, table=None, lr=0.1, momentum=0.9, weight_decay=1e-2, **verdict):
    table = table or kernel.Table(tensors[0])
    buffers = tensors[2] if momentum else [None] * len(tensors[0])
    numbers = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    verdict = {"grad_scale": None, "found_inf": None} | verdict
    kernel.sgd_(table, *tensors[:2], buffers, tensors[3], **numbers, **verdict)


def slow_update(weights, grads, buffers, *, lr=0.1, momentum=0.9, weight_decay=1e-2):
    """torch's own, in double precision."""
    params = [torch.nn.Parameter(w) for w in weights]
    optimizer = torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
    for param, grad, buffer in zip(params, grads, buffers, strict=True):
        param.grad = grad
        if momentum:
            optimizer.state[param]["momentum_buffer"] = buffer
    optimizer.step()


def doubled(tensors):
    """Copies in double precision, on the CPU, without those in half precision."""
    return [[t if t is None else t.cpu().double() for t in each] for each in tensors[:3]]


def assert_near(tensors, expected):
    """To a few roundings of float32; the copies are the weights, rounded."""
    for ours, theirs in zip(tensors[:3], expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            if a is not None:
                torch.testing.assert_close(a.cpu().double(), b, rtol=1e-6, atol=1e-6)
    for weight, held in zip(tensors[0], tensors[3], strict=True):
        assert held is None or torch.equal(held, weight.to(held.dtype))


def assert_same(tensors, others):
    for mine, theirs in zip(tensors, others, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(
    ("rule", "offset"),
    [({}, 0), ({}, 1), ({"momentum": 0.0}, 0), ({"weight_decay": 0.0}, 0)],
    ids=str,
)
def test_two_updates(half, rule, offset):
    """The second on gradients at other addresses."""
    tensors = example(half, offset)
    expected, table = doubled(tensors), kernel.Table(tensors[0])
    versions = [weight._version for weight in tensors[0]]
    for _ in range(2):
        update(tensors, table=table, **rule)
        slow_update(*expected, **rule)
        for each in (tensors, expected):
            each[1][:] = [g if g is None else g.clone() * -0.5 for g in each[1]]
    assert_near(tensors, expected)
    assert torch.equal(tensors[0][-1], example(half, offset)[0][-1])
    assert [weight._version for weight in tensors[0]] == [v + 2 for v in versions]


@pytest.mark.parametrize("options", [{"copied": ()}, {"grad": torch.float32}], ids=str)
def test_float32_gradients(options):
    """Without copies, as in a group of vectors that are not decayed; and with them."""
    tensors = example(**options)
    expected = doubled(tensors)
    update(tensors)
    slow_update(*expected)
    assert_near(tensors, expected)


def test_the_rate_is_read_on_the_device():
    tensors, others = example(), example()
    update(tensors, lr=torch.full((), 0.3, device=DEVICE))
    update(others, lr=0.3)
    assert_same(tensors, others)
    assert not torch.equal(tensors[0][0], example()[0][0])


def test_the_scaler():
    """Gradients are divided by the scale; after an overflow nothing changes."""
    tensors, others, before = example(), example(), example()
    zero = torch.zeros((), device=DEVICE)
    scaled = [g if g is None else g * 64 for g in tensors[1]]
    tensors = (tensors[0], scaled, *tensors[2:])
    update(tensors, grad_scale=zero + 64, found_inf=zero + 1)
    for each in (0, 2, 3):
        assert_same(tensors[each : each + 1], before[each : each + 1])
    update(tensors, grad_scale=zero + 64, found_inf=zero)
    update(others)
    for each in (0, 2, 3):
        assert_same(tensors[each : each + 1], others[each : each + 1])


def test_gradients_in_another_order_are_copied_and_of_two_types_refused():
    tensors, others = example(), example()
    others[1][2] = others[1][2].contiguous()
    assert others[1][2].stride() != tensors[1][2].stride()
    update(tensors)
    update(others)
    assert torch.equal(tensors[0][2], others[0][2])
    others[1][0] = others[1][0].float()
    with pytest.raises(RuntimeError, match=r"sgd: gradients \{.*\} of weights with copies"):
        update(others)


def test_an_optimizer_steps_by_it(monkeypatch):
    """Two groups under fp16's scaler: an overflow, then an update as torch makes it."""
    monkeypatch.setattr(dispatch, "backend", lambda device: "triton")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2))
    network = network.to(DEVICE).to(memory_format=torch.channels_last)
    rule = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "decay": "kernels"}
    theirs = copy.deepcopy(network).cpu().double()
    reference = build_sgd(theirs, **rule)
    use_half_weights(network, torch.float16)
    optimizer = build_sgd(network, **rule)
    assert type(optimizer) is MasterSgd
    assert is_capturable(optimizer)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=256.0)
    scaler.scale(torch.ones((), device=DEVICE))  # makes the scaler's tensors
    before = copy.deepcopy(network.state_dict())
    for overflow in (True, False, False):
        for param, other in zip(network.parameters(), theirs.parameters(), strict=True):
            param.grad = torch.randn_like(param).to(param.grad_dtype)
            other.grad = param.grad.cpu().double() / scaler.get_scale()
        if overflow:
            network[0].weight.grad[0, 0, 0, 0] = torch.inf
        else:
            reference.step()
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert all(torch.equal(v, before[key]) for key, v in network.state_dict().items())
    for param, other in zip(network.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(param.cpu().double(), other, rtol=1e-6, atol=1e-6)
        held = half_copy(param)
        assert held is None or torch.equal(held.tensor, param.detach().half())
        assert held is None or held.made_of == state_of(param)


@pytest.mark.skipif(IS_INTERPRETED, reason="needs a CUDA device")
def test_a_graph_reads_the_rate_and_its_own_gradients():
    """Replays are updates, also after others in between that found gradients elsewhere."""
    tensors, others = example(), example()
    table, other_table = kernel.Table(tensors[0]), kernel.Table(others[0])
    rate = torch.full((), 0.1, device=DEVICE)
    update(tensors, table=table, lr=rate)  # compiles
    update(others, table=other_table, lr=rate)
    elsewhere = tensors[1][0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update(tensors, table=table, lr=rate)
    for lr in (0.2, 0.05):
        rate.fill_(lr)
        graph.replay()
        update((tensors[0], [elsewhere, *tensors[1][1:]], *tensors[2:]), table=table, lr=rate)
        for _ in range(2):
            update(others, table=other_table, lr=rate)
    assert_same(tensors, others)
