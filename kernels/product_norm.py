"""1x1 convolutions that widen, their batch norms, the sum and ReLU: a bottleneck block's end.

Activations are rows of matrices: x [M, K] goes in, s [M, N] is the shortcut, M = images * H * W.

    y  = x w^T,   z = relu(a * y + b + s)       a = weight * rstd, b = bias - mean * a
    dz = dy where not z <= 0, else 0            ds = dz

What is wide costs: N is 4 K in a ResNet. Batch norm by itself reads y for its statistics, again to
normalise it and twice in backward, where it writes y's gradient besides. But y is a product, and
what is asked about it can be asked of its narrow factor:

    mean, rstd, u                               product_moments.py, from the second moments of x
    p    = sum of x dz^T, x centred, [N, K]
    dbias = sum(dz),  dweight_o = rstd_o * (w_o . p_o)
    dy   = a * (dz - dbias / M) + k1 * (y - mean),       k1 = -a * rstd * dweight / M
    dw_o = sum of x * dy_o = a_o * p_o + k1_o * u_o
    dx   = dy w = dz (a w) + x (w^T k1 w) + c,           c = -(dbias / M) (a w) - E[x] (w^T k1 w)

so that a and b are known before y is, and y becomes z where it is made; and backward neither reads
y nor writes dy: the product that would have made dx of dy takes dz instead, and beside it x with a
second factor, [K, K]; the one that makes dw takes dz as well. y is never in memory. In training
only, all images one group. The shortcut may be such a product itself, a block's projection: then
s = a' * y' + b', and of dz both get their gradients.

Bytes per element of y, 16-bit activations, K = N / 4, forward + backward of a forked output, the
convolution's own traffic included:

    here                                5.1 + 11.6      of two products       4.1 + 17.1
    batch_norm.py and convolutions     10.6 + 19.1      joined_norms.py      15.0 + 30.0

An H200 (bench/results/h200/trials/product-norm.log), 256 images, 64 to 256 channels at 56 px: .95
ms, where convolutions and batch_norm.py take 1.57. dz moves 4.2 TB/s, dx 4.1; z, with its shortcut
loaded beside a product, 3.0, and one tile after the other waits for its own loads there.

Kernels: forward product_moments.py's, then (1) z; backward (2) dz and its sums, cuBLAS's x^T dz,
(3) dbias, dweight, dw and a w, (4) w^T k1 w and c, (5) dx. (3) and (4) are small.

Numerics: sums, [K, K] and [N, K] in float32; y is not rounded, and the statistics are of just that.
a w and w^T k1 w are rounded to x's dtype, as dy would be, and c is made of what they are rounded
to, so that dx keeps its mean. Sums have a fixed order: all runs give the same bits.

Sources: Ioffe & Szegedy, "Batch Normalization", 2015; He et al., "Deep Residual Learning for Image
Recognition", 2015, section 4.1 (bottlenecks).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from freeadv_fast.kernels import batch_norm
from freeadv_fast.kernels.batch_norm_forward import pack, unpack
from freeadv_fast.kernels.batch_norm_statistics import (
    Norm,
    Rows,
    Schedule,
    counters,
    is_last,
    last_tile,
    tile_mask,
)
from freeadv_fast.kernels.product_moments import (
    ADDED,
    CHANNELS,
    Moments,
    Tile,
    find_moments,
    rows_of,
    tile_of,
)

# Arguments that kernels are not compiled anew for.
SIZES = ("num_rows", "num_chunks", "num_blocks", "channels8")

try:
    import triton
    import triton.language as tl

    jit = triton.jit(do_not_specialize=SIZES)
except ImportError:  # torch builds without CUDA may come without Triton; the reference remains

    def jit(kernel):
        """Leaves a kernel as it is; nothing launches it."""
        return kernel


DTYPES = (torch.bfloat16,)  # float16 could not hold w^T k1 w, whose k1 has 1 / M in it
# K: a power of two that a tile holds.
NARROW = (16, 32, 64, 128, 256)


# By major compute capability and K, as product_moments.py's.
FORWARD = {
    9: {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 3), 256: Tile(128, 64, 8, 3)},
    8: {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 3), 256: Tile(64, 64, 4, 3)},
}
INPUT_GRADIENT = {
    9: {64: Tile(128, 64, 4, 3), 128: Tile(128, 128, 8, 3), 256: Tile(128, 128, 8, 3)},
    8: {64: Tile(128, 64, 8, 3), 128: Tile(128, 128, 8, 3), 256: Tile(128, 128, 8, 3)},
}
# Depth of a step of a product, at most.
DEPTH = 64
RECTIFY = Schedule(columns=128, num_warps=8, per_sm=2, depth=2, turn=2)


@jit
def _forward_kernel(
    z_ptr,  # [M, N] bf16 | fp16 | fp32, output
    bits_ptr,  # [M, N/8] u8, output: not z <= 0
    x_ptr,  # [M, K] like z
    w_ptr,  # [N, K] like z
    coefficients_ptr,  # [4, 1, N] fp32: a, b, mean, rstd
    shortcut_ptr,  # [M, N] like z; with a projection [M, L], what that reads
    projection_ptr,  # [N, L] like z: w'; or None
    shortcut_coefficients_ptr,  # [4, 1, N] fp32, of a projection; else unused
    num_rows,  # M
    N: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BL: tl.constexpr,
):
    """BM rows and BN columns."""
    blocks: tl.constexpr = N // BN
    row = (tl.program_id(0) // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    block = tl.program_id(0) % blocks
    cols = block * BN + tl.arange(0, BN)
    inside = (row < num_rows)[:, None]
    if projection_ptr is None:  # on its way while the product is taken
        added = tl.load(shortcut_ptr + row[:, None] * N + cols[None, :], mask=inside, other=0.0)
    inner = tl.arange(0, BD)
    y = tl.zeros([BM, BN], tl.float32)
    for done in range(0, K, BD):
        x = tl.load(x_ptr + row[:, None] * K + (done + inner)[None, :], mask=inside, other=0.0)
        w = tl.load(w_ptr + cols[None, :] * K + (done + inner)[:, None])
        y = tl.dot(x, w, y)
    a = tl.load(coefficients_ptr + cols)
    b = tl.load(coefficients_ptr + N + cols)
    if projection_ptr is not None:
        other = tl.arange(0, BL)
        projected = tl.zeros([BM, BN], tl.float32)
        for done in range(0, L, BL):
            s = shortcut_ptr + row[:, None] * L + (done + other)[None, :]
            w = tl.load(projection_ptr + cols[None, :] * L + (done + other)[:, None])
            projected = tl.dot(tl.load(s, mask=inside, other=0.0), w, projected)
        b += tl.load(shortcut_coefficients_ptr + N + cols)
        z = tl.fma(projected, tl.load(shortcut_coefficients_ptr + cols)[None, :], b[None, :])
        z = tl.fma(y, a[None, :], z)
    else:
        z = tl.fma(y, a[None, :], b[None, :]) + added.to(tl.float32)
    at_bits = row[:, None] * (N // 8) + (block * (BN // 8) + tl.arange(0, BN // 8))[None, :]
    tl.store(bits_ptr + at_bits, pack(z <= 0.0, BM, BN), mask=inside)
    z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    out = z_ptr + row[:, None] * N + cols[None, :]
    tl.store(out, z.to(z_ptr.dtype.element_ty), mask=inside)


@jit
def _rectify_kernel(
    dz_ptr,  # [M, N] bf16 | fp16 | fp32, output
    partial_ptr,  # [P, N] fp32, output: sums of dz
    dy_ptr,  # [M, N] like dz
    shortcut_dy_ptr,  # [M, N] like dz, added to dy; or None
    bits_ptr,  # [M, N/8] u8
    num_rows,  # M
    channels8,  # N / 8
    num_chunks,  # P
    BM: tl.constexpr,
    BC: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A chunk of the rows, BC columns of it: every P-th tile, from the last one."""
    C = channels8 * 8
    blocks = channels8 // (BC // 8)
    chunk = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    cols = block * BC + tl.arange(0, BC)
    rows = tl.arange(0, BM)
    count = num_rows.to(tl.int64)
    at = rows[:, None] * C + cols[None, :]
    at_bits = rows[:, None] * channels8 + (block * (BC // 8) + tl.arange(0, BC // 8))
    tile, offset, step = last_tile(chunk, count, num_chunks, C, BM)
    dys, shortcut_dys, bits = (), (), ()
    for i in tl.static_range(DEPTH):
        inside = tile_mask(tile - i * num_chunks, count, rows, BM)
        ahead = offset - i * step
        dys = dys + (tl.load(dy_ptr + ahead + at, mask=inside, other=0.0),)
        if shortcut_dy_ptr is not None:
            shortcut_dy = tl.load(shortcut_dy_ptr + ahead + at, mask=inside, other=0.0)
            shortcut_dys = shortcut_dys + (shortcut_dy,)
        bits = bits + (tl.load(bits_ptr + ahead // 8 + at_bits, mask=inside, other=0),)
    sums = tl.zeros([BM, BC], tl.float32)
    while tile >= 0:
        for _ in tl.static_range(DEPTH):
            # Whole where it is there at all: only the last tile may be ragged.
            is_there = tile >= DEPTH * num_chunks
            ahead = offset - DEPTH * step
            dys = dys + (tl.load(dy_ptr + ahead + at, mask=is_there, other=0.0),)
            dz = dys[0].to(tl.float32)
            if shortcut_dy_ptr is not None:
                shortcut_dy = tl.load(shortcut_dy_ptr + ahead + at, mask=is_there, other=0.0)
                dz += shortcut_dys[0].to(tl.float32)
                shortcut_dys = shortcut_dys[1:] + (shortcut_dy,)
            bits_next = tl.load(bits_ptr + ahead // 8 + at_bits, mask=is_there, other=0)
            dz = tl.where(unpack(bits[0], BM, BC), dz, 0.0).to(dz_ptr.dtype.element_ty)
            dys, bits = dys[1:], bits[1:] + (bits_next,)
            inside = tile_mask(tile, count, rows, BM)
            tl.store(dz_ptr + offset + at, dz, mask=inside)
            sums += dz.to(tl.float32)  # of what the products will read
            tile -= num_chunks
            offset -= step
    tl.store(partial_ptr + chunk.to(tl.int64) * C + cols, tl.sum(sums, 0))


@jit
def _weights_kernel(
    dweight_ptr,  # [N] fp32, output
    dbias_ptr,  # [N] fp32, output
    dw_ptr,  # [N, K] fp32 | bf16 | fp16, output
    scaled_ptr,  # [N, K] as x, output: a w
    k1_ptr,  # [N] fp32, output
    constants_ptr,  # [N / BN, K] fp32, output: of BN columns, sum of -(dbias / M) (a w)
    products_ptr,  # [K, N] fp32: x^T dz
    partial_ptr,  # [P, N] fp32
    w_ptr,  # [N, K] as x
    spread_ptr,  # [N, K] fp32: u
    sums_ptr,  # [K] fp32: of x
    coefficients_ptr,  # [4, 1, N] fp32: a, b, mean, rstd
    num_rows,  # M
    channels8,  # N / 8
    num_chunks,  # P
    K: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
):
    """BN columns of y."""
    N = channels8 * 8
    k = tl.arange(0, K)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    at = cols[:, None] * K + k[None, :]
    products = tl.load(products_ptr + k[None, :] * N + cols[:, None])
    w = tl.load(w_ptr + at).to(tl.float32)
    spread = tl.load(spread_ptr + at)
    chunk = tl.arange(0, BP)
    total = tl.zeros([BP, BN], tl.float32)
    for done in range(0, num_chunks, BP):
        inside = (done + chunk < num_chunks)[:, None]
        offsets = (done + chunk)[:, None] * N + cols[None, :]
        total += tl.load(partial_ptr + offsets, mask=inside, other=0.0)
    dbias = tl.sum(total, 0)
    a = tl.load(coefficients_ptr + cols)
    rstd = tl.load(coefficients_ptr + 3 * N + cols)
    num = num_rows.to(tl.float32)
    share = tl.div_rn(dbias, num)
    products -= tl.load(sums_ptr + k)[None, :] * share[:, None]
    dweight = rstd * tl.sum(w * products, 1)
    k1 = -a * rstd * tl.div_rn(dweight, num)
    dw = a[:, None] * products + k1[:, None] * spread
    scaled = (a[:, None] * w).to(scaled_ptr.dtype.element_ty)
    constants = share[:, None] * scaled.to(tl.float32)
    tl.store(dweight_ptr + cols, dweight)
    tl.store(dbias_ptr + cols, dbias)
    tl.store(dw_ptr + at, dw.to(dw_ptr.dtype.element_ty))
    tl.store(scaled_ptr + at, scaled)
    tl.store(k1_ptr + cols, k1)
    tl.store(constants_ptr + tl.program_id(0) * K + k, -tl.sum(constants, 0))


@jit
def _square_kernel(
    square_ptr,  # [K, K] as x, output: w^T k1 w
    constant_ptr,  # [K] fp32, output: c
    counter_ptr,  # [] i32, zero before and after
    w_ptr,  # [N, K] as x
    k1_ptr,  # [N] fp32
    constants_ptr,  # [Q, K] fp32
    sums_ptr,  # [K] fp32: of x
    num_rows,  # M
    channels8,  # N / 8
    num_blocks,  # Q
    K: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """BT rows and BT columns; the last program finds c, of the square as it is rounded."""
    side: tl.constexpr = K // BT
    N = channels8 * 8
    some = tl.arange(0, BN)
    tile = tl.arange(0, BT)
    left = tl.program_id(0) // side * BT + tile
    right = tl.program_id(0) % side * BT + tile
    square = tl.zeros([BT, BT], tl.float32)
    for done in range(0, N, BN):
        k1 = tl.load(k1_ptr + done + some)
        ws = w_ptr + (done + some)[:, None] * K
        w = tl.load(ws + left[None, :]).to(tl.float32) * k1[:, None]
        other = tl.load(ws + right[None, :]).to(tl.float32)
        square = tl.dot(tl.trans(w), other, square, input_precision="tf32")
    out = square_ptr + left[:, None] * K + right[None, :]
    tl.store(out, square.to(square_ptr.dtype.element_ty))
    if is_last(counter_ptr, side * side):
        k = tl.arange(0, K)
        total = tl.zeros([BN, K], tl.float32)
        for done in range(0, num_blocks, BN):
            inside = (done + some < num_blocks)[:, None]
            offsets = (done + some)[:, None] * K + k[None, :]
            total += tl.load(constants_ptr + offsets, mask=inside, other=0.0)
        constant = tl.sum(total, 0)
        share = tl.div_rn(1.0, num_rows.to(tl.float32))
        for done in range(0, K, BT):
            mean = tl.load(sums_ptr + done + tile) * share
            rows = square_ptr + (done + tile)[:, None] * K + k[None, :]
            rounded = tl.load(rows, cache_modifier=".cg").to(tl.float32)
            constant -= tl.sum(mean[:, None] * rounded, 0)
        tl.store(constant_ptr + k, constant)


@jit
def _input_gradient_kernel(
    dx_ptr,  # [M, K] bf16 | fp16 | fp32, output
    dz_ptr,  # [M, N] like dx
    x_ptr,  # [M, K] like dx
    scaled_ptr,  # [N, K] like dx: a w
    square_ptr,  # [K, K] like dx: w^T k1 w
    constant_ptr,  # [K] fp32: c
    num_rows,  # M
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    """BM rows and BC columns."""
    blocks: tl.constexpr = K // BC
    row = (tl.program_id(0) // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    inner = tl.arange(0, BD)
    inside = (row < num_rows)[:, None]
    dzs = dz_ptr + row[:, None] * N + inner[None, :]
    xs = x_ptr + row[:, None] * K + inner[None, :]
    factor = inner[:, None] * K + cols[None, :]
    sums = tl.zeros([BM, BC], tl.float32)
    for done in range(0, N, BD):
        dz = tl.load(dzs + done, mask=inside, other=0.0)
        sums = tl.dot(dz, tl.load(scaled_ptr + done * K + factor), sums)
    for done in range(0, K, BD):
        x = tl.load(xs + done, mask=inside, other=0.0)
        sums = tl.dot(x, tl.load(square_ptr + done * K + factor), sums)
    dx = (sums + tl.load(constant_ptr + cols)[None, :]).to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + row[:, None] * K + cols[None, :], dx, mask=inside)


class Product(NamedTuple):
    """A 1x1 convolution without bias, and the norm of its output."""

    x: Tensor  # (N, K, H, W)
    w: Tensor  # (C, K, 1, 1)
    norm: Norm


def supports(product: Product) -> bool:
    """Whether the kernels take it on a GPU, its weights cast to the dtype of x."""
    x, w, norm = product
    vectors, counter = norm[:4], norm.num_batches_tracked
    return (
        x.dtype in DTYPES
        and x.dim() == 4
        and w.dim() == 4
        and w.shape[1:] == (x.size(1), 1, 1)
        and w.is_contiguous()
        and x.size(1) in NARROW
        # What is saved grows with the columns of y, what is read besides with those of x.
        and w.size(0) >= 2 * x.size(1)
        and w.size(0) % CHANNELS == 0
        and x.numel() > 0
        and x[:, 0].numel() < 1 << 31
        and torch.cuda.get_device_capability(x.device)[0] in FORWARD
        and all(v is None or (v.dtype is torch.float32 and v.is_contiguous()) for v in vectors)
        and (counter is None or (counter.dtype is torch.int64 and counter.device == x.device))
    )


def _forward(
    xs: Sequence[Tensor], ws: Sequence[Tensor], known: list[Tensor], residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """z and ReLU's bits, of one product and a residual or of two products, all channels_last."""
    (num, narrow, height, width), wide = xs[0].shape, ws[0].size(0)
    num_rows, tile = num * height * width, tile_of(FORWARD, narrow, xs[0].device)
    columns = min(wide & -wide, tile.columns)
    z = xs[0].new_empty((num, height, width, wide)).permute(0, 3, 1, 2)
    bits = z.new_empty(z.numel() // 8, dtype=torch.uint8)
    shortcut, projection, shortcut_known = residual, None, known[0]
    if residual is None:
        shortcut, projection, shortcut_known = xs[1], ws[1], known[1]
    other = shortcut.size(1) if residual is None else narrow
    _forward_kernel[(triton.cdiv(num_rows, tile.rows) * (wide // columns),)](
        z,
        bits,
        xs[0],
        ws[0],
        known[0],
        shortcut,
        projection,
        shortcut_known,
        num_rows,
        N=wide,
        K=narrow,
        L=other,
        BN=columns,
        BD=min(narrow, DEPTH),
        BL=min(other, DEPTH),
        **tile.options,
    )
    return z, bits


def _rectified(dy: Tensor, shortcut_dy: Tensor | None, bits: Tensor) -> tuple[Tensor, Tensor]:
    """dz, and sums of it over chunks of rows, [P, N] float32. The gradients are channels_last."""
    num, wide, height, width = dy.shape
    rows = Rows(num, height * width, 1, wide, dy.element_size()).tiled(RECTIFY)
    num_chunks = rows.num_chunks(RECTIFY, dy.device)
    dz, partial = torch.empty_like(dy), dy.new_empty((num_chunks, wide), dtype=torch.float32)
    _rectify_kernel[(num_chunks * rows.column_blocks,)](
        dz,
        partial,
        dy,
        shortcut_dy,
        bits,
        num * height * width,
        wide // 8,
        num_chunks,
        BM=rows.tile_rows(RECTIFY.num_warps),
        BC=rows.columns,
        DEPTH=RECTIFY.depth,
        num_warps=RECTIFY.num_warps,
        maxnreg=RECTIFY.max_registers,
    )
    return dz, partial


def _gradients(
    dz: Tensor, partial: Tensor, x: Tensor, w: Tensor, moments: Moments
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dw, dweight and dbias of one product. dz and x are channels_last."""
    wide, narrow = w.shape[:2]
    rows = rows_of(x)
    num_rows, num_blocks = len(rows), wide // CHANNELS
    products = _transposed_product(rows, rows_of(dz))
    shapes = (wide,), (wide,), (wide,), (num_blocks, narrow), (narrow,)
    dweight, dbias, k1, constants, constant = (partial.new_empty(shape) for shape in shapes)
    dw, scaled = torch.empty_like(w), torch.empty_like(w)
    _weights_kernel[(num_blocks,)](
        dweight,
        dbias,
        dw,
        scaled,
        k1,
        constants,
        products,
        partial,
        w,
        moments.spread,
        moments.sums,
        moments.coefficients,
        num_rows,
        wide // 8,
        len(partial),
        K=narrow,
        BN=CHANNELS,
        BP=ADDED,
        num_warps=max(4, narrow // 32),
    )
    square, side = w.new_empty((narrow, narrow)), min(narrow, 32)
    _square_kernel[((narrow // side) ** 2,)](
        square,
        constant,
        counters(1, x.device),
        w,
        k1,
        constants,
        moments.sums,
        num_rows,
        wide // 8,
        num_blocks,
        K=narrow,
        BT=side,
        BN=CHANNELS,
    )
    dx, tile = torch.empty_like(x), tile_of(INPUT_GRADIENT, narrow, x.device)
    columns = min(narrow, tile.columns)
    _input_gradient_kernel[(triton.cdiv(num_rows, tile.rows) * (narrow // columns),)](
        dx,
        dz,
        x,
        scaled,
        square,
        constant,
        num_rows,
        N=wide,
        K=narrow,
        BC=columns,
        BD=min(narrow, DEPTH),
        **tile.options,
    )
    return dx, dw, dweight, dbias


def _transposed_product(x: Tensor, dz: Tensor) -> Tensor:
    """x^T dz in float32, [K, N], by cuBLAS."""
    if x.device.type == "cuda":
        return torch.mm(x.t(), dz, out_dtype=torch.float32)
    return x.t().float() @ dz.float()  # the interpreter's


class _ProductNorm(torch.autograd.Function):
    """z, and its gradients; forked, z twice. One product and a residual, or two products."""

    @staticmethod
    def forward(ctx, fork, norms, residual, *tensors):
        """`tensors` are x, w, weight and bias of each product.

        Keeps x, the weights, ReLU's bits and what is known of y; neither y nor z.
        """
        xs, ws = tensors[0::4], tensors[1::4]
        with torch.cuda.device_of(xs[0]):
            moments = [find_moments(*given) for given in zip(xs, ws, norms, strict=True)]
            known = [found.coefficients for found in moments]
            z, bits = _forward(xs, ws, known, residual)
        # The norms' weights only so that their second derivatives are errors too.
        ctx.save_for_backward(bits, *tensors, *itertools.chain.from_iterable(moments))
        ctx.set_materialize_grads(False)
        return (z, z.detach()) if fork else z  # as in batch_norm.py

    @staticmethod
    def backward(ctx, *gradients):
        """All of them in any case: one product serves every one."""
        # An output that nothing reads has none.
        given = [
            g.contiguous(memory_format=torch.channels_last) for g in gradients if g is not None
        ]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        dy, shortcut_dy = given if len(given) > 1 else (*given, None)
        found = None, None, *_Gradients.apply(dy, shortcut_dy, *ctx.saved_tensors)
        wanted = zip(found, ctx.needs_input_grad, strict=True)
        return tuple(gradient if is_wanted else None for gradient, is_wanted in wanted)


class _Gradients(torch.autograd.Function):
    """The gradients as a node of their own, whose derivative is an error that says what to do."""

    @staticmethod
    def forward(ctx, dy, shortcut_dy, bits, *saved):
        """dz, and dx, dw, dweight and dbias of each product."""
        num = len(saved) // 7  # four tensors of a product, and three of its moments
        tensors, known = saved[: 4 * num], saved[4 * num :]
        moments = map(Moments, known[0::3], known[1::3], known[2::3])
        with torch.cuda.device_of(dy):
            dz, partial = _rectified(dy, shortcut_dy, bits)
            found = [
                _gradients(dz, partial, x, w, own)
                for x, w, own in zip(tensors[0::4], tensors[1::4], moments, strict=True)
            ]
        return dz, *itertools.chain.from_iterable(found)

    @staticmethod
    def backward(ctx, *gradients):
        """Second derivatives.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "product_norm was differentiated twice, and its kernels have first derivatives only: "
            "methods with second derivatives (GradAlign) train with unfused batch norm, "
            "nn.BatchNorm2d and ReLU as layers of their own"
        )


def product_norm_ref(product: Product, shortcut: Tensor | Product) -> Tensor:
    """The specification: one after the other."""
    residual = shortcut if isinstance(shortcut, Tensor) else _apart(shortcut, None)
    return _apart(product, residual)


def _apart(product: Product, residual: Tensor | None) -> Tensor:
    """A convolution and its norm; where there is a residual, the sum and ReLU."""
    norm = product.norm
    return batch_norm.batch_norm_act_ref(
        F.conv2d(product.x, product.w),
        *norm[:4],
        True,
        norm.momentum,
        norm.eps,
        1,
        residual is not None,
        residual,
        num_batches_tracked=norm.num_batches_tracked,
    )


def product_norm(
    product: Product, shortcut: Tensor | Product, *, fork: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """``relu(norm(conv(x)) + shortcut)`` in training, by the kernels.

    Differentiable once. Running statistics are updated behind autograd's back.

    Args:
        product: As `supports` takes it, of a convolution without bias, stride 1; x is copied unless
            channels_last.
        shortcut: (N, C, H, W) of x's dtype, copied unless channels_last; or a product likewise.
        fork: Whether the output is returned twice, for two readers.

    Returns:
        (N, C, H, W) of x's dtype, channels_last. With `fork` it and an alias of it, as from
        `batch_norm_act`.

    Raises:
        RuntimeError: shapes, dtypes or devices disagree, or a channel has a single value; in
            backward, of a second derivative.

    Source: He et al. 2015, section 4.1; Ioffe & Szegedy 2015, algorithm 1.
    """
    products = [product] if isinstance(shortcut, Tensor) else [product, shortcut]
    residual = None
    if isinstance(shortcut, Tensor):
        residual = shortcut.contiguous(memory_format=torch.channels_last)
    shape = (len(product.x), product.w.size(0), *product.x.shape[2:])
    tensors: list[Tensor | None] = []
    for x, w, norm in products:
        y = x.new_empty(()).expand(len(x), w.size(0), *x.shape[2:])  # only its shape is looked at
        if y.shape != shape:
            raise RuntimeError(f"shortcut: expected {shape}, got {tuple(y.shape)}")
        batch_norm.check(y, *norm[:4], True, 1, residual, 0.0)
        x = x.contiguous(memory_format=torch.channels_last)
        tensors += (x, w, norm.weight, norm.bias)
    norms = [one.norm for one in products]
    return _ProductNorm.apply(fork, norms, residual, *tensors)
