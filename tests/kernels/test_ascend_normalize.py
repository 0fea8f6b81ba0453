"""ascend_normalize_ against its two ops one after the other, and inside a network's training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from freeadv_fast import ops
from freeadv_fast.kernels import ascend_normalize as kernel
from freeadv_fast.kernels.space_to_depth import pack

MEAN, STD = (0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.225, 0.25)
PLAIN = [(2, 8, 8, 3), (3, 11, 7, 3), (1, 5, 7, 1), (2, 9, 4, 4), (0, 8, 8, 3)]
PACKED = [(2, 8, 8, 3), (3, 11, 7, 3), (1, 6, 5, 3), (0, 8, 8, 3)]
LAYOUTS = [*((shape, False) for shape in PLAIN), *((shape, True) for shape in PACKED)]
STORAGES = [(torch.int8, 4.0), (torch.int8, 2.5), (torch.float32, 1.0), (torch.float16, 1.0)]


def example(shape, storage=torch.int8, dtype=torch.float32, unit=4.0, packed=False):
    """delta, x at it, a gradient with zeros and one NaN, images, mean, std and a counter."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(-40, 296, shape, generator=generator).clamp_(0, 255).to(torch.uint8)
    delta = torch.randint(-2, 3, shape, generator=generator).to(storage)
    if storage.is_floating_point:
        delta += torch.rand(shape, generator=generator).to(storage)
    mean, std = (torch.tensor(v[: shape[3]]) for v in (MEAN, STD))
    x = ops.perturb_normalize(
        images, delta, mean, std, unit=unit, dtype=dtype, space_to_depth=packed
    )
    grad = torch.randn(x.permute(0, 2, 3, 1).shape, generator=generator).to(dtype)
    grad[torch.rand(grad.shape, generator=generator) < 0.2] = 0
    if grad.numel():
        grad[-1, 2, 2, 0] = torch.nan
    return delta, x, grad.permute(0, 3, 1, 2), images, mean, std, torch.zeros(()).long()


@pytest.mark.parametrize(("shape", "packed"), LAYOUTS)
@pytest.mark.parametrize(("storage", "unit"), STORAGES, ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_equals_the_two_ops(shape, packed, storage, unit, dtype, monkeypatch):
    delta, x, grad, images, mean, std, nonfinite = example(shape, storage, dtype, unit, packed)
    sizes = {"step": unit, "eps": 2 * unit, "unit": unit}
    expected, count = delta.clone(), torch.zeros(()).long()
    ops.sign_ascent_(expected, grad, images, count, **sizes)
    expected_x = ops.perturb_normalize(
        images, expected, mean, std, unit=unit, dtype=dtype, space_to_depth=packed
    )
    address, before = x.data_ptr(), x.clone()
    monkeypatch.setattr(kernel, "CPU_CHUNK", images[:1].numel())  # an image at a time
    ops.ascend_normalize_(delta, x, grad, images, mean, std, nonfinite, **sizes)
    assert torch.equal(delta, expected)
    assert torch.equal(x, expected_x)
    assert x.data_ptr() == address
    assert nonfinite == count == min(len(images), 1)
    assert not len(images) or not torch.equal(x, before)


class Network(nn.Module):
    """A convolution, which saves its input, and a loss that depends on all of it."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3)

    def forward(self, x):
        return self.conv(x).relu().square().sum()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "implementation", [ops.ascend_normalize_, kernel.ascend_normalize_], ids=["ops", "custom_op"]
)
def test_a_leaf_lives_through_the_replays(packed, implementation):
    """One leaf, as in a CUDA graph, against a new one in each replay."""
    torch.manual_seed(2)
    delta, x, _, images, mean, std, nonfinite = example((2, 9, 8, 3), packed=packed)
    network = Network(x.shape[1])
    sizes = {"step": 4.0, "eps": 12.0, "unit": 4.0}
    expected = delta.clone()
    x.requires_grad_()
    for _ in range(3):
        fresh = ops.perturb_normalize(
            images, expected, mean, std, unit=4.0, space_to_depth=packed
        ).requires_grad_()
        assert torch.equal(x, fresh)
        network(fresh).backward()
        ops.sign_ascent_(expected, fresh.grad, images, nonfinite, **sizes)
        x.grad = None
        network(x).backward()
        assert torch.equal(x.grad, fresh.grad)
        implementation(delta, x, x.grad, images, mean, std, nonfinite, **sizes)
        assert x.is_leaf
        assert x.requires_grad
        assert torch.equal(delta, expected)
    assert (delta.abs() == 3).any()


@pytest.mark.parametrize(
    "implementation", [ops.ascend_normalize_, kernel.ascend_normalize_], ids=["ops", "custom_op"]
)
def test_a_backward_pass_that_is_not_over_is_refused(implementation):
    delta, x, grad, images, mean, std, nonfinite = example((2, 9, 8, 3))
    loss = Network(3)(x.requires_grad_())
    implementation(delta, x, grad, images, mean, std, nonfinite, step=4.0, eps=4.0, unit=4.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_border_and_padding_neither_count_nor_move():
    delta, x, grad, images, mean, std, nonfinite = example((1, 7, 5, 3), packed=True)
    is_value = pack(torch.ones(1, 3, 7, 5)) == 1
    grad = torch.where(is_value, 1.0, torch.nan).contiguous(memory_format=torch.channels_last)
    x[~is_value] = 7.0
    images.fill_(100)
    delta.zero_()
    ops.ascend_normalize_(delta, x, grad, images, mean, std, nonfinite, step=4.0, eps=4.0, unit=4.0)
    assert nonfinite == 0
    assert (delta == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 16, 7, 7)}, r"x: torch.float32 \(2, 16, 7, 7\).*is not as"),
        ({"x": torch.zeros(2, 3, 8, 8).half()}, "is not as its gradient"),
        ({"x": torch.zeros(2, 3, 8, 8)}, "channels_last"),
        ({"grad": torch.zeros(2, 16, 8, 8)}, r"expected \(2, 3, 8, 8\).*packed \(2, 16, 7, 7\)"),
        ({"images": torch.zeros(2, 8, 8, 3).half()}, "uint8"),
        ({"pixel_std": torch.ones(4)}, r"std: expected float32 \(3,\)"),
        ({"step": 2.0}, "unit = step"),
        ({"nonfinite": torch.zeros(2).long()}, "one int64"),
    ],
)
def test_refuses(change, message):
    delta, x, grad, images, mean, std, nonfinite = example((2, 8, 8, 3))
    arguments = {
        **{"delta": delta, "x": x, "grad": grad, "images": images, "nonfinite": nonfinite},
        **{"pixel_mean": mean, "pixel_std": std, "step": 4.0, "eps": 4.0, "unit": 4.0},
    }
    with pytest.raises(RuntimeError, match=message):
        ops.ascend_normalize_(**{**arguments, **change})


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    arguments = (*example((2, 5, 7, 3), packed=packed), 4.0, 8.0, 4.0)
    torch.library.opcheck(torch.ops.freeadv_fast.ascend_normalize_.default, arguments)
