"""The kernel of averaged weights in double precision; as compiled_kernels.py is run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from freeadv_fast.kernels import averaging as kernel
from freeadv_fast.ops import dispatch
from freeadv_fast.step.averaging import WeightAverage
from interpreted import DEVICE, IS_INTERPRETED

if IS_INTERPRETED:  # seconds instead of minutes
    kernel.TILES, kernel.CHUNK = 2, 2 * kernel.BLOCK
# Two chunks and a ragged one, one whole chunk, a kernel in channels_last, one value, none.
SHAPES = [(2, kernel.CHUNK + 5), (kernel.CHUNK,), (6, 3, 5, 5), (), (0,)]
# On both sides of the half way, and all of it.
SHARES = [1.0, 0.5003, 0.3, 0.0005]


def example(offset=0):
    """Averages and weights, each `offset` values behind a start."""
    random = torch.Generator().manual_seed(1)

    def draw(shape):
        memory = torch.randn(offset + torch.Size(shape).numel(), generator=random).to(DEVICE)
        if len(shape) == 4:
            n, c, h, w = shape
            return memory[offset:].view(n, h, w, c).permute(0, 3, 1, 2)
        return memory[offset:].view(shape)

    return [draw(shape) for shape in SHAPES], [draw(shape) for shape in SHAPES]


def assert_near(averages, expected):
    for ours, theirs in zip(averages, expected, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("offset", [0, 1])
def test_updates(offset):
    """The share is read on the device; weights move, and are at other addresses at times."""
    averages, weights = example(offset)
    expected = [a.cpu().double() for a in averages]
    table, share = kernel.Table(averages), torch.zeros((), device=DEVICE)
    for number, value in enumerate(SHARES):
        if number == 2:
            weights = [w.clone() * -0.5 for w in weights]
        kernel.average_(table, averages, weights, share.fill_(value))
        for a, w in zip(expected, weights, strict=True):
            a += value * (w.cpu().double() - a)
        if value == 1.0:
            assert all(torch.equal(a, w) for a, w in zip(averages, weights, strict=True))
        assert_near(averages, expected)
    assert [a._version for a in averages] == [len(SHARES)] * len(SHAPES)


def test_it_is_the_reference():
    """Which takes the share as a number, or as a tensor."""
    for value in SHARES:
        results = []
        for form in (value, torch.tensor(value, device=DEVICE)):
            averages, weights = example()
            kernel.average_ref_(averages, weights, form)
            results.append(averages)
            averages, weights = example()
            kernel.average_(kernel.Table(averages), averages, weights, form)
            results.append(averages)
        for averages in results[1:]:
            assert_near(averages, [a.cpu().double() for a in results[0]])


def test_weights_in_another_order_are_copied():
    (averages, weights), (others, _) = example(), example()
    reordered = [w.contiguous() for w in weights]
    assert reordered[2].stride() != averages[2].stride()
    kernel.average_(kernel.Table(averages), averages, weights, 0.3)
    kernel.average_(kernel.Table(others), others, reordered, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(averages, others, strict=True))


def test_a_network_is_averaged_by_it(monkeypatch):
    monkeypatch.setattr(dispatch, "backend", lambda device: "triton")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(DEVICE)
    network.to(memory_format=torch.channels_last)
    average = WeightAverage(network, 0.5)
    assert average._table is not None
    for _ in range(2):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(2)
        average.begin_update()
        average.update()
    weight = network[0].weight.detach()
    expected = (weight + 0.5 * weight / 2) / 1.5
    torch.testing.assert_close(average.state_dict()["model"]["0.weight"], expected)


@pytest.mark.skipif(IS_INTERPRETED, reason="needs a CUDA device")
def test_a_graph_reads_the_share():
    """Replays are updates with the share of their own."""
    (averages, weights), (others, _) = example(), example()
    table, other_table = kernel.Table(averages), kernel.Table(others)
    share = torch.full((), 0.3, device=DEVICE)
    for each, of_each in ((averages, table), (others, other_table)):
        kernel.average_(of_each, each, weights, share)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.average_(table, averages, weights, share)
    for value in (0.2, 0.7):
        share.fill_(value)
        weights[0].mul_(0.9)
        graph.replay()
        kernel.average_(other_table, others, weights, share)
    assert all(torch.equal(a, b) for a, b in zip(averages, others, strict=True))
