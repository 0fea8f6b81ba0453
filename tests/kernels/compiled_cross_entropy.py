"""Cross-entropy's kernels against double precision; run as compiled_kernels.py is."""

from __future__ import annotations

import pytest
import torch

from freeadv_fast.kernels import cross_entropy as kernel
from interpreted import DEVICE

SHAPES = [(5, 10), (3, 1000), (1, 2), (4, 1), (37, 33)]


def example(num, classes, scale=4.0):
    """Logits, labels of which some are found, and sums that others have counted into."""
    generator = torch.Generator().manual_seed(num)
    logits = scale * torch.randn(num, classes, generator=generator)
    labels = torch.randint(classes, (num,), generator=generator)
    labels[::2] = logits[::2].argmax(1)
    sums = torch.tensor([2.5, 3, 4, 1], dtype=torch.float64)
    return logits.to(DEVICE), labels.to(DEVICE), sums.to(DEVICE)


def outcome(function, logits, labels, sums, smoothing=0.0):
    """Loss, sums and the gradient of a multiple of the loss."""
    logits, sums = logits.clone().requires_grad_(), sums.clone()
    loss = function(logits, labels, sums, smoothing)
    (loss / 7).backward()
    return loss.detach(), sums, logits.grad


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_near_to_double_precision_as_torch(shape, smoothing):
    logits, labels, sums = example(*shape)
    ours = outcome(kernel.cross_entropy_sum_, logits, labels, sums, smoothing)
    theirs = outcome(kernel.cross_entropy_sum_ref_, logits, labels, sums, smoothing)
    exact = outcome(kernel.cross_entropy_sum_ref_, logits.double(), labels, sums, smoothing)
    for our, their, value in zip(ours, theirs, exact, strict=True):
        error, allowed = ((other - value).abs().max() for other in (our, their))
        assert error <= 2 * allowed + 1e-6 * value.abs().max()
    assert torch.equal(ours[1][1:], exact[1][1:])  # hits, images, non-finite losses


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_counted_apart(value):
    logits, labels, sums = example(6, 10)
    logits[2, 3] = value
    loss, counted, _ = outcome(kernel.cross_entropy_sum_, logits, labels, sums)
    assert not loss.isfinite()
    assert counted[[0, 2, 3]].tolist() == [2.5, 10, 2]


def test_an_impossible_label_makes_the_loss_nan():
    """Past the last class lie the padding and the next row."""
    for label in (-1, 10, 12):
        logits, labels, sums = example(3, 10)
        labels[1] = label
        assert kernel.cross_entropy_sum_(logits, labels, sums).isnan()
        assert kernel.cross_entropy_sum_(logits, labels, sums, 0.1).isnan()


def test_of_equal_logits_the_first_is_the_guess():
    logits, labels = torch.ones(3, 10, device=DEVICE), torch.tensor([0, 1, 9], device=DEVICE)
    sums = torch.zeros(4, dtype=torch.float64, device=DEVICE)
    kernel.cross_entropy_sum_(logits, labels, sums)
    assert sums[1] == 1


def test_large_logits_do_not_overflow():
    logits, labels, sums = example(4, 10, scale=1e4)
    loss, _, gradient = outcome(kernel.cross_entropy_sum_, logits, labels, sums, 0.1)
    assert loss.isfinite()
    assert gradient.abs().max() <= 1 / 7 + 1e-6
    loss, _, gradient = outcome(kernel.cross_entropy_sum_, logits, labels, sums)
    assert loss.isfinite()
    assert gradient.abs().max() <= 1 / 7 + 1e-6


def test_a_second_derivative_is_refused():
    logits, labels, sums = example(3, 10)
    loss = kernel.cross_entropy_sum_(logits.requires_grad_(), labels, sums)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.square().sum().backward()
