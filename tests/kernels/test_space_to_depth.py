"""The packed layout against its formula, and against the convolution that it is for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from freeadv_fast.kernels import space_to_depth as layout

SHAPES = [(2, 3, 8, 6), (1, 3, 7, 9), (2, 3, 6, 5), (1, 3, 1, 1), (0, 3, 8, 8)]


def packed_by_formula(x: torch.Tensor) -> torch.Tensor:
    """Pixel by pixel, as the layout's formula says."""
    num, _, height, width = x.shape
    packed = torch.zeros(num, 16, -(-height // 2) + 3, -(-width // 2) + 3, dtype=x.dtype)
    for row in range(height):
        for column in range(width):
            for colour in range(3):
                channel = 8 * (row % 2) + 3 * (column % 2) + colour
                value = x[:, colour, row, column]
                packed[:, channel, row // 2 + 2, column // 2 + 2] = value
    return packed


@pytest.mark.parametrize("shape", SHAPES)
def test_pack_follows_the_formula_and_unpack_undoes_it(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packed = layout.pack(x)
    assert packed.shape == layout.packed_shape(shape[0], *shape[2:])
    assert torch.equal(packed, packed_by_formula(x))
    assert packed.permute(0, 2, 3, 1).is_contiguous()
    plain = layout.unpack(packed + (packed == 0), *shape[2:])  # what is not a pixel does not matter
    assert torch.equal(plain, x)
    assert plain.permute(0, 2, 3, 1).is_contiguous()


def test_both_are_differentiable():
    x = torch.randn(1, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layout.pack, x)
    packed = layout.pack(x).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda u: layout.unpack(u, 5, 4), packed)


@pytest.mark.parametrize("size", [(12, 10), (11, 9)])
def test_a_strided_convolution_is_a_plain_one_on_it(size):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 7, 7, generator=generator, dtype=torch.float64)
    expected = F.conv2d(x, weight, stride=2, padding=3)
    packed = layout.pack(x.detach()).requires_grad_()
    # (o, c, i, dy, j, dx) of the kernel padded to 8x8, to (o, dy, dx, c, i, j).
    blocks = F.pad(weight, (1, 0, 1, 0)).view(4, 3, 4, 2, 4, 2).permute(0, 3, 5, 1, 2, 4)
    filled = F.pad(blocks.reshape(4, 2, 6, 4, 4), (0, 0, 0, 0, 0, 2)).flatten(1, 2)
    result = F.conv2d(packed, filled)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    slope = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    expected.backward(slope)
    result.backward(slope)
    torch.testing.assert_close(layout.unpack(packed.grad, *size), x.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 4, 16])
def test_refuses_what_is_not_of_three_channels(channels):
    with pytest.raises(RuntimeError, match=f"expected 3 channels, got {channels}"):
        layout.pack(torch.zeros(1, channels, 8, 8))


def test_refuses_offsets_beyond_int32():
    with pytest.raises(RuntimeError, match="too large for int32"):
        layout.check_packable(torch.Size((1, 24000, 24000, 3)))
    layout.check_packable(torch.Size((10_000, 4096, 4096, 3)))  # only one image must fit


@pytest.mark.parametrize("size", [(8, 9), (6, 11), (9, 11)])
def test_refuses_to_unpack_another_size(size):
    packed = layout.pack(torch.zeros(1, 3, 8, 11))
    with pytest.raises(RuntimeError, match=r"expected \(1, 16, .*got \(1, 16, 7, 9\)"):
        layout.unpack(packed, *size)


def test_what_is_packed():
    images = torch.Size((2, 8, 8, 3))
    assert layout.is_packed(torch.Size((2, 16, 7, 7)), images)
    assert not layout.is_packed(torch.Size((2, 3, 8, 8)), images)
    # Images of 16 channels have no packed layout: their gradient of 16 channels is plain.
    assert not layout.is_packed(torch.Size((2, 16, 7, 7)), torch.Size((2, 7, 7, 16)))
