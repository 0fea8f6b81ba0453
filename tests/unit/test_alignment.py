"""The gradient alignment term: its value, its derivative, and gradients that are zero."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from freeadv_fast.config.presets import preset_lambda
from freeadv_fast.step.alignment import SMALLEST_GRADIENT, misalignment


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_is_one_minus_the_cosine(layout):
    g1, g2 = torch.randn(2, 5, 3, 4, 6).to(torch.float64)
    expected = 1 - F.cosine_similarity(g1.flatten(1), g2.flatten(1))
    found = misalignment(g1.to(memory_format=layout), g2.to(memory_format=layout))
    torch.testing.assert_close(found, expected)


def test_derivative():
    g1, g2 = torch.randn(2, 3, 2, 3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(misalignment, (g1.requires_grad_(), g2.requires_grad_()))


def test_nearly_aligned_gradients_keep_their_digits():
    g1 = torch.randn(4, 3, 8, 8)
    g2 = g1 + 1e-4 * torch.randn_like(g1)
    torch.testing.assert_close(
        misalignment(g1, g2), misalignment(g1.double(), g2.double()).float(), rtol=1e-3, atol=0
    )
    assert (misalignment(g1, g1) == 0).all()


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12])
def test_scale_does_not_matter(scale):
    g1, g2 = torch.randn(2, 4, 3, 5, 5)
    torch.testing.assert_close(misalignment(scale * g1, g2), misalignment(g1, g2))
    torch.testing.assert_close(misalignment(g1, scale * g2), misalignment(g1, g2))


@pytest.mark.parametrize("tiny", [0.0, 1e-40, SMALLEST_GRADIENT / 2])
@pytest.mark.parametrize("which", [0, 1])
def test_zero_gradients_contribute_nothing(tiny, which):
    gradients = list(torch.randn(2, 4, 3, 5, 5))
    gradients[which][1] = tiny
    gradients = [g.requires_grad_() for g in gradients]
    values = misalignment(*gradients)
    values.sum().backward()
    assert values[1] == 0
    for g in gradients:
        assert torch.isfinite(g.grad).all()
        assert (g.grad[1] == 0).all()
        assert (g.grad[0] != 0).any()


def test_all_zero_is_zero():
    g = torch.zeros(3, 3, 4, 4, requires_grad=True)
    value = misalignment(g.detach(), g).mean()
    value.backward()
    assert value == 0
    assert (g.grad == 0).all()


def test_half_precision_is_computed_in_float32():
    g1, g2 = torch.randn(2, 4, 3, 5, 5).half()
    found = misalignment(g1, g2)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, misalignment(g1.float(), g2.float()))


def test_saturated_loss_gives_no_nan(small_network):
    net = small_network().eval()  # in training mode batch norm lets images touch each other
    with torch.no_grad():
        net[-1].bias[0] = 1e4  # cross-entropy of label 0, and its gradient, are exactly 0
    x = torch.rand(4, 3, 8, 8, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 0])
    g1, g2 = (
        torch.autograd.grad(F.cross_entropy(net(x + shift), labels), x, create_graph=True)[0]
        for shift in (0, 0.03)
    )
    values = misalignment(g1.detach(), g2)
    values.mean().backward()
    assert (values[labels == 0] == 0).all()
    assert values[2] > 0
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("dataset", "eps", "expected"),
    [
        ("cifar10", 1, 0.027),
        ("cifar10", 8, 0.2),
        ("cifar10", 16, 2.0),
        ("svhn", 1, 1.657),
        ("svhn", 4, 1.976),
        ("svhn", 8, 2.5),
        ("svhn", 12, 3.162),
    ],
)
def test_presets_are_the_authors(dataset, eps, expected):
    assert preset_lambda(dataset, eps) == pytest.approx(expected, abs=6e-4)


def test_no_preset_for_other_data():
    with pytest.raises(KeyError):
        preset_lambda("imagenet", 4)
