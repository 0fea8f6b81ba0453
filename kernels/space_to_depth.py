"""Packed layout: blocks of 2x2 pixels of a colour image as channels.

    u[n, 8 * dy + 3 * dx + c, ho + 2, wo + 2] = x[n, c, 2 * ho + dy, 2 * wo + dx]

x: (N, 3, H, W). u: (N, 16, ceil(H / 2) + 3, ceil(W / 2) + 3), in channels_last memory. All else in
u is zero: channels 6, 7, 14 and 15, two rows above and one below, two columns to the left and one
to the right, and pixels beyond an odd H or W. A 7x7 convolution of stride 2 and padding 3 on x is
then a 4x4 convolution of stride 1 without padding on u (its weights padded to 8x8 by one row above
and one column to the left, and rearranged likewise): channels are aligned, and the input's gradient
becomes a plain convolution.

Only the network's input and its gradient live in this layout; `perturb_normalize`, `sign_ascent_`
and `ascend_normalize_` read and write it without a copy. Images and perturbations stay
(N, H, W, 3). A run is row dy of a packed pixel: 6 neighbours of the image's row, and in u 16
aligned bytes of half precision, the widest store there is. A thread takes whole runs, so that all
threads do the same work and zeros cost none. With the 4 zeros at the end, threads of 16 bytes would
hold 8 values and 4, and the same kernels issue 1.6 to 1.7 times the instructions on sm_90 (counted
in the machine code; no GPU timed it).
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


# Colours of an image, channels of a run and of a packed image: 2 * 3 filled up to 8, two runs.
COLOURS, RUN, CHANNELS = 3, 8, 16
# Rows above and below the image, and columns left and right of it.
BEFORE, AFTER = 2, 1
# Packed pixels of a kernel's tile: the 32 runs of 16 neighbours, for each of 4 warps. They divide
# images whose sides are multiples of 32; others need masks. Kernels, which may not read globals,
# repeat all these numbers.
TILE_ROWS, TILE_COLUMNS = 4, 16


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
    runs = pixels.reshape(num, rows, 2, columns, 2 * channels).transpose(2, 3)
    border = (BEFORE, AFTER)
    runs = F.pad(runs, (0, RUN - 2 * channels, 0, 0, *border, *border))
    return runs.flatten(3).permute(0, 3, 1, 2)


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
    inside = packed.permute(0, 2, 3, 1)[:, BEFORE:-AFTER, BEFORE:-AFTER]
    pixels = inside.unflatten(3, (2, RUN))[..., : 2 * COLOURS].transpose(2, 3)
    pixels = pixels.reshape(num, 2 * rows, 2 * columns, COLOURS)[:, :height, :width]
    return pixels.contiguous().permute(0, 3, 1, 2)


def num_blocks(height: int, width: int, tiles: int) -> int:
    """Programs that an image takes when each walks down `tiles` tiles."""
    rows, columns = (height + 1) // 2, (width + 1) // 2
    return math.ceil(rows / (TILE_ROWS * tiles)) * math.ceil(columns / TILE_COLUMNS)


@jit
def locate(block, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr):
    """Where a program's first tile of runs lies; the next is 4 packed rows further down.

    Args:
        block: Index of the program within its image.

    Returns:
        row: [128] of packed pixels, without the border.
        column: [128] likewise.
        dy: [128] row of the run within its packed pixel.
        source: [128] offset of the run's first value in the (H, W, 3) image.
        at: [128] its offset in the packed one.
    """
    COLUMNS: tl.constexpr = (WIDTH + 1) // 2
    ACROSS: tl.constexpr = (COLUMNS + 15) // 16
    run = tl.arange(0, 128)
    row = block // ACROSS * (4 * TILES) + run // 32
    column = block % ACROSS * 16 + run // 2 % 16
    dy = run % 2
    source = row * (6 * WIDTH) + dy * (3 * WIDTH) + column * 6
    at = (row + 2) * ((COLUMNS + 3) * 16) + (column + 2) * 16 + dy * 8
    return row, column, dy, source, at


@jit
def held(row, column, dy, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr):
    """What of a tile there is; see `locate`.

    Nothing is compared where the image's size answers it, so that no access needs a predicate.

    Returns:
        is_stored: [128], false beyond the last row or column of packed pixels.
        is_run: [128], false there and below the last row of an image of odd H.
        is_value: [128, 8], false there, in the last two channels and beyond an odd W.
    """
    is_stored = tl.full(row.shape, True, tl.int1)
    if (HEIGHT + 1) // 2 % (4 * TILES) != 0:
        is_stored &= row < (HEIGHT + 1) // 2
    if (WIDTH + 1) // 2 % 16 != 0:
        is_stored &= column < (WIDTH + 1) // 2
    is_run = is_stored
    if HEIGHT % 2 == 1:
        is_run &= row * 2 + dy < HEIGHT
    channel = tl.arange(0, 8)[None, :]
    is_value = is_run[:, None] & (channel < 6)
    if WIDTH % 2 == 1:
        is_value &= column[:, None] * 2 + channel // 3 < WIDTH
    return is_stored, is_run, is_value
