"""A block's sum, its moments, and the norm that is told them; run as compiled_kernels.py is."""

from __future__ import annotations

import pytest
import torch

from compiled_batch_norm import (
    IS_INTERPRETED,
    NAMES,
    SHALLOW,
    SHAPES,
    assert_near_double,
    eager,
    example,
    outcome,
    two_gradients,
)
from freeadv_fast.kernels import batch_norm, block_sum
from freeadv_fast.kernels import batch_norm_statistics as statistics

if IS_INTERPRETED:
    block_sum.SUM = SHALLOW


def counted(tensors):
    """A norm, and the number of its minibatches."""
    counter = torch.zeros((), dtype=torch.int64, device=tensors["x"].device)
    return statistics.Norm(*[tensors[name] for name in NAMES[1:5]], counter, 0.1, 1e-5)


def summed(tensors, *, num_groups=1, fork=False, **options):
    """The sum by its kernel, then its norm, told the moments: the two sides of a block's border."""
    x, norm = tensors["x"], counted(tensors)
    y, moments = block_sum.block_sum(x, tensors["residual"], num_groups)
    options |= {"num_groups": num_groups, "moments": moments, "training": True}
    if fork:
        output = batch_norm.shared_norm_act(y, norm, **options)
    else:
        output = batch_norm.batch_norm_act(
            y, *norm[:4], **options, momentum=0.1, eps=1e-5, num_batches_tracked=norm[4]
        )
    assert norm.num_batches_tracked == 1
    return output


def summed_eager(tensors, *, fork=False, **options):
    """PyTorch's own operations."""
    y = tensors["x"] + tensors["residual"]
    output = eager({**tensors, "x": y, "residual": None}, **options)
    return (output, y) if fork else output


@pytest.mark.parametrize("dtype", statistics.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sum_is_pytorchs_and_its_moments_those_of_the_rounded_sum(shape, dtype):
    tensors, _ = example(shape, dtype)
    both = tensors["x"], tensors["residual"]
    for num_groups in {1, min(2, len(both[0]))}:
        y, moments = block_sum.block_sum(*both, num_groups)
        exact, _ = block_sum.block_sum_ref(*both, num_groups)
        if IS_INTERPRETED and dtype is torch.bfloat16:  # which truncates
            torch.testing.assert_close(y, exact, rtol=2**-7, atol=0)
        else:
            assert torch.equal(y, exact)
        _, wanted = block_sum.block_sum_ref(y.double(), torch.zeros_like(y.double()), num_groups)
        torch.testing.assert_close(moments.double(), wanted, rtol=1e-5, atol=1e-5)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert not moments.requires_grad


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((3, 32, 9, 11), torch.float16, {}),
        ((2, 96, 3, 3), torch.float32, {}),
        ((2, 24, 5, 5), torch.float16, {"negative_slope": 0.1}),
        ((5, 8, 3, 3), torch.float16, {"num_groups": 2}),
        ((7, 8, 3, 3), torch.float32, {"num_groups": 3, "negative_slope": 0.1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("fork", [False, True])
def test_a_norm_that_is_told_its_inputs_moments(shape, dtype, options, fork):
    tensors, dy = example(shape, dtype)
    gradients = two_gradients(tensors, dy) if fork else dy
    options = {"fork": fork, **options}
    assert_near_double(tensors, gradients, function=summed, reference=summed_eager, **options)


@pytest.mark.parametrize(("depth", "turn", "num_groups"), [(4, 4, 1), (2, 1, 2)])
def test_number_of_chunks_does_not_show(depth, turn, num_groups, monkeypatch):
    tensors, _ = example((3, 16, 19, 17), torch.float32)
    schedule = statistics.Schedule(8, num_warps=1, per_sm=10, depth=depth, turn=turn)
    monkeypatch.setattr(block_sum, "SUM", schedule)
    monkeypatch.setattr(statistics, "num_multiprocessors", lambda device: 1)
    monkeypatch.setattr(statistics, "MERGE_LOADS", depth)
    both = tensors["x"], tensors["residual"]
    y, moments = block_sum.block_sum(*both, num_groups)
    wanted = block_sum.block_sum_ref(*both, num_groups)
    assert torch.equal(y, wanted[0])
    torch.testing.assert_close(moments, wanted[1])


def test_a_large_mean_costs_no_digits():
    tensors, _ = example((3, 32, 9, 11), torch.float32, mean=1000.0)
    y, moments = block_sum.block_sum(tensors["x"], tensors["residual"], 1)
    wanted = y.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(moments[1, 0].double(), wanted, rtol=1e-4, atol=0)


def test_moments_do_not_change_what_a_norm_makes():
    """Of the same sum, beside a norm that takes its statistics itself: to rounding of the last."""
    tensors, dy = example((4, 16, 6, 5), torch.float32)
    told = outcome(summed, tensors, dy)

    def untold(tensors):
        y, _ = block_sum.block_sum(tensors["x"], tensors["residual"], 1)
        return batch_norm.batch_norm_act(
            y, *[tensors[n] for n in NAMES[1:5]], training=True, momentum=0.1, eps=1e-5
        )

    for name, value in outcome(untold, tensors, dy).items():
        torch.testing.assert_close(told[name], value, rtol=1e-5, atol=1e-5)


def test_without_gradients_running_statistics_move_once():
    tensors, _ = example((4, 16, 6, 5), torch.float32)
    wanted = {name: tensors[name].clone() for name in NAMES}
    summed_eager(wanted)
    with torch.no_grad():
        summed(tensors, fork=True)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(tensors[name], wanted[name])


def test_a_gradient_is_both_summands_and_may_be_differentiated_again():
    tensors, dy = example((2, 8, 3, 3), torch.float32)
    both = [tensors[name].requires_grad_() for name in ("x", "residual")]
    y, _ = block_sum.block_sum(*both, 1)
    gradients = torch.autograd.grad(y.pow(3).sum(), both, create_graph=True)
    assert torch.equal(gradients[0], gradients[1])
    (second,) = torch.autograd.grad(gradients[0].sum(), both[:1])
    torch.testing.assert_close(second, 6 * y)


def test_any_layout():
    tensors, _ = example((2, 16, 5, 5), torch.float32)
    both = tensors["x"], tensors["residual"]
    last = block_sum.block_sum(*both, 2)
    first = block_sum.block_sum(both[0].contiguous(), both[1], 2)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(last, first, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: (x, x[:1], 1),
        lambda x: (x, x.half(), 1),
        lambda x: (x[:, :4], x[:, :4], 1),
        lambda x: (x[:0], x[:0], 1),
        lambda x: (x, x, 3),
        lambda x: (x.double(), x.double(), 1),
    ],
)
def test_refuses(change):
    x = example((2, 8, 3, 3), torch.float32)[0]["x"]
    with pytest.raises(RuntimeError, match="expected two activations of one shape"):
        block_sum.block_sum(*change(x))


def test_moments_of_something_else_are_refused():
    tensors, _ = example((4, 8, 3, 3), torch.float32)
    _, moments = block_sum.block_sum(tensors["x"], tensors["residual"], 2)
    norm, options = counted(tensors), {"moments": moments}
    for wrong in ({"num_groups": 1, "training": True}, {"num_groups": 2, "training": False}):
        with pytest.raises(RuntimeError, match=r"moments of x .*: expected \(2, [12], 8\)"):
            batch_norm.shared_norm_act(tensors["x"], norm, **wrong, **options)
