"""Gradients of batch norm (+ residual) (+ ReLU or leaky ReLU): the sums over dz, then dx.

Formulas, bytes and numerics: batch_norm.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from freeadv_fast.kernels import batch_norm_statistics as statistics
from freeadv_fast.kernels.batch_norm_forward import BITS, NO_MASK, Mode, elementwise, leak, unpack
from freeadv_fast.kernels.batch_norm_statistics import (
    Schedule,
    group_rows,
    is_last,
    jit,
    last_tile,
    merged,
    tile_mask,
)

try:
    import triton.language as tl
except ImportError:  # torch builds without CUDA may come without Triton; the reference remains
    pass

# All norms of a ResNet-50 at batch 256, backward, on an H200
# (bench/results/h200/trials/batch-norm.log): 8.90 ms (bytes 8.34). Three programs
# 9.00, four tiles with one a turn 9.36; two tiles of twice the size, four programs of four warps
# and a kernel apart for their merge 9.11.
REDUCTION = Schedule(columns=128, num_warps=8, per_sm=2, depth=2, turn=2)


@jit
def merge_sums(
    k_ptr,  # [2, G, C] fp32, output if TRAINING: k1, k2
    dweight_ptr,  # [C] fp32, output
    dbias_ptr,  # [C] fp32, output
    sums_ptr,  # [G, P, C] fp32, of dz
    products_ptr,  # [G, P, C] fp32, of dz * (x - mean)
    coefficients_ptr,  # [4, G, C] fp32: a, b, mean, rstd
    cols,
    num_images,
    pixels,
    num_groups,
    num_chunks,
    C,
    TRAINING: tl.constexpr,
    BP: tl.constexpr,
    LOADS: tl.constexpr,
    BC: tl.constexpr,
):
    """All groups and chunks of BC columns, by the program that is the last one."""
    plane = num_groups.to(tl.int64) * C
    dweight = tl.zeros([BC], tl.float32)
    dbias = tl.zeros([BC], tl.float32)
    group = tl.full([], 0, tl.int32)
    while group < num_groups:
        known = coefficients_ptr + group.to(tl.int64) * C + cols
        a = tl.load(known)
        mean = tl.load(known + 2 * plane)
        rstd = tl.load(known + 3 * plane)
        chunks = group.to(tl.int64) * num_chunks * C
        of_bias, of_weight = merged(
            sums_ptr + chunks, products_ptr + chunks, cols, num_chunks, C, BP, LOADS, BC
        )
        of_weight *= rstd
        if TRAINING:
            _, count = group_rows(group, num_images, pixels, num_groups)
            share = tl.div_rn(-a, count.to(tl.float32))  # -a / M
            k1 = share * rstd * of_weight
            out = k_ptr + group.to(tl.int64) * C + cols
            tl.store(out, k1)
            tl.store(out + plane, share * of_bias - k1 * mean)
        dweight += of_weight
        dbias += of_bias
        group += 1
    tl.store(dweight_ptr + cols, dweight)
    tl.store(dbias_ptr + cols, dbias)


@jit
def _batch_norm_reduce_kernel(
    k_ptr,  # [2, G, C] fp32, output if TRAINING: k1, k2
    dweight_ptr,  # [C] fp32, output
    dbias_ptr,  # [C] fp32, output
    dz_ptr,  # [M, C] like dy, output if MASK is BITS
    partial_ptr,  # [2, G, P, C] fp32, a chunk's sums of dz and of dz * (x - mean)
    counters_ptr,  # [C/BC] i32, zeros before and after
    dy_ptr,  # [M, C] bf16 | fp16 | fp32
    shortcut_dy_ptr,  # [M, C] like dy, added to it; or None
    x_ptr,  # [M, C] like dy
    bits_ptr,  # [M, C/8] u8; unused unless MASK is BITS
    coefficients_ptr,  # [4, G, C] fp32: a, b, mean, rstd
    num_images,  # N
    image_rows,  # H*W
    num_groups,  # G
    channels8,  # C/8
    num_chunks,  # P
    pixels,  # of an image that statistics are of: H*W, or more where most of dz is zero
    TRAINING: tl.constexpr,
    MASK: tl.constexpr,
    SLOPE: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
    LOADS: tl.constexpr,
    DEPTH: tl.constexpr,
    TURN: tl.constexpr,
):
    """A chunk of a group's rows, BC columns of it: every P-th tile."""
    C = channels8 * 8
    plane = num_groups.to(tl.int64) * C
    blocks = channels8 // (BC // 8)
    chunk = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    group = tl.program_id(1)
    cols = block * BC + tl.arange(0, BC)
    rows = tl.arange(0, BM)
    first, count = group_rows(group, num_images, image_rows, num_groups)
    dy_ptr += first * C
    x_ptr += first * C
    at = rows[:, None] * C + cols[None, :]
    if shortcut_dy_ptr is not None:
        shortcut_dy_ptr += first * C
    if MASK == 2:
        dz_ptr += first * C
        bits_ptr += first * channels8
        at_bits = rows[:, None] * channels8 + (block * (BC // 8) + tl.arange(0, BC // 8))
    tile, offset, step = last_tile(chunk, count, num_chunks, C, BM)
    dys, shortcut_dys, xs, bits = (), (), (), ()
    for i in tl.static_range(DEPTH):
        inside = tile_mask(tile - i * num_chunks, count, rows, BM)
        ahead = offset - i * step
        dys = dys + (tl.load(dy_ptr + ahead + at, mask=inside, other=0.0),)
        xs = xs + (tl.load(x_ptr + ahead + at, mask=inside, other=0.0),)
        if shortcut_dy_ptr is not None:
            shortcut_dy = tl.load(shortcut_dy_ptr + ahead + at, mask=inside, other=0.0)
            shortcut_dys = shortcut_dys + (shortcut_dy,)
        if MASK == 2:
            bits = bits + (tl.load(bits_ptr + ahead // 8 + at_bits, mask=inside, other=0),)
    known = coefficients_ptr + group.to(tl.int64) * C + cols
    mean = tl.load(known + 2 * plane)[None, :]
    if MASK == 1:
        a = tl.load(known)[None, :]
        b = tl.load(known + plane)[None, :]
    sums = tl.zeros([BM, BC], tl.float32)
    products = tl.zeros([BM, BC], tl.float32)
    while tile >= 0:
        for _ in tl.static_range(TURN):
            # Whole where it is there at all: only a group's last tile may be ragged.
            is_there = tile >= DEPTH * num_chunks
            ahead = offset - DEPTH * step
            dys = dys + (tl.load(dy_ptr + ahead + at, mask=is_there, other=0.0),)
            xs = xs + (tl.load(x_ptr + ahead + at, mask=is_there, other=0.0),)
            dz = dys[0].to(tl.float32)
            x = xs[0].to(tl.float32)
            if shortcut_dy_ptr is not None:
                shortcut_dy = tl.load(shortcut_dy_ptr + ahead + at, mask=is_there, other=0.0)
                dz += shortcut_dys[0].to(tl.float32)
                shortcut_dys = shortcut_dys[1:] + (shortcut_dy,)
            if MASK == 1:
                dz = tl.where(tl.fma(x, a, b) <= 0.0, leak(dz, SLOPE), dz)
            if MASK == 2:
                bits_next = tl.load(bits_ptr + ahead // 8 + at_bits, mask=is_there, other=0)
                dz = tl.where(unpack(bits[0], BM, BC), dz, leak(dz, SLOPE))
                bits = bits[1:] + (bits_next,)
                inside = tile_mask(tile, count, rows, BM)
                tl.store(dz_ptr + offset + at, dz.to(dz_ptr.dtype.element_ty), mask=inside)
            sums += dz
            products += dz * (x - mean)
            dys, xs = dys[1:], xs[1:]
            tile -= num_chunks
            offset -= step
    out = partial_ptr + (group.to(tl.int64) * num_chunks + chunk) * C + cols
    products_ptr = partial_ptr + plane * num_chunks
    tl.store(out, tl.sum(sums, 0))
    tl.store(out + plane * num_chunks, tl.sum(products, 0))
    if is_last(counters_ptr + block, num_chunks * num_groups):
        merge_sums(
            k_ptr,
            dweight_ptr,
            dbias_ptr,
            partial_ptr,
            products_ptr,
            coefficients_ptr,
            cols,
            num_images,
            pixels,
            num_groups,
            num_chunks,
            C,
            TRAINING,
            BP,
            LOADS,
            BC,
        )


@jit
def _batch_norm_backward_kernel(
    dx_ptr,  # [M, C] bf16 | fp16 | fp32, output
    dz_ptr,  # [M, C] like dx, output if WRITE_DZ
    dy_ptr,  # [M, C] like dx
    shortcut_dy_ptr,  # [M, C] like dx, added to dy; or None
    other_dx_ptr,  # [M, C] like dx, added to it; or None
    x_ptr,  # [M, C] like dx; unused in eval mode unless MASK is RECOMPUTED
    bits_ptr,  # [M, C/8] u8; unused unless MASK is BITS
    coefficients_ptr,  # [4, G, C] fp32: a, b, mean, rstd
    k_ptr,  # [2, G, C] fp32: k1, k2; unused without TRAINING
    num_images,  # N
    image_rows,  # H*W
    num_groups,  # G
    channels8,  # C/8
    TRAINING: tl.constexpr,
    MASK: tl.constexpr,
    SLOPE: tl.constexpr,
    WRITE_DZ: tl.constexpr,
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
    known = group.to(tl.int64) * C + cols
    a = tl.load(coefficients_ptr + known)[None, :]
    if MASK == 1:
        b = tl.load(coefficients_ptr + plane + known)[None, :]
    if TRAINING:
        k1 = tl.load(k_ptr + known)[None, :]
        k2 = tl.load(k_ptr + plane + known)[None, :]
    at = rows[:, None] * C + cols[None, :]
    at_bits = rows[:, None] * channels8 + (block * (BC // 8) + tl.arange(0, BC // 8))
    inside = (rows < left)[:, None]
    dy = tl.load(dy_ptr + row * C + at, mask=inside)
    if shortcut_dy_ptr is not None:
        shortcut_dy = tl.load(shortcut_dy_ptr + row * C + at, mask=inside)
    if other_dx_ptr is not None:
        other_dx = tl.load(other_dx_ptr + row * C + at, mask=inside)
    if TRAINING or MASK == 1:
        x = tl.load(x_ptr + row * C + at, mask=inside)
    if MASK == 2:
        bits = tl.load(bits_ptr + row * channels8 + at_bits, mask=inside)
    for _ in tl.static_range(TILES):
        left -= BM
        is_next = (rows < left)[:, None]
        dy_next = tl.load(dy_ptr + (row + BM) * C + at, mask=is_next)
        dz = dy.to(tl.float32)
        if shortcut_dy_ptr is not None:
            shortcut_dy_next = tl.load(shortcut_dy_ptr + (row + BM) * C + at, mask=is_next)
            dz += shortcut_dy.to(tl.float32)
            shortcut_dy = shortcut_dy_next
        if TRAINING or MASK == 1:
            x_next = tl.load(x_ptr + (row + BM) * C + at, mask=is_next)
            x32 = x.to(tl.float32)
            x = x_next
        if MASK == 1:
            dz = tl.where(tl.fma(x32, a, b) <= 0.0, leak(dz, SLOPE), dz)
        if MASK == 2:
            bits_next = tl.load(bits_ptr + (row + BM) * channels8 + at_bits, mask=is_next)
            dz = tl.where(unpack(bits, BM, BC), dz, leak(dz, SLOPE))
            bits = bits_next
        if WRITE_DZ:
            tl.store(dz_ptr + row * C + at, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        dx = a * dz
        if TRAINING:
            dx = tl.fma(dz, a, tl.fma(x32, k1, k2))
        if other_dx_ptr is not None:
            # This late it takes 96 registers on sm_80, and 102, too many for five programs, above.
            other_dx_next = tl.load(other_dx_ptr + (row + BM) * C + at, mask=is_next)
            dx += other_dx.to(tl.float32)
            other_dx = other_dx_next
        tl.store(dx_ptr + row * C + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        inside, dy = is_next, dy_next
        row += BM


class Sums(NamedTuple):
    """What a reduction of dz finds."""

    k: Tensor  # (2, G, C) float32, k1 and k2; of no meaning in eval mode
    dweight: Tensor  # (C,) float32
    dbias: Tensor  # (C,) float32
    dz: Tensor | None  # of dy's shape and dtype, where ReLU's bits were given


def reduced(
    dy: Tensor,
    shortcut_dy: Tensor | None,
    x: Tensor,
    coefficients: Tensor,
    bits: Tensor | None,
    mode: Mode,
    pixels: int | None = None,
) -> Sums:
    """The backward pass's sums over dz, and what follows from them.

    Args:
        dy: (N, C, H, W), channels_last, like x.
        shortcut_dy: Is added to dy; None for nothing.
        x: (N, C, H, W), channels_last, as `supports` takes it.
        coefficients: (4, G, C), of the forward pass.
        bits: ReLU's mask; None where it is recomputed, or where there is no ReLU.
        mode: Of the forward pass.
        pixels: H * W of what the statistics are of, if not of x.
    """
    rows = mode.rows(x).tiled(REDUCTION)
    num_chunks = rows.num_chunks(REDUCTION, dy.device)
    dweight, dbias = (coefficients.new_empty(rows.channels) for _ in range(2))
    found = Sums(
        coefficients.new_empty((2, rows.num_groups, rows.channels)),
        dweight,
        dbias,
        None if bits is None else torch.empty_like(dy),
    )
    _batch_norm_reduce_kernel[(num_chunks * rows.column_blocks, rows.num_groups)](
        *found[:3],
        dy if found.dz is None else found.dz,
        coefficients.new_empty((2, rows.num_groups, num_chunks, rows.channels)),
        statistics.counters(rows.column_blocks, dy.device),
        dy,
        shortcut_dy,
        x,
        x if bits is None else bits,
        coefficients,
        *rows.shape,
        num_chunks,
        pixels or rows.image_rows,
        TRAINING=mode.training,
        MASK=mode.mask(bits),
        SLOPE=mode.negative_slope,
        **REDUCTION.options(rows),
    )
    return found


def backward(
    dy: Tensor,
    shortcut_dy: Tensor | None,
    other_dx: Tensor | None,
    x: Tensor,
    coefficients: Tensor,
    bits: Tensor | None,
    mode: Mode,
    wants_dx: bool,
    wants_affine: bool,
    wants_dz: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias and, where ReLU's bits were kept, dz; None where not wanted.

    Activations are channels_last. A shortcut_dy is added to dy, an other_dx to dx.
    """
    mask = mode.mask(bits)
    wants_dz = wants_dz and mask == BITS
    has_sums = wants_affine or (mode.training and wants_dx)
    dx = dweight = dbias = dz = k = None
    with torch.cuda.device_of(dy):
        if has_sums:
            k, dweight, dbias, dz = reduced(dy, shortcut_dy, x, coefficients, bits, mode)
            if dz is not None:  # from here on it stands for dy
                dy, shortcut_dy, mask = dz, None, NO_MASK
        if wants_dx or (wants_dz and dz is None):
            dx = torch.empty_like(dy)
            writes_dz = wants_dz and dz is None
            dz = torch.empty_like(dy) if writes_dz else dz
            rows = mode.rows(x)
            grid, options = elementwise(rows)
            _batch_norm_backward_kernel[grid](
                dx,
                dx if dz is None else dz,
                dy,
                shortcut_dy,
                other_dx,
                x,
                x if bits is None else bits,
                coefficients,
                coefficients if k is None else k,
                *rows.shape,
                TRAINING=mode.training and has_sums,
                MASK=mask,
                SLOPE=mode.negative_slope,
                WRITE_DZ=writes_dz,
                **options,
            )
    return dx, dweight, dbias, dz
