"""Mean and variance of what a 1x1 convolution makes, found in its narrow input, for batch norm.

x is a matrix [M, K] with M = images * H * W, w the weights [N, K], y = x w^T, N several times K.

    mean = w E[x],   M var_o = w_o . u_o        u = w C, C [K, K] the sum of x x^T, both centred
    a    = weight / sqrt(var + eps),  b = bias - mean * a,  rstd = 1 / sqrt(var + eps)
    running_* <- (1 - momentum) * running_* + momentum * (mean, unbiased variance)

batch_norm_statistics.py reads y, N columns; here x is read, K of them, once for each block of
columns. Three kernels: programs' sums of x and of x x^T on tensor cores, their sum, and the rest. u
is kept for the weights' gradient (product_norm.py).

An H200, 256 images, 64 to 256 channels at 56 px: 42 us, where statistics of y take 104
(bench/results/h200/trials/product-norm.log).

Numerics: float32 sums of exact products of x's values; y is not rounded, and the statistics are of
just that. x is not shifted: behind a ReLU its mean and deviation are of one size, and five digits
of the variance remain where the mean is ten times the deviation. Sums have a fixed order.

Source: Ioffe & Szegedy, "Batch Normalization", 2015.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from freeadv_fast.kernels.batch_norm_statistics import Norm, num_multiprocessors

# Arguments that kernels are not compiled anew for.
SIZES = ("num_rows", "share", "num_programs", "channels8")

try:
    import triton
    import triton.language as tl

    jit = triton.jit(do_not_specialize=SIZES)
except ImportError:  # torch builds without CUDA may come without Triton; the reference remains

    def jit(kernel):
        """Leaves a kernel as it is; nothing launches it."""
        return kernel


# Columns of y that a program takes; rows of programs' sums that one adds up at once.
CHANNELS, ADDED = 16, 64


class Tile(NamedTuple):
    """How one product is launched.

    Attributes:
        rows: Of a tile: at least 64 for Hopper's warp groups.
        columns: Of a tile, at most.
        num_warps: Of a program.
        num_stages: Tiles whose loads are under way, that at hand included.
        per_sm: Programs of an SM at once, where programs share all rows.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    per_sm: int = 0

    @property
    def options(self) -> dict[str, int]:
        """The kernel's rows and the compiler's options."""
        return {"BM": self.rows, "num_warps": self.num_warps, "num_stages": self.num_stages}


# By major compute capability and K; that of the smallest K serves smaller ones. Measured on an H200
# (bench/results/h200/trials/product-norm.log); Ampere's fit into its shared memory.
TILES = {
    9: {64: Tile(256, 64, 4, 3, 2), 128: Tile(256, 128, 8, 3, 1), 256: Tile(128, 128, 8, 3, 1)},
    8: {64: Tile(128, 64, 4, 3, 2), 128: Tile(64, 128, 8, 3, 2), 256: Tile(64, 128, 8, 3, 1)},
}
# For the interpreter.
SMALL = Tile(32, 16, 4, 1, 3)


@jit
def _moments_kernel(
    partial_ptr,  # [P, PAIRS * BK * BK + K] fp32, output: sums of products and of columns
    x_ptr,  # [M, K] bf16 | fp16 | fp32
    num_rows,  # M
    share,  # rows of a program, a multiple of BM
    K: tl.constexpr,
    BK: tl.constexpr,
    PAIRS: tl.constexpr,
    BM: tl.constexpr,
):
    """A share of the rows; a pair of blocks of BK columns of x: (0, 0), (0, 1), (1, 1)."""
    pair = tl.program_id(1)
    rows = tl.arange(0, BM)
    columns = tl.arange(0, BK)
    first = tl.program_id(0).to(tl.int64) * share
    left = tl.minimum(num_rows - first, share).to(tl.int32)
    left_ptr = x_ptr + (first + rows)[:, None] * K + (pair // 2 * BK + columns)[None, :]
    right_ptr = x_ptr + (first + rows)[:, None] * K + ((pair + 1) // 2 * BK + columns)[None, :]
    products = tl.zeros([BK, BK], tl.float32)
    sums = tl.zeros([BK], tl.float32)
    for done in range(0, left, BM):
        inside = (rows < left - done)[:, None]
        x = tl.load(left_ptr + done * K, mask=inside, other=0.0)
        other = x
        if PAIRS > 1:
            other = tl.load(right_ptr + done * K, mask=inside, other=0.0)
        products = tl.dot(tl.trans(x), other, products)
        sums += tl.sum(x.to(tl.float32), 0)
    partial_ptr += tl.program_id(0).to(tl.int64) * (PAIRS * BK * BK + K)
    at = columns[:, None] * BK + columns[None, :]
    tl.store(partial_ptr + pair * (BK * BK) + at, products)
    if pair != 1:
        tl.store(partial_ptr + PAIRS * BK * BK + pair // 2 * BK + columns, sums)


@jit
def _merge_kernel(
    gram_ptr,  # [K, K] fp32, output: sum of x x^T
    sums_ptr,  # [K] fp32, output
    partial_ptr,  # [P, PAIRS * BK * BK + K] fp32
    num_programs,  # P
    K: tl.constexpr,
    BK: tl.constexpr,
    PAIRS: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
):
    """The sums of all programs, in their order, of BN of their values."""
    SIZE: tl.constexpr = PAIRS * BK * BK
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    program = tl.arange(0, BP)
    total = tl.zeros([BP, BN], tl.float32)
    for done in range(0, num_programs, BP):
        inside = (done + program < num_programs)[:, None] & (at < SIZE + K)[None, :]
        offsets = (done + program)[:, None] * (SIZE + K) + at[None, :]
        total += tl.load(partial_ptr + offsets, mask=inside, other=0.0)
    values = tl.sum(total, 0)
    pair = at // (BK * BK)
    row = pair // 2 * BK + at % (BK * BK) // BK
    column = (pair + 1) // 2 * BK + at % BK
    tl.store(gram_ptr + row * K + column, values, mask=at < SIZE)
    if PAIRS > 1:
        tl.store(gram_ptr + column * K + row, values, mask=pair == 1)
    tl.store(sums_ptr + at - SIZE, values, mask=(at >= SIZE) & (at < SIZE + K))


@jit
def _coefficients_kernel(
    coefficients_ptr,  # [4, 1, N] fp32, output: a, b, mean, rstd
    spread_ptr,  # [N, K] fp32, output: u
    running_mean_ptr,  # [N] fp32, updated in place; or None
    running_var_ptr,  # [N] fp32, updated in place; or None
    num_batches_ptr,  # [] i64, one is added; or None
    w_ptr,  # [N, K] bf16 | fp16 | fp32
    gram_ptr,  # [K, K] fp32
    sums_ptr,  # [K] fp32
    weight_ptr,  # [N] fp32; or None
    bias_ptr,  # [N] fp32; or None
    num_rows,  # M
    channels8,  # N / 8
    momentum,
    eps,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """BN columns of y."""
    N = channels8 * 8
    k = tl.arange(0, K)
    some = tl.arange(0, BK)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    w = tl.load(w_ptr + cols[:, None] * K + k[None, :]).to(tl.float32)
    sums = tl.load(sums_ptr + k)
    total = num_rows.to(tl.float32)
    mean = tl.div_rn(tl.sum(w * sums[None, :], 1), total)
    spread = tl.zeros([BN, K], tl.float32)
    for done in range(0, K, BK):
        part = tl.load(w_ptr + cols[:, None] * K + (done + some)[None, :]).to(tl.float32)
        gram = tl.load(gram_ptr + (done + some)[:, None] * K + k[None, :])
        spread = tl.dot(part, gram, spread, input_precision="tf32x3")
    spread -= mean[:, None] * sums[None, :]
    tl.store(spread_ptr + cols[:, None] * K + k[None, :], spread)
    # Rounding may leave a constant column a hair below zero.
    squared = tl.maximum(tl.sum(w * spread, 1), 0.0, propagate_nan=tl.PropagateNan.ALL)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squared, total) + eps))
    a = rstd
    if weight_ptr is not None:
        a *= tl.load(weight_ptr + cols)
    b = -mean * a
    if bias_ptr is not None:
        b += tl.load(bias_ptr + cols)
    tl.store(coefficients_ptr + cols, a)
    tl.store(coefficients_ptr + N + cols, b)
    tl.store(coefficients_ptr + 2 * N + cols, mean)
    tl.store(coefficients_ptr + 3 * N + cols, rstd)
    if running_mean_ptr is not None:
        running_mean = tl.load(running_mean_ptr + cols)
        tl.store(running_mean_ptr + cols, (1.0 - momentum) * running_mean + momentum * mean)
        running_var = tl.load(running_var_ptr + cols)
        unbiased = tl.div_rn(squared, total - 1.0)
        tl.store(running_var_ptr + cols, (1.0 - momentum) * running_var + momentum * unbiased)
    if num_batches_ptr is not None:
        if tl.program_id(0) == 0:
            tl.store(num_batches_ptr, tl.load(num_batches_ptr) + 1)


def rows_of(t: Tensor) -> Tensor:
    """A channels_last tensor's memory as a matrix of pixels and channels."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.size(1))


def tile_of(tiles: dict[int, dict[int, Tile]], narrow: int, device: torch.device) -> Tile:
    """The tile for K columns on a device."""
    if device.type != "cuda":
        return SMALL
    return tiles[torch.cuda.get_device_capability(device)[0]][max(narrow, min(tiles[9]))]


class Moments(NamedTuple):
    """What is known of x and y before y is met."""

    coefficients: Tensor  # (4, 1, N) float32: a, b, mean, rstd
    spread: Tensor  # (N, K) float32: u
    sums: Tensor  # (K,) float32, of x


def find_moments(x: Tensor, w: Tensor, norm: Norm) -> Moments:
    """Of x, channels_last, and the weights; updates the running statistics."""
    rows, (wide, narrow) = rows_of(x), w.shape[:2]
    num_rows, tile = len(rows), tile_of(TILES, narrow, x.device)
    block = min(narrow, max(tile.columns, narrow // 2))  # one block of columns, or two
    pairs = 1 if block == narrow else 3
    num_tiles = triton.cdiv(num_rows, tile.rows)
    wanted = max(tile.per_sm * num_multiprocessors(x.device) // pairs, 1)
    share = triton.cdiv(num_tiles, min(wanted, num_tiles)) * tile.rows
    num_programs, size = triton.cdiv(num_rows, share), pairs * block * block + narrow
    partial = x.new_empty((num_programs, size), dtype=torch.float32)
    shapes = (narrow, narrow), (narrow,), (wide, narrow), (4, 1, wide)
    gram, sums, spread, coefficients = (partial.new_empty(shape) for shape in shapes)
    constants = {"K": narrow, "BK": block, "PAIRS": pairs}
    _moments_kernel[(num_programs, pairs)](
        partial, rows, num_rows, share, **constants, **tile.options
    )
    _merge_kernel[(triton.cdiv(size, 32),)](
        gram, sums, partial, num_programs, **constants, BP=ADDED, BN=32
    )
    _coefficients_kernel[(wide // CHANNELS,)](
        coefficients,
        spread,
        norm.running_mean,
        norm.running_var,
        norm.num_batches_tracked,
        w,
        gram,
        sums,
        norm.weight,
        norm.bias,
        num_rows,
        wide // 8,
        norm.momentum,
        norm.eps,
        K=narrow,
        BN=CHANNELS,
        BK=min(narrow, 32),
        num_warps=max(4, narrow // 32),
    )
    return Moments(coefficients, spread, sums)
