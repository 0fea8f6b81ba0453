"""The kernels of layer-wise adaptive rates in double precision; run as compiled_kernels.py is."""

from __future__ import annotations

import pytest
import torch

from freeadv_fast.kernels import lalr as kernel
from freeadv_fast.kernels import multi_tensor
from interpreted import DEVICE, IS_INTERPRETED

if IS_INTERPRETED:  # seconds instead of minutes
    kernel.TILES, kernel.CHUNK = 2, 2 * kernel.BLOCK
# Two chunks and a ragged one, one whole chunk, a kernel in channels_last, one value, none; a
# tensor without a gradient.
SHAPES = [(2, kernel.CHUNK + 5), (kernel.CHUNK,), (6, 3, 5, 5), (), (0,), (7,)]
RULE = {"beta": 0.9, "weight_decay": 1e-2, "min_norm": 0.0, "max_norm": 10.0}


def example(shapes=SHAPES, offset=0):
    """Parameters, gradients and moments, each `offset` values behind an allocation's start."""
    random = torch.Generator().manual_seed(1)

    def draw(shape):
        memory = torch.randn(offset + torch.Size(shape).numel(), generator=random).to(DEVICE)
        if len(shape) == 4:
            n, c, h, w = shape
            return memory[offset:].view(n, h, w, c).permute(0, 3, 1, 2)
        return memory[offset:].view(shape)

    params, grads, exp_avgs = ([draw(shape) for shape in shapes] for _ in range(3))
    exp_avg_sqs = [draw(shape).square_() for shape in shapes]
    grads[-1] = None
    return params, grads, exp_avgs, exp_avg_sqs


def doubled(tensors):
    """Copies in double precision, on the CPU."""
    return [[t if t is None else t.cpu().double() for t in each] for each in tensors]


def slow_update(params, grads, exp_avgs, exp_avg_sqs, *, lr, exempt=False, **rule):
    """The formula in double precision, tensor by tensor, in place."""
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        if g is None:
            continue
        m.copy_(rule["beta"] * m + (1 - rule["beta"]) * g)
        v.copy_(0.999 * v + 0.001 * g * g)
        u = m / (v.sqrt() + 1e-6) + rule["weight_decay"] * p
        length = min(max(float(p.norm()), rule["min_norm"]), rule["max_norm"])
        u_length = float(u.norm())
        is_adaptive = length > 0 and u_length > 0 and not (exempt and p.ndim < 2)
        p -= lr * (length / u_length if is_adaptive else 1.0) * u


def assert_near(tensors, expected):
    """To a few roundings of float32; what has no values or no gradient as it was."""
    for ours, theirs in zip(tensors, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            if a is not None:
                torch.testing.assert_close(a.cpu().double(), b, rtol=3e-6, atol=1e-6)


def update(tensors, *, table=None, lr=0.1, exempt=False, grad_scale=None, found_inf=None, **rule):
    table = table or kernel.Table(tensors[0], exempt)
    verdict = {"grad_scale": grad_scale, "found_inf": found_inf}
    kernel.lalr_(table, *tensors, lr=lr, **(RULE | rule), **verdict)


@pytest.mark.parametrize(
    ("rule", "exempt", "offset"),
    [
        ({}, False, 0),
        ({}, False, 1),
        ({"min_norm": 5.0, "max_norm": 20.0}, False, 0),
        ({"max_norm": 0.5}, True, 0),
        ({"weight_decay": 0.0}, False, 0),
    ],
    ids=str,
)
def test_two_updates(rule, exempt, offset):
    """The second on gradients at other addresses; the moments are as they should be, too."""
    tensors = example(offset=offset)
    expected, table = doubled(tensors), kernel.Table(tensors[0], exempt)
    for _ in range(2):
        update(tensors, table=table, lr=0.1, **rule)
        slow_update(*expected, lr=0.1, exempt=exempt, **(RULE | rule))
        for each in (tensors, expected):
            each[1][:] = [g if g is None else g.clone() * -0.7 for g in each[1]]
    assert_near(tensors, expected)
    assert torch.equal(tensors[0][-1], example(offset=offset)[0][-1])
    assert tensors[0][0]._version == example(offset=offset)[0][0]._version + 2


def test_the_rate_is_read_on_the_device():
    tensors, others = example(), example()
    update(tensors, lr=torch.full((), 0.3, device=DEVICE))
    update(others, lr=0.3)
    for ours, theirs in zip(tensors[0], others[0], strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(tensors[0][0], example()[0][0])


def test_zero_norms():
    """A tensor of zeros moves at lr itself, as one whose direction is zero does: not at all."""
    tensors = example([(3, 4), (5,), (2, 2), (1,)])
    tensors[0][0].zero_()
    for each in (*tensors[:1], tensors[2]):
        each[1].zero_()
    tensors[1][1].zero_()
    expected = doubled(tensors)
    update(tensors)
    slow_update(*expected, lr=0.1, **RULE)
    assert_near(tensors, expected)
    assert not tensors[0][1].any()
    assert tensors[0][0].abs().min() > 0


def test_the_scaler():
    """Gradients are divided by the scale; after an overflow nothing changes."""
    tensors, others, before = example(), example(), example()
    zero = torch.zeros((), device=DEVICE)
    scaled = [g if g is None else g * 1024 for g in tensors[1]]
    tensors = (tensors[0], scaled, *tensors[2:])
    update(tensors, grad_scale=zero + 1024, found_inf=zero + 1)
    for each in (0, 2, 3):
        assert all(map(torch.equal, tensors[each], before[each]))
    update(tensors, grad_scale=zero + 1024, found_inf=zero)
    update(others)
    for each in (0, 2, 3):
        assert all(map(torch.equal, tensors[each], others[each]))


def test_gradients_in_another_order_are_copied():
    tensors, others = example(), example()
    others[1][2] = others[1][2].contiguous()
    assert others[1][2].stride() != tensors[1][2].stride()
    update(tensors)
    update(others)
    assert torch.equal(tensors[0][2], others[0][2])


def test_more_addresses_than_one_launch_writes(monkeypatch):
    """24 of them by 16: all arrive."""
    monkeypatch.setattr(multi_tensor, "NUM_WRITTEN", 16)
    tensors = example()
    expected = doubled(tensors)
    update(tensors)
    slow_update(*expected, lr=0.1, **RULE)
    assert_near(tensors, expected)


def test_addresses_are_written_when_they_change(monkeypatch):
    """Once for tensors that stay, again for a new gradient."""
    writes, write = [], multi_tensor._write
    monkeypatch.setattr(multi_tensor, "_write", lambda *a: writes.append(a[1]) or write(*a))
    tensors = example()
    table = kernel.Table(tensors[0], False)
    for _ in range(3):
        update(tensors, table=table)
    assert len(writes) == 1
    tensors[1][0] = tensors[1][0].clone()
    update(tensors, table=table)
    assert len(writes) == 2


def test_a_recording_has_addresses_of_its_own(monkeypatch):
    """It fills its table whenever it runs, and leaves alone what other updates know of theirs."""
    tensors, others = example(), example()
    table = kernel.Table(tensors[0], False)
    update(tensors, table=table)
    held = table._addresses.clone()
    tensors[1][0] = tensors[1][0].clone()
    writes, write = [], multi_tensor._write
    monkeypatch.setattr(multi_tensor, "_write", lambda *a: writes.append(a[0]) or write(*a))
    with monkeypatch.context() as recording:
        recording.setattr(multi_tensor, "_is_recorded", lambda tensor: True)
        update(tensors, table=table)
    assert len(writes) == 1
    assert torch.equal(table._addresses, held)
    assert not torch.equal(writes[0], held)
    for _ in range(2):
        update(others)
    assert all(map(torch.equal, tensors[0], others[0]))


@pytest.mark.skipif(IS_INTERPRETED, reason="needs a CUDA device")
def test_a_graph_reads_the_rate_and_its_own_gradients():
    """Replays are updates, also after others in between that found gradients elsewhere."""
    tensors, others = example(), example()
    table, other_table = kernel.Table(tensors[0], False), kernel.Table(others[0], False)
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
    assert all(map(torch.equal, tensors[0], others[0]))
