"""Batch norm (+ residual) (+ ReLU or leaky ReLU) of NHWC activations, forward and backward.

Activations are rows of a matrix [M, C] with M = N*H*W; every channel is a column.

    mean, var  of each column, over the rows of its group of images
    z  = a * x + b (+ residual)          a = weight / sqrt(var + eps), b = bias - mean * a
    y  = z where not z <= 0, else s * z  s = 0: ReLU; s > 0: leaky ReLU; without either y = z
    dz = dy where not z <= 0, else s * dy          dresidual = dz
    dbias   = sum(dz),  dweight = sum(dz * (x - mean)) * rstd          rstd = 1 / sqrt(var + eps)
    dx = a * dz + k1 * x + k2            k1 = -a * rstd * dweight / M
                                         k2 = -a * dbias / M - k1 * mean

In eval mode mean and var are the running ones, and dx = a * dz. Groups (ghost batch norm) are
consecutive images with statistics of their own.

Fused, two kernels each way: forward (1) statistics, a and b (batch_norm_statistics.py), (2) y;
backward (3) dz, the two sums, k1 and k2, (4) dx. (1) and (3) start at the last rows, (2) and (4) at
the first ones, which are then still in the L2 cache. ReLU's mask is recomputed from x, which
backward reads anyway; with a residual it is kept as 1 bit per element. y is never kept for
backward.

Bytes per element, 16-bit activations, forward + backward (residual's gradient included):

    BN + add + ReLU   8.125 + 12.125    eager, add and ReLU apart   16 + 16
      read twice      8.125 + 14.125    eager, and a sum            16 + 22
    BN + ReLU         6     + 10        eager, ReLU apart           10 + 16
      read twice      6     + 14        eager, and a sum            10 + 22
      x read twice    6     + 12        eager, and a sum            10 + 22
    BN                6     + 10        eager                        6 + 10

The output of a residual block has two readers, the next block and its shortcut, whose gradients
autograd would sum in a kernel of its own: two reads and a write. With `fork` there is an output for
each, one and the same tensor in memory, and (3) reads both gradients and sums them; so does (4)
where (3) has not written dz. Both live until (4) is done, where there was their sum: one tensor
more while this backward runs.

A block that normalises first has an input with two readers, its first norm and its shortcut.
`shared_norm_act` hands the input on to the second as an alias, and (4) adds that one's gradient to
dx before the one rounding: a read more, where autograd's sum would be two reads and a write.

Numerics: float32 throughout; results are rounded once, except that dx behind a residual follows
from the rounded dz, which only leaky ReLU's s * dy notices. NaN passes the ReLU, both ways, as in
PyTorch, whose leaky ReLU, unlike this one, scales NaN's gradient. Results are the same in every
run: programs add in a fixed order whichever of them comes last.

Sources: Ioffe & Szegedy, "Batch Normalization", 2015; Hoffer et al., "Train longer, generalize
better", 2017 (ghost batch norm).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from freeadv_fast.kernels import batch_norm_statistics as statistics
from freeadv_fast.kernels.batch_norm_statistics import (
    Norm,
    Rows,
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

# The elementwise kernels: a tile is two accesses of 16 bytes a thread, and each program has two
# tiles under way, so that 48 KB or more are on their way to an SM; at 4.3 TB/s an H200 gives it
# 33 KB a microsecond.
NUM_WARPS = 4
ACCESSES = 2
# Tiles per program: what they know of a channel is loaded once for all.
TILES = 4
# All norms of a ResNet-50 at batch 256, backward, on an H200
# (bench/results/h200/trials/batch-norm.log): 8.90 ms (bytes 8.34). Three programs
# 9.00, four tiles with one a turn 9.36; two tiles of twice the size, four programs of four warps
# and a kernel apart for their merge 9.11.
REDUCTION = Schedule(columns=128, num_warps=8, per_sm=2, depth=2, turn=2)

# Where a kernel takes ReLU's mask from.
NO_MASK = 0
RECOMPUTED = 1
BITS = 2


def check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    num_groups: int,
    residual: Tensor | None,
    negative_slope: float,
) -> None:
    """Refuses inputs that the formula is not defined for.

    Raises:
        RuntimeError: shows what disagrees.
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise RuntimeError(f"x: expected float (N, C, H, W), got {x.dtype} {tuple(x.shape)}")
    num, channels, height, width = x.shape
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise RuntimeError(
            f"residual {residual.dtype} {tuple(residual.shape)} and x {x.dtype} {tuple(x.shape)} "
            "differ"
        )
    if (running_mean is None) != (running_var is None):
        raise RuntimeError("running_mean and running_var: expected both or neither")
    vectors = {
        "weight": weight,
        "bias": bias,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (channels,):
            raise RuntimeError(
                f"{name}: expected ({channels},) for x {tuple(x.shape)}, got {tuple(vector.shape)}"
            )
    for name, other in {**vectors, "residual": residual}.items():
        if other is not None and other.device != x.device:
            raise RuntimeError(f"{name} is on {other.device}, x is on {x.device}")
    if not training and running_mean is None:
        raise RuntimeError("eval mode without running statistics; pass training=True")
    if training and (num_groups < 1 or num // num_groups * height * width < 2):
        raise RuntimeError(
            f"num_groups {num_groups} of x {tuple(x.shape)}: every group needs an image, and two "
            "values a channel"
        )
    if not 0 <= negative_slope < math.inf:
        raise RuntimeError(f"negative_slope: expected a finite number >= 0, got {negative_slope}")


def batch_norm_act_ref(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    num_groups: int,
    relu: bool,
    residual: Tensor | None,
    negative_slope: float = 0.0,
    fork: bool = False,
    num_batches_tracked: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification in plain PyTorch, and the path of a CPU; any memory format is kept.

    A chunk, a fused call and a concatenation are the cheapest groups on a CPU. The additions and
    the ReLU work in place: no backward pass reads what they overwrite. Both outputs of a fork are
    one object, and autograd sums their gradients.
    """
    check(
        x, weight, bias, running_mean, running_var, training, num_groups, residual, negative_slope
    )
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if training and num_groups > 1:
        y = _grouped(x, weight, bias, running_mean, running_var, momentum, eps, num_groups)
    else:
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        y += residual
    if relu and negative_slope:
        y = F.leaky_relu(y, negative_slope, inplace=True)
    elif relu:
        y = F.relu(y, inplace=True)
    return (y, y) if fork else y


def _grouped(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    num_groups: int,
) -> Tensor:
    """Each group's batch norm, and one update of the running statistics."""
    pieces = x.tensor_split(num_groups)
    if running_mean is None:
        return torch.cat(
            [F.batch_norm(piece, None, None, weight, bias, True, 0.0, eps) for piece in pieces]
        )
    # One row a group: its mean, and its unbiased variance.
    means, variances = running_mean.new_zeros((2, num_groups, x.shape[1]))
    groups = [
        F.batch_norm(piece, mean, variance, weight, bias, True, 1.0, eps)
        for piece, mean, variance in zip(pieces, means, variances, strict=True)
    ]
    for running, rows in ((running_mean, means), (running_var, variances)):
        # `data`: a forward pass in one group has saved the buffer for its backward pass, which
        # never reads it but would refuse a newer version.
        running.data.mul_(1 - momentum).add_(rows.mean(0), alpha=momentum)
    return torch.cat(groups)


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
    coefficients_ptr,  # [4, G, C] fp32: a, b, mean, rstd
    num_images,  # N
    image_rows,  # H*W
    num_groups,  # G
    channels8,  # C/8
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
    known = coefficients_ptr + group.to(tl.int64) * C + cols
    a = tl.load(known)[None, :]
    b = tl.load(known + plane)[None, :]
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


def _forward(
    x: Tensor, norm: Norm, residual: Tensor | None, mode: Mode, wants_bits: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the coefficients, and ReLU's bits if wanted. x and residual are channels_last."""
    rows = mode.rows(x)
    grid, options = elementwise(rows)
    with torch.cuda.device_of(x):
        coefficients = statistics.coefficients(x, norm, rows, mode.training)
        y = torch.empty_like(x, memory_format=torch.channels_last)
        bits = x.new_empty(x.numel() // 8, dtype=torch.uint8) if wants_bits else None
        _batch_norm_forward_kernel[grid](
            y,
            y if bits is None else bits,
            x,
            x if residual is None else residual,
            coefficients,
            *rows.shape,
            HAS_RESIDUAL=residual is not None,
            RELU=mode.relu,
            SLOPE=mode.negative_slope,
            WRITE_BITS=wants_bits,
            **options,
        )
    return y, coefficients, bits


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


def _backward(
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


class _BatchNormAct(torch.autograd.Function):
    """y, and its gradients; forked, y twice."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, norm, mode, fork):
        """Keeps x, the coefficients and perhaps ReLU's bits; never y, nor the residual."""
        wants_bits = mode.relu and residual is not None
        y, coefficients, bits = _forward(x, norm, residual, mode, wants_bits)
        ctx.save_for_backward(x, weight, coefficients, bits)
        ctx.mode = mode
        ctx.set_materialize_grads(False)
        # Detached, it is no view to autograd, which would forbid in-place operations on both, but
        # has y's version: who saved either for its backward pass learns of such an operation.
        return (y, y.detach()) if fork else y

    @staticmethod
    def backward(ctx, *gradients):
        """Only what some input needs."""
        x, weight, coefficients, bits = ctx.saved_tensors
        wants_dx, wants_weight, wants_bias, wants_residual, *_ = ctx.needs_input_grad
        # An output that nothing reads has none.
        given = [
            g.contiguous(memory_format=torch.channels_last) for g in gradients if g is not None
        ]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        dx, dweight, dbias, dz = _Gradients.apply(
            given[0],
            given[1] if len(given) > 1 else None,
            None,
            x,
            weight,
            coefficients,
            bits,
            ctx.mode,
            wants_dx,
            wants_weight or wants_bias,
            wants_residual,
        )
        dresidual = (dz if ctx.mode.relu else given[0]) if wants_residual else None
        dweight = dweight if wants_weight else None
        return dx, dweight, dbias if wants_bias else None, dresidual, None, None, None


class _SharedNormAct(torch.autograd.Function):
    """y and x, and their gradients, summed where they meet."""

    @staticmethod
    def forward(ctx, x, weight, bias, norm, mode):
        """Keeps x and the coefficients."""
        y, coefficients, _ = _forward(x, norm, None, mode, wants_bits=False)
        ctx.save_for_backward(x, weight, coefficients)
        ctx.mode = mode
        ctx.set_materialize_grads(False)
        return y, x.detach()  # no view to autograd, with x's version, as above

    @staticmethod
    def backward(ctx, dy, other_dx):
        """Only what some input needs."""
        x, weight, coefficients = ctx.saved_tensors
        wants_dx, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        if dy is None:  # nothing reads y
            return other_dx if wants_dx else None, None, None, None, None
        if other_dx is not None:
            other_dx = other_dx.contiguous(memory_format=torch.channels_last)
        dx, dweight, dbias, _ = _Gradients.apply(
            dy.contiguous(memory_format=torch.channels_last),
            None,
            other_dx,
            x,
            weight,
            coefficients,
            None,
            ctx.mode,
            wants_dx,
            wants_weight or wants_bias,
            False,
        )
        return dx, dweight if wants_weight else None, dbias if wants_bias else None, None, None


class _Gradients(torch.autograd.Function):
    """`_backward` as a node of its own, whose own derivative is an error that says what to do.

    `torch.autograd.function.once_differentiable` would say less.
    """

    @staticmethod
    def forward(ctx, dy, shortcut_dy, other_dx, x, weight, *arguments):
        """The weight is named only so that its second derivative is an error too."""
        return _backward(dy, shortcut_dy, other_dx, x, *arguments)

    @staticmethod
    def backward(ctx, *gradients):
        """Second derivatives.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "batch_norm_act was differentiated twice, and its kernels have first derivatives only: "
            "methods with second derivatives (GradAlign) train with unfused batch norm, "
            "nn.BatchNorm2d and ReLU as layers of their own"
        )


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    num_groups: int = 1,
    relu: bool = True,
    residual: Tensor | None = None,
    negative_slope: float = 0.0,
    fork: bool = False,
    num_batches_tracked: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalises, adds the residual and rectifies, by the kernels; differentiable once.

    Running statistics are updated behind autograd's back, as `GhostBatchNorm2d` does: a graph that
    saved them, and does not read them in training mode, stays usable.

    Args:
        x: (N, C, H, W) bfloat16, float16 or float32, C a multiple of 8; copied unless
            channels_last.
        weight: (C,) float32, contiguous; None for ones.
        bias: (C,) float32, contiguous; None for zeros.
        running_mean: (C,) float32, contiguous, updated in training; None for none.
        running_var: (C,) float32, contiguous, likewise; of unbiased variances.
        training: Whether statistics are the minibatch's, and not the running ones.
        momentum: Weight of the minibatch in the running statistics.
        eps: Added to the variance.
        num_groups: Groups of consecutive images with statistics of their own, in training.
        relu: Whether negative values are multiplied by the slope.
        residual: (N, C, H, W) of x's dtype, added before the ReLU; copied unless channels_last.
        negative_slope: 0 for ReLU, more for leaky ReLU; unused without `relu`. Every value compiles
            kernels of its own.
        fork: Whether the output is returned twice, for two readers.
        num_batches_tracked: () int64, one is added in training; None for none.

    Returns:
        (N, C, H, W) of x's dtype, channels_last. With `fork` it and, behind ReLU, an alias of it:
        the same memory, whose gradient backward takes apart from the output's and adds in float32.
        Each has the gradient of its own readers only. Else, and without gradients, the same object
        twice.

    Raises:
        RuntimeError: shapes, dtypes or devices disagree, a group would hold fewer than two values
            of a channel, or the slope is negative or not finite; in backward, of a second
            derivative.

    Source: Ioffe & Szegedy 2015, algorithms 1 and 2; groups: Hoffer et al. 2017, algorithm 1.
    """
    check(
        x, weight, bias, running_mean, running_var, training, num_groups, residual, negative_slope
    )
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    norm = Norm(weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps)
    mode = Mode(training, num_groups, relu, negative_slope)
    inputs = (x, weight, bias, residual)
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if not wants_grad:
        y, *_ = _forward(x, norm, residual, mode, wants_bits=False)
        return (y, y) if fork else y
    is_split = fork and relu  # without ReLU the sum itself is the residual's gradient
    y = _BatchNormAct.apply(*inputs, norm, mode, is_split)
    return (y, y) if fork and not is_split else y


def shared_norm_act(
    x: Tensor, norm: Norm, *, training: bool, num_groups: int = 1, negative_slope: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Normalises and rectifies by the kernels, and hands x on; differentiable once.

    Args:
        x: (N, C, H, W) bfloat16, float16 or float32, C a multiple of 8; copied unless
            channels_last.
        norm: Of x's channels; running statistics are updated as by `batch_norm_act`.
        training: Whether statistics are the minibatch's, and not the running ones.
        num_groups: Groups of consecutive images with statistics of their own, in training.
        negative_slope: 0 for ReLU, more for leaky ReLU.

    Returns:
        (N, C, H, W) of x's dtype, channels_last, and where x wants a gradient an alias of x: the
        same memory, whose gradient backward adds to that of the norm in float32. Each has the
        gradient of its own readers only, x that of both. Else x itself.

    Raises:
        RuntimeError: as from `batch_norm_act`.

    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks", figure 1 (b).
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        y = batch_norm_act(
            x,
            *norm[:4],
            training=training,
            momentum=norm.momentum,
            eps=norm.eps,
            num_groups=num_groups,
            negative_slope=negative_slope,
            num_batches_tracked=norm.num_batches_tracked,
        )
        assert isinstance(y, Tensor)  # not forked
        return y, x
    check(x, *norm[:4], training, num_groups, None, negative_slope)
    x = x.contiguous(memory_format=torch.channels_last)
    mode = Mode(training, num_groups, True, negative_slope)
    outputs: tuple[Tensor, Tensor] = _SharedNormAct.apply(x, norm.weight, norm.bias, norm, mode)
    return outputs
