"""Packed layout: blocks of 2x2 pixels of a colour image as channels.

    u[n, 6 * dy + 3 * dx + c, ho + 2, wo + 2] = x[n, c, 2 * ho + dy, 2 * wo + dx]

x: (N, 3, H, W). u: (N, 16, ceil(H / 2) + 3, ceil(W / 2) + 3), in channels_last memory. All else in
u is zero: channels 12 to 15, two rows above and one below, two columns to the left and one to the
right, and pixels beyond an odd H or W. A 7x7 convolution of stride 2 and padding 3 on x is then a
4x4 convolution of stride 1 without padding on u (its weights padded to 8x8 by one row above and one
column to the left, and rearranged likewise): channels are aligned, and the input's gradient becomes
a plain convolution.

Only the network's input and its gradient live in this layout; `perturb_normalize`, `sign_ascent_`
and `ascend_normalize_` read and write it without a copy. Images and perturbations stay
(N, H, W, 3). In memory, the 6 values of a pixel's row dy are 6 neighbours of the image's row.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # torch builds without CUDA may come without Triton; the reference remains

    def jit(kernel):
        """Leaves a kernel as it is; nothing launches it."""
        return kernel


# Colours of an image and channels of a packed one: 2 * 2 * 3, filled up to 32 bytes of bfloat16.
COLOURS, CHANNELS = 3, 16
# Rows above and below the image, and columns left and right of it.
BEFORE, AFTER = 2, 1


def packed_shape(num: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(N, 16, ceil(H / 2) + 3, ceil(W / 2) + 3)."""
    border = BEFORE + AFTER
    return num, CHANNELS, (height + 1) // 2 + border, (width + 1) // 2 + border


def check_packable(shape: torch.Size) -> None:
    """Refuses images that have no packed layout, or one whose offsets no int32 holds.

    Args:
        shape: (N, H, W, C) of the images.

    Raises:
        RuntimeError: C is not 3, or one packed image has 2^31 values or more.
    """
    num, height, width, channels = shape
    if channels != COLOURS:
        raise RuntimeError(f"space_to_depth: expected {COLOURS} channels, got {channels}")
    if math.prod(packed_shape(num, height, width)[1:]) >= 1 << 31:
        raise RuntimeError(f"space_to_depth: {height} x {width} is too large for int32 offsets")


def is_packed(shape: torch.Size, images_shape: torch.Size) -> bool:
    """Whether a network input or gradient of this shape holds (N, H, W, C) images packed."""
    num, height, width, channels = images_shape
    return channels == COLOURS and shape == packed_shape(num, height, width)


def pack(x: Tensor) -> Tensor:
    """The packed layout in plain PyTorch; differentiable.

    Args:
        x: (N, 3, H, W), any dtype and layout.

    Returns:
        (N, 16, ceil(H / 2) + 3, ceil(W / 2) + 3) in channels_last memory.

    Raises:
        RuntimeError: there are not three channels.
    """
    num, channels, height, width = x.shape
    check_packable(torch.Size((num, height, width, channels)))
    pixels = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, width % 2, 0, height % 2))
    rows, columns = (height + 1) // 2, (width + 1) // 2
    blocks = pixels.reshape(num, rows, 2, columns, 2 * channels).transpose(2, 3)
    blocks = blocks.reshape(num, rows, columns, 4 * channels)
    border = (BEFORE, AFTER)
    return F.pad(blocks, (0, CHANNELS - 4 * channels, *border, *border)).permute(0, 3, 1, 2)


def unpack(packed: Tensor, height: int, width: int) -> Tensor:
    """The image of a packed one, or its gradient; differentiable.

    Args:
        packed: (N, 16, ceil(H / 2) + 3, ceil(W / 2) + 3), any dtype and layout.
        height: H.
        width: W.

    Returns:
        (N, 3, H, W) in channels_last memory.

    Raises:
        RuntimeError: the shape is not that of packed (N, 3, H, W).
    """
    num = len(packed)
    if packed.shape != packed_shape(num, height, width):
        raise RuntimeError(
            f"unpack: expected {packed_shape(num, height, width)} for {height} x {width} pixels, "
            f"got {tuple(packed.shape)}"
        )
    rows, columns = (height + 1) // 2, (width + 1) // 2
    blocks = packed.permute(0, 2, 3, 1)[:, BEFORE:-AFTER, BEFORE:-AFTER, : 4 * COLOURS]
    pixels = blocks.reshape(num, rows, columns, 2, 2 * COLOURS).transpose(2, 3)
    pixels = pixels.reshape(num, 2 * rows, 2 * columns, COLOURS)[:, :height, :width]
    return pixels.contiguous().permute(0, 3, 1, 2)


@jit
def locate(pixel, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Where the values of packed pixels lie in the image.

    Sizes are constants, so that both divisions are multiplications and an even width is known:
    then pairs of values lie at even offsets, and are loaded and stored as two bytes.

    Args:
        pixel: [P] i32 indices into the ceil(H / 2) + 3 rows of ceil(W / 2) + 3 packed pixels.

    Returns:
        source: [P, 16] u32 offsets into the (H, W, 3) image.
        holds_pixel: [P, 1], false on the border and behind the last row.
        holds_value: [P, 16], false there, in padding channels and beyond an odd H or W.
    """
    ROWS: tl.constexpr = (HEIGHT + 1) // 2
    COLUMNS: tl.constexpr = (WIDTH + 1) // 2
    # Unsigned: what lies above or left of the image wraps around and is not below its size.
    pixel = pixel.to(tl.uint32)
    row = (pixel // (COLUMNS + 3) - 2)[:, None]
    column = (pixel % (COLUMNS + 3) - 2)[:, None]
    channel = tl.arange(0, 16).to(tl.uint32)[None, :]
    source = (row * (2 * WIDTH) + column * 2) * 3 + (channel // 6 * (3 * WIDTH) + channel % 6)
    holds_pixel = (row < ROWS) & (column < COLUMNS)
    holds_value = holds_pixel & (channel < 12)
    if HEIGHT % 2 == 1:
        holds_value &= row * 2 + channel // 6 < HEIGHT
    if WIDTH % 2 == 1:
        holds_value &= column * 2 + channel % 6 // 3 < WIDTH
    return source, holds_pixel, holds_value
