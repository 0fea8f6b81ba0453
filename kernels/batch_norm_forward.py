"""y of batch norm (+ residual) (+ ReLU or leaky ReLU), by one kernel behind the statistics.

Formulas, bytes and numerics: batch_norm.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from freeadv_fast.kernels import batch_norm_statistics as statistics
from freeadv_fast.kernels.batch_norm_statistics import (
    Norm,
    Rows,
    coefficients_of_moments,
    group_rows,
    jit,
)

try:
    import triton.language as tl
except ImportError:  # torch builds without CUDA may come without Triton; the reference remains
    pass

# The elementwise kernels: a tile is two accesses of 16 bytes a thread, and each program has two
# tiles under way, so that 48 KB or more are on their way to an SM; at 4.3 TB/s an H200 gives it
# 33 KB a microsecond.
NUM_WARPS = 4
ACCESSES = 2
# Tiles per program: what they know of a channel is loaded once for all.
TILES = 4
# Where a kernel takes ReLU's mask from.
NO_MASK = 0
RECOMPUTED = 1
BITS = 2


class Mode(NamedTuple):
    """What is computed of a norm."""

    training: bool
    num_groups: int
    relu: bool
    negative_slope: float

    def rows(self, x: Tensor) -> Rows:
        """x as a matrix. In eval mode all images are one group."""
        num, channels, height, width = x.shape
        groups = self.num_groups if self.training else 1
        return Rows(num, height * width, groups, channels, x.element_size())

    def mask(self, bits: Tensor | None) -> int:
        """Where backward takes ReLU's mask from."""
        return NO_MASK if not self.relu else RECOMPUTED if bits is None else BITS


def elementwise(rows: Rows, accesses: int = ACCESSES) -> tuple[tuple[int, int], dict[str, int]]:
    """Programs of an elementwise kernel, and its constants and options."""
    tile_rows = rows.tile_rows(NUM_WARPS, accesses)
    per_column = -(-rows.largest_group // (TILES * tile_rows))
    options = {"BM": tile_rows, "BC": rows.columns, "TILES": TILES, "num_warps": NUM_WARPS}
    return (per_column * rows.column_blocks, rows.num_groups), options


@jit
def pack(is_closed, BM: tl.constexpr, BC: tl.constexpr):
    """[BM, BC] booleans, of what ReLU lets not through, to [BM, BC/8] bytes of what it does."""
    keep = tl.reshape(tl.where(is_closed, 0, 1), [BM, BC // 8, 8])
    return tl.sum(keep << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)


@jit
def unpack(bits, BM: tl.constexpr, BC: tl.constexpr):
    """[BM, BC/8] bytes to [BM, BC] booleans."""
    shifts = tl.arange(0, 8)[None, None, :]
    return tl.reshape((bits.to(tl.int32)[:, :, None] >> shifts) & 1, [BM, BC]) != 0


@jit
def leak(values, SLOPE: tl.constexpr):
    """What becomes of values where z <= 0. ReLU's zero is no product: 0 * inf is NaN."""
    if SLOPE == 0.0:
        return tl.zeros_like(values)
    else:
        return values * SLOPE


@jit
def _batch_norm_forward_kernel(
    y_ptr,  # [M, C] bf16 | fp16 | fp32, output
    bits_ptr,  # [M, C/8] u8, output: not z <= 0; unused without WRITE_BITS
    x_ptr,  # [M, C] like y
    residual_ptr,  # [M, C] like y; unused without HAS_RESIDUAL
    coefficients_ptr,  # [4, G, C] fp32: a, b, mean, rstd; output if there are moments
    running_mean_ptr,  # [C] fp32, updated in place; None without moments, as the next five
    running_var_ptr,  # [C] fp32, updated in place
    num_batches_ptr,  # [] i64, one is added
    moments_ptr,  # [2, G, C] fp32: mean, var
    weight_ptr,  # [C] fp32
    bias_ptr,  # [C] fp32
    num_images,  # N
    image_rows,  # H*W
    num_groups,  # G
    channels8,  # C/8
    momentum,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    SLOPE: tl.constexpr,
    WRITE_BITS: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    TILES: tl.constexpr,
):
    """TILES * BM rows of a group, BC columns of them."""
    C = channels8 * 8
    plane = num_groups.to(tl.int64) * C
    blocks = channels8 // (BC // 8)
    block = tl.program_id(0) % blocks
    group = tl.program_id(1)
    cols = block * BC + tl.arange(0, BC)
    rows = tl.arange(0, BM)
    first, count = group_rows(group, num_images, image_rows, num_groups)
    start = (tl.program_id(0) // blocks).to(tl.int64) * (TILES * BM)
    left = tl.minimum(count - start, TILES * BM).to(tl.int32)
    row = first + start
    if moments_ptr is None:
        known = coefficients_ptr + group.to(tl.int64) * C + cols
        a = tl.load(known)
        b = tl.load(known + plane)
    else:
        a, b = coefficients_of_moments(
            coefficients_ptr,
            running_mean_ptr,
            running_var_ptr,
            num_batches_ptr,
            moments_ptr,
            weight_ptr,
            bias_ptr,
            cols,
            group,
            start == 0,
            num_images,
            image_rows,
            num_groups,
            C,
            momentum,
            eps,
            BC,
        )
    a, b = a[None, :], b[None, :]
    at = rows[:, None] * C + cols[None, :]
    inside = (rows < left)[:, None]
    x = tl.load(x_ptr + row * C + at, mask=inside)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * C + at, mask=inside)
    for _ in tl.static_range(TILES):
        # The next tile's loads stand before this one's stores, which the compiler may not pass.
        # Behind the last tile nothing is left, and nothing is loaded.
        left -= BM
        is_next = (rows < left)[:, None]
        x_next = tl.load(x_ptr + (row + BM) * C + at, mask=is_next)
        z = tl.fma(x.to(tl.float32), a, b)
        if HAS_RESIDUAL:
            residual_next = tl.load(residual_ptr + (row + BM) * C + at, mask=is_next)
            z += residual.to(tl.float32)
            residual = residual_next
        if WRITE_BITS:
            at_bits = rows[:, None] * channels8 + (block * (BC // 8) + tl.arange(0, BC // 8))
            packed = pack(z <= 0.0, BM, BC)
            tl.store(bits_ptr + row * channels8 + at_bits, packed, mask=inside)
        if RELU and SLOPE == 0.0:  # one instruction
            z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        elif RELU:
            z = tl.where(z <= 0.0, leak(z, SLOPE), z)
        tl.store(y_ptr + row * C + at, z.to(y_ptr.dtype.element_ty), mask=inside)
        inside, x = is_next, x_next
        row += BM


def forward(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None,
    mode: Mode,
    wants_bits: bool,
    moments: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the coefficients, and ReLU's bits if wanted. x and residual are channels_last.

    Moments of x, where they are known, are those of the groups of a norm in training.
    """
    rows = mode.rows(x)
    grid, options = elementwise(rows)
    with torch.cuda.device_of(x):
        if moments is None:
            coefficients = statistics.coefficients(x, norm, rows, mode.training)
            vectors = (None,) * 6
        else:
            coefficients = moments.new_empty((4, rows.num_groups, rows.channels))
            running = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
            vectors = (*running, moments, norm.weight, norm.bias)
        y = torch.empty_like(x, memory_format=torch.channels_last)
        bits = x.new_empty(x.numel() // 8, dtype=torch.uint8) if wants_bits else None
        _batch_norm_forward_kernel[grid](
            y,
            y if bits is None else bits,
            x,
            x if residual is None else residual,
            coefficients,
            *vectors,
            *rows.shape,
            norm.momentum,
            norm.eps,
            HAS_RESIDUAL=residual is not None,
            RELU=mode.relu,
            SLOPE=mode.negative_slope,
            WRITE_BITS=wants_bits,
            **options,
        )
    return y, coefficients, bits
