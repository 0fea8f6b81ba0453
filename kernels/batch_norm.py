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
consecutive images, of near-equal number as `torch.tensor_split` cuts them, each with its own
statistics; running statistics take one update with the mean over the groups of their means and of
their unbiased variances.

Fused, three kernels each way: forward (1) statistics of row chunks, (2) their merge, running
statistics, a and b, (3) y; backward (4) dz and the two sums of row chunks, (5) their merge, k1 and
k2, (6) dx. ReLU's mask is recomputed from x, which backward reads anyway; with a residual it is
kept as 1 bit per element. y is never kept for backward.

Bytes per element, 16-bit activations, forward + backward (residual's gradient included):

    BN + ReLU         6     + 10        eager, ReLU apart           10 + 16
    BN + add + ReLU   8.125 + 12.125    eager, add and ReLU apart   16 + 16
      read twice      8.125 + 14.125    eager, and a sum            16 + 22
    BN                6     + 10        eager                        6 + 10

The output of a residual block has two readers, the next block and its shortcut, whose gradients
autograd would sum in a kernel of its own: two reads and a write. With `fork` there is an output for
each, one and the same tensor in memory, and (4) reads both gradients and sums them. Both live until
(6) is done, where there was their sum: one tensor more while this backward runs.

Numerics: float32 throughout; results are rounded once, except that dx behind a residual follows
from the rounded dz, which only leaky ReLU's s * dy notices. A chunk's deviations are taken from the
mean of its first rows, and chunks are merged by their means (Chan et al.), so that mean 1000 with
deviation 2 keeps five digits of the variance. NaN passes the ReLU, both ways, as in PyTorch, whose
leaky ReLU, unlike this one, scales NaN's gradient. No atomics: results are the same in every run.

Sources: Ioffe & Szegedy, "Batch Normalization", 2015; Chan, Golub & LeVeque, "Updating Formulae and
a Pairwise Algorithm for Computing Sample Variances", 1979, eq. 2.1; Hoffer et al., "Train longer,
generalize better", 2017 (ghost batch norm).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Arguments that kernels are not compiled anew for: a network has many shapes. What alignment needs
# to be known is in channels8.
SHAPE = ("num_images", "image_rows", "num_groups", "channels8", "num_chunks", "chunk_rows")

try:
    import triton
    import triton.language as tl

    jit = triton.jit(do_not_specialize=SHAPE)
except ImportError:  # torch builds without CUDA may come without Triton; the reference remains

    def jit(kernel):
        """Leaves a kernel as it is; nothing launches it."""
        return kernel


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Channels that one thread loads in 16 bytes of a 16-bit dtype, and that share a byte of mask.
LANES = 8
NUM_THREADS = 128
# A tile of a tensor: two accesses of 16 bytes a thread. Each program has two tiles under way, so
# that 48 KB or more are on their way to an SM; at 4.3 TB/s an H200 gives it 33 KB a microsecond.
TILE_BYTES = 4096
MAX_COLUMNS = 128
# Tiles per program of the elementwise kernels: what they know of a channel is loaded once for all.
TILES = 4
# Programs of the reductions per SM. All run at once: each is held to its share of the registers,
# which neither spills at on sm_80 and sm_90.
STATS_PER_SM = 6
REDUCE_PER_SM = 4
# The merges: few columns, so that many programs share the chunks; 32 bytes are one DRAM sector.
# Few or many chunks at once: sizes between let ptxas spill a register or two.
MERGE_COLUMNS = 8
MERGE_ROWS = (32, 512)
MERGE_WARPS = 8

# Where a kernel takes ReLU's mask from.
NO_MASK = 0
RECOMPUTED = 1
BITS = 2


class Rows(NamedTuple):
    """Activations as a matrix: which rows belong to which group, and how programs share them."""

    num_images: int
    image_rows: int  # H*W
    num_groups: int
    channels: int
    element_size: int  # bytes

    @property
    def columns(self) -> int:
        """Columns of a tile: the largest power of two that divides C, at most MAX_COLUMNS."""
        return min(self.channels & -self.channels, MAX_COLUMNS)

    @property
    def tile_rows(self) -> int:
        """Rows of a tile."""
        return TILE_BYTES // self.element_size // self.columns

    @property
    def column_blocks(self) -> int:
        """Tiles side by side."""
        return self.channels // self.columns

    @property
    def largest_group(self) -> int:
        """Rows of the first group; none has more."""
        return -(-self.num_images // self.num_groups) * self.image_rows

    def chunks(self, num_programs: int) -> tuple[int, int]:
        """Chunks of a group, and rows in each, for about `num_programs` programs in all."""
        tiles = -(-self.largest_group // self.tile_rows)
        wanted = max(1, num_programs // (self.column_blocks * self.num_groups))
        chunk_rows = -(-tiles // min(wanted, tiles)) * self.tile_rows
        return -(-self.largest_group // chunk_rows), chunk_rows

    @property
    def elementwise_grid(self) -> tuple[int, int]:
        """Programs of the elementwise kernels."""
        per_column = -(-self.largest_group // (TILES * self.tile_rows))
        return per_column * self.column_blocks, self.num_groups


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
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification in plain PyTorch, and the path of a CPU; any memory format is kept.

    A chunk, a fused call and a concatenation are the cheapest groups on a CPU. The additions and
    the ReLU work in place: no backward pass reads what they overwrite. Both outputs of a fork are
    one object, and autograd sums their gradients.
    """
    check(
        x, weight, bias, running_mean, running_var, training, num_groups, residual, negative_slope
    )
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
def _group_rows(group, num_images, image_rows, num_groups):
    """First row of a group and its number of rows, int64; larger groups come first."""
    images = num_images // num_groups
    remainder = num_images % num_groups
    first = group * images + tl.minimum(group, remainder)
    count = images + (group < remainder).to(tl.int32)
    return first.to(tl.int64) * image_rows, count.to(tl.int64) * image_rows


@jit
def _unpack(bits, BM: tl.constexpr, BC: tl.constexpr):
    """[BM, BC/8] bytes to [BM, BC] booleans."""
    shifts = tl.arange(0, 8)[None, None, :]
    return tl.reshape((bits.to(tl.int32)[:, :, None] >> shifts) & 1, [BM, BC]) != 0


@jit
def _leak(values, SLOPE: tl.constexpr):
    """What becomes of values where z <= 0. ReLU's zero is no product: 0 * inf is NaN."""
    if SLOPE == 0.0:
        return tl.zeros_like(values)
    else:
        return values * SLOPE


@jit
def _stats_kernel(
    partial_ptr,  # [2, G, P, C] fp32, output: a chunk's sums; squared deviations from its mean
    x_ptr,  # [M, C] bf16 | fp16 | fp32
    num_images,  # N
    image_rows,  # H*W
    num_groups,  # G
    channels8,  # C/8, so that the compiler knows that rows are aligned
    num_chunks,  # P
    chunk_rows,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """A chunk of rows of a group, BC columns of it."""
    C = channels8 * 8
    plane = num_groups.to(tl.int64) * C
    blocks = channels8 // (BC // 8)
    chunk = tl.program_id(0) // blocks
    group = tl.program_id(1)
    cols = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    rows = tl.arange(0, BM)
    first, count = _group_rows(group, num_images, image_rows, num_groups)
    start = chunk.to(tl.int64) * chunk_rows
    left = tl.maximum(tl.minimum(count - start, chunk_rows), 0).to(tl.int32)
    x_ptr += (first + start) * C
    sums = tl.zeros([BM, BC], tl.float32)
    squares = tl.zeros([BM, BC], tl.float32)
    at = rows[:, None] * C + cols[None, :]
    inside = (rows < left)[:, None]
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    shift = tl.sum(x.to(tl.float32), 0) / tl.maximum(tl.minimum(left, BM), 1)
    done = tl.full([], 0, tl.int32)
    while done < left:  # the interpreter has no range() with a bound known at run time
        done += BM
        # The next tile is under way while this one is added up.
        is_next = (rows < left - done)[:, None]
        x_next = tl.load(x_ptr + done.to(tl.int64) * C + at, mask=is_next)
        deviation = tl.where(inside, x.to(tl.float32) - shift[None, :], 0.0)
        sums += deviation
        squares += deviation * deviation
        inside, x = is_next, x_next
    num = left.to(tl.float32)
    total = tl.sum(sums, 0)
    out = (group.to(tl.int64) * num_chunks + chunk) * C + cols
    tl.store(partial_ptr + out, total + num * shift)
    squared = tl.sum(squares, 0) - total * (total / tl.maximum(num, 1.0))
    tl.store(partial_ptr + out + plane * num_chunks, squared)


@jit
def _merge_stats_kernel(
    coefficients_ptr,  # [4, G, C] fp32, output: a, b, mean, rstd
    running_mean_ptr,  # [C] fp32, updated in place if HAS_RUNNING
    running_var_ptr,  # [C] fp32, updated in place if HAS_RUNNING
    partial_ptr,  # [2, G, P, C] fp32
    weight_ptr,  # [C] fp32; unused without HAS_WEIGHT
    bias_ptr,  # [C] fp32; unused without HAS_BIAS
    num_images,  # N
    image_rows,  # H*W
    num_groups,  # G
    channels8,  # C/8
    num_chunks,  # P
    chunk_rows,
    momentum,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RUNNING: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """All groups and chunks of BC columns."""
    C = channels8 * 8
    plane = num_groups.to(tl.int64) * C
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    chunks = tl.arange(0, BP)
    weight = tl.full([BC], 1.0, tl.float32)
    bias = tl.zeros([BC], tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols)
    all_means = tl.zeros([BC], tl.float32)
    all_variances = tl.zeros([BC], tl.float32)
    group = tl.full([], 0, tl.int32)
    while group < num_groups:
        _, count = _group_rows(group, num_images, image_rows, num_groups)
        sums_ptr = partial_ptr + group.to(tl.int64) * num_chunks * C
        sums = tl.zeros([BP, BC], tl.float32)
        done = tl.full([], 0, tl.int32)
        while done < num_chunks:
            chunk = done + chunks
            at = chunk[:, None] * C + cols[None, :]
            sums += tl.load(sums_ptr + at, mask=(chunk < num_chunks)[:, None], other=0.0)
            done += BP
        total = count.to(tl.float32)
        mean = tl.div_rn(tl.sum(sums, 0), total)
        squares = tl.zeros([BP, BC], tl.float32)
        done = tl.full([], 0, tl.int32)
        while done < num_chunks:
            chunk = done + chunks
            at = chunk[:, None] * C + cols[None, :]
            mask = (chunk < num_chunks)[:, None]
            rows = tl.minimum(count - chunk.to(tl.int64) * chunk_rows, chunk_rows)
            num = tl.maximum(rows, 0).to(tl.float32)[:, None]
            sums = tl.load(sums_ptr + at, mask=mask, other=0.0)
            within = tl.load(sums_ptr + plane * num_chunks + at, mask=mask, other=0.0)
            between = sums / tl.maximum(num, 1.0) - mean[None, :]
            squares += tl.where(mask, within + num * between * between, 0.0)
            done += BP
        # Rounding may leave a constant column a hair below zero.
        squared = tl.maximum(tl.sum(squares, 0), 0.0, propagate_nan=tl.PropagateNan.ALL)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squared, total) + eps))
        a = weight * rstd
        out = coefficients_ptr + group.to(tl.int64) * C + cols
        tl.store(out, a)
        tl.store(out + plane, bias - mean * a)
        tl.store(out + 2 * plane, mean)
        tl.store(out + 3 * plane, rstd)
        all_means += mean
        all_variances += tl.div_rn(squared, total - 1.0)
        group += 1
    if HAS_RUNNING:
        groups = num_groups.to(tl.float32)
        mean = (1.0 - momentum) * tl.load(running_mean_ptr + cols)
        tl.store(running_mean_ptr + cols, mean + momentum * tl.div_rn(all_means, groups))
        variance = (1.0 - momentum) * tl.load(running_var_ptr + cols)
        tl.store(running_var_ptr + cols, variance + momentum * tl.div_rn(all_variances, groups))


@jit
def _running_coefficients_kernel(
    coefficients_ptr,  # [4, 1, C] fp32, output: a, b, mean, rstd
    running_mean_ptr,  # [C] fp32
    running_var_ptr,  # [C] fp32
    weight_ptr,  # [C] fp32; unused without HAS_WEIGHT
    bias_ptr,  # [C] fp32; unused without HAS_BIAS
    channels,  # C
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Eval mode. Backward must not read the running statistics: a training pass may move them."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < channels
    mean = tl.load(running_mean_ptr + cols, mask=inside)
    variance = tl.load(running_var_ptr + cols, mask=inside, other=1.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    a = rstd
    if HAS_WEIGHT:
        a = rstd * tl.load(weight_ptr + cols, mask=inside)
    b = -mean * a
    if HAS_BIAS:
        b = tl.load(bias_ptr + cols, mask=inside) - mean * a
    tl.store(coefficients_ptr + cols, a, mask=inside)
    tl.store(coefficients_ptr + channels + cols, b, mask=inside)
    tl.store(coefficients_ptr + 2 * channels + cols, mean, mask=inside)
    tl.store(coefficients_ptr + 3 * channels + cols, rstd, mask=inside)


@jit
def _forward_kernel(
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
    first, count = _group_rows(group, num_images, image_rows, num_groups)
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
            keep = tl.reshape(tl.where(z <= 0.0, 0, 1), [BM, BC // 8, 8])
            packed = tl.sum(keep << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)
            at_bits = rows[:, None] * channels8 + (block * (BC // 8) + tl.arange(0, BC // 8))
            tl.store(bits_ptr + row * channels8 + at_bits, packed, mask=inside)
        if RELU and SLOPE == 0.0:  # one instruction
            z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        elif RELU:
            z = tl.where(z <= 0.0, _leak(z, SLOPE), z)
        tl.store(y_ptr + row * C + at, z.to(y_ptr.dtype.element_ty), mask=inside)
        inside, x = is_next, x_next
        row += BM


@jit
def _backward_reduce_kernel(
    partial_ptr,  # [2, G, P, C] fp32, output: a chunk's sums of dz and of dz * (x - mean)
    dz_ptr,  # [M, C] like dy, output if MASK is BITS
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
    chunk_rows,
    MASK: tl.constexpr,
    SLOPE: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """A chunk of rows of a group, BC columns of it."""
    C = channels8 * 8
    plane = num_groups.to(tl.int64) * C
    blocks = channels8 // (BC // 8)
    chunk = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    group = tl.program_id(1)
    cols = block * BC + tl.arange(0, BC)
    rows = tl.arange(0, BM)
    first, count = _group_rows(group, num_images, image_rows, num_groups)
    start = chunk.to(tl.int64) * chunk_rows
    left = tl.maximum(tl.minimum(count - start, chunk_rows), 0).to(tl.int32)
    known = coefficients_ptr + group.to(tl.int64) * C + cols
    mean = tl.load(known + 2 * plane)[None, :]
    if MASK == 1:
        a = tl.load(known)[None, :]
        b = tl.load(known + plane)[None, :]
    at = rows[:, None] * C + cols[None, :]
    at_bits = rows[:, None] * channels8 + (block * (BC // 8) + tl.arange(0, BC // 8))
    sums = tl.zeros([BM, BC], tl.float32)
    products = tl.zeros([BM, BC], tl.float32)
    row = first + start
    inside = (rows < left)[:, None]
    dy = tl.load(dy_ptr + row * C + at, mask=inside, other=0.0)
    if shortcut_dy_ptr is not None:
        shortcut_dy = tl.load(shortcut_dy_ptr + row * C + at, mask=inside, other=0.0)
    x = tl.load(x_ptr + row * C + at, mask=inside, other=0.0)
    if MASK == 2:
        bits = tl.load(bits_ptr + row * channels8 + at_bits, mask=inside)
    while left > 0:
        left -= BM
        is_next = (rows < left)[:, None]
        dy_next = tl.load(dy_ptr + (row + BM) * C + at, mask=is_next, other=0.0)
        x_next = tl.load(x_ptr + (row + BM) * C + at, mask=is_next, other=0.0)
        dz = dy.to(tl.float32)
        if shortcut_dy_ptr is not None:
            dz += shortcut_dy.to(tl.float32)
        x32 = x.to(tl.float32)
        if MASK == 1:
            dz = tl.where(tl.fma(x32, a, b) <= 0.0, _leak(dz, SLOPE), dz)
        if MASK == 2:
            bits_next = tl.load(bits_ptr + (row + BM) * channels8 + at_bits, mask=is_next)
            dz = tl.where(_unpack(bits, BM, BC), dz, _leak(dz, SLOPE))
            tl.store(dz_ptr + row * C + at, dz.to(dz_ptr.dtype.element_ty), mask=inside)
            bits = bits_next
        if shortcut_dy_ptr is not None:
            # Not beside the other two loads: there, sm_80 spills two registers of 128.
            shortcut_dy = tl.load(shortcut_dy_ptr + (row + BM) * C + at, mask=is_next, other=0.0)
        sums += dz
        products += dz * (x32 - mean)
        inside, dy, x = is_next, dy_next, x_next
        row += BM
    out = (group.to(tl.int64) * num_chunks + chunk) * C + cols
    tl.store(partial_ptr + out, tl.sum(sums, 0))
    tl.store(partial_ptr + out + plane * num_chunks, tl.sum(products, 0))


@jit
def _merge_sums_kernel(
    k_ptr,  # [2, G, C] fp32, output if TRAINING: k1, k2
    dweight_ptr,  # [C] fp32, output
    dbias_ptr,  # [C] fp32, output
    partial_ptr,  # [2, G, P, C] fp32
    coefficients_ptr,  # [4, G, C] fp32: a, b, mean, rstd
    num_images,  # N
    image_rows,  # H*W
    num_groups,  # G
    channels8,  # C/8
    num_chunks,  # P
    TRAINING: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """All groups and chunks of BC columns."""
    C = channels8 * 8
    plane = num_groups.to(tl.int64) * C
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    chunks = tl.arange(0, BP)
    dweight = tl.zeros([BC], tl.float32)
    dbias = tl.zeros([BC], tl.float32)
    group = tl.full([], 0, tl.int32)
    while group < num_groups:
        sums_ptr = partial_ptr + group.to(tl.int64) * num_chunks * C
        sums = tl.zeros([BP, BC], tl.float32)
        products = tl.zeros([BP, BC], tl.float32)
        done = tl.full([], 0, tl.int32)
        while done < num_chunks:
            chunk = done + chunks
            at = chunk[:, None] * C + cols[None, :]
            mask = (chunk < num_chunks)[:, None]
            sums += tl.load(sums_ptr + at, mask=mask, other=0.0)
            products += tl.load(sums_ptr + plane * num_chunks + at, mask=mask, other=0.0)
            done += BP
        known = coefficients_ptr + group.to(tl.int64) * C + cols
        rstd = tl.load(known + 3 * plane)
        of_bias = tl.sum(sums, 0)
        of_weight = tl.sum(products, 0) * rstd
        if TRAINING:
            _, count = _group_rows(group, num_images, image_rows, num_groups)
            share = tl.div_rn(-tl.load(known), count.to(tl.float32))  # -a / M
            k1 = share * rstd * of_weight
            out = k_ptr + group.to(tl.int64) * C + cols
            tl.store(out, k1)
            tl.store(out + plane, share * of_bias - k1 * tl.load(known + 2 * plane))
        dweight += of_weight
        dbias += of_bias
        group += 1
    tl.store(dweight_ptr + cols, dweight)
    tl.store(dbias_ptr + cols, dbias)


@jit
def _backward_kernel(
    dx_ptr,  # [M, C] bf16 | fp16 | fp32, output
    dz_ptr,  # [M, C] like dx, output if WRITE_DZ
    dy_ptr,  # [M, C] like dx
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
    first, count = _group_rows(group, num_images, image_rows, num_groups)
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
    if TRAINING or MASK == 1:
        x = tl.load(x_ptr + row * C + at, mask=inside)
    if MASK == 2:
        bits = tl.load(bits_ptr + row * channels8 + at_bits, mask=inside)
    for _ in tl.static_range(TILES):
        left -= BM
        is_next = (rows < left)[:, None]
        dy_next = tl.load(dy_ptr + (row + BM) * C + at, mask=is_next)
        dz = dy.to(tl.float32)
        if TRAINING or MASK == 1:
            x_next = tl.load(x_ptr + (row + BM) * C + at, mask=is_next)
            x32 = x.to(tl.float32)
            x = x_next
        if MASK == 1:
            dz = tl.where(tl.fma(x32, a, b) <= 0.0, _leak(dz, SLOPE), dz)
        if MASK == 2:
            bits_next = tl.load(bits_ptr + (row + BM) * channels8 + at_bits, mask=is_next)
            dz = tl.where(_unpack(bits, BM, BC), dz, _leak(dz, SLOPE))
            bits = bits_next
        if WRITE_DZ:
            tl.store(dz_ptr + row * C + at, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        dx = a * dz
        if TRAINING:
            dx = tl.fma(dz, a, tl.fma(x32, k1, k2))
        tl.store(dx_ptr + row * C + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        inside, dy = is_next, dy_next
        row += BM


def supports(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
) -> bool:
    """Whether the kernels take these activations."""
    vectors = (weight, bias, running_mean, running_var)
    return (
        x.dtype in DTYPES
        and x.dim() == 4
        and x.shape[1] % LANES == 0
        and x.numel() > 0
        and all(v is None or (v.dtype is torch.float32 and v.is_contiguous()) for v in vectors)
    )


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    """SMs of a GPU; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _max_registers(programs: int) -> int:
    """Registers of a thread where so many programs share the 65,536 of an SM; a multiple of 8."""
    return 65536 // (programs * NUM_THREADS) // 8 * 8


def _merge_rows(num_chunks: int) -> int:
    """Chunks that a merge loads at once."""
    few, many = MERGE_ROWS
    return few if num_chunks <= few else many


class Mode(NamedTuple):
    """What is computed, as numbers and switches."""

    training: bool
    momentum: float
    eps: float
    num_groups: int
    relu: bool
    negative_slope: float

    def rows(self, x: Tensor) -> Rows:
        """x as a matrix. In eval mode all images are one group."""
        num, channels, height, width = x.shape
        groups = self.num_groups if self.training else 1
        return Rows(num, height * width, groups, channels, x.element_size())


def _coefficients(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mode: Mode,
) -> Tensor:
    """(4, G, C) float32: a, b, mean and rstd. In training the running statistics are updated."""
    rows = mode.rows(x)
    shape = (rows.num_images, rows.image_rows, rows.num_groups, rows.channels // LANES)
    coefficients = x.new_empty((4, rows.num_groups, rows.channels), dtype=torch.float32)
    switches = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}
    # What a kernel does not touch stands for a tensor that is not there.
    weight = coefficients if weight is None else weight
    bias = coefficients if bias is None else bias
    if not mode.training:
        _running_coefficients_kernel[(triton.cdiv(rows.channels, NUM_THREADS),)](
            coefficients,
            running_mean,
            running_var,
            weight,
            bias,
            rows.channels,
            mode.eps,
            **switches,
            BLOCK=NUM_THREADS,
            num_warps=NUM_THREADS // 32,
        )
        return coefficients
    num_chunks, chunk_rows = rows.chunks(STATS_PER_SM * _num_multiprocessors(x.device))
    partial = coefficients.new_empty((2, rows.num_groups, num_chunks, rows.channels))
    _stats_kernel[(num_chunks * rows.column_blocks, rows.num_groups)](
        partial,
        x,
        *shape,
        num_chunks,
        chunk_rows,
        BM=rows.tile_rows,
        BC=rows.columns,
        num_warps=NUM_THREADS // 32,
        maxnreg=_max_registers(STATS_PER_SM),
    )
    _merge_stats_kernel[(rows.channels // MERGE_COLUMNS,)](
        coefficients,
        coefficients if running_mean is None else running_mean,
        coefficients if running_var is None else running_var,
        partial,
        weight,
        bias,
        *shape,
        num_chunks,
        chunk_rows,
        mode.momentum,
        mode.eps,
        **switches,
        HAS_RUNNING=running_mean is not None,
        BP=_merge_rows(num_chunks),
        BC=MERGE_COLUMNS,
        num_warps=MERGE_WARPS,
    )
    return coefficients


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mode: Mode,
    wants_bits: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the coefficients, and ReLU's bits if wanted. x and residual are channels_last."""
    rows = mode.rows(x)
    with torch.cuda.device_of(x):
        coefficients = _coefficients(x, weight, bias, running_mean, running_var, mode)
        y = torch.empty_like(x, memory_format=torch.channels_last)
        bits = x.new_empty(x.numel() // 8, dtype=torch.uint8) if wants_bits else None
        _forward_kernel[rows.elementwise_grid](
            y,
            y if bits is None else bits,
            x,
            x if residual is None else residual,
            coefficients,
            rows.num_images,
            rows.image_rows,
            rows.num_groups,
            rows.channels // LANES,
            HAS_RESIDUAL=residual is not None,
            RELU=mode.relu,
            SLOPE=mode.negative_slope,
            WRITE_BITS=wants_bits,
            BM=rows.tile_rows,
            BC=rows.columns,
            TILES=TILES,
            num_warps=NUM_THREADS // 32,
        )
    return y, coefficients, bits


def _backward(
    dy: Tensor,
    shortcut_dy: Tensor | None,
    x: Tensor,
    coefficients: Tensor,
    bits: Tensor | None,
    mode: Mode,
    wants_dx: bool,
    wants_affine: bool,
    wants_dz: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias and, where ReLU's bits were kept, dz; None where not wanted.

    dy, shortcut_dy and x are channels_last. A shortcut_dy is added to dy; ReLU's bits are there.
    """
    rows = mode.rows(x)
    shape = (rows.num_images, rows.image_rows, rows.num_groups, rows.channels // LANES)
    tile = {"BM": rows.tile_rows, "BC": rows.columns, "num_warps": NUM_THREADS // 32}
    mask = NO_MASK if not mode.relu else RECOMPUTED if bits is None else BITS
    wants_dz = wants_dz and mask == BITS
    has_sums = wants_affine or (mode.training and wants_dx)
    dx = dweight = dbias = dz = k = None
    if shortcut_dy is not None and not has_sums:  # only the residual's gradient is wanted
        dy, shortcut_dy = dy + shortcut_dy, None
    with torch.cuda.device_of(dy):
        if has_sums:
            num_chunks, chunk_rows = rows.chunks(REDUCE_PER_SM * _num_multiprocessors(dy.device))
            partial = coefficients.new_empty((2, rows.num_groups, num_chunks, rows.channels))
            dz = torch.empty_like(dy) if mask == BITS else None
            _backward_reduce_kernel[(num_chunks * rows.column_blocks, rows.num_groups)](
                partial,
                dy if dz is None else dz,
                dy,
                shortcut_dy,
                x,
                x if bits is None else bits,
                coefficients,
                *shape,
                num_chunks,
                chunk_rows,
                MASK=mask,
                SLOPE=mode.negative_slope,
                **tile,
                maxnreg=_max_registers(REDUCE_PER_SM),
            )
            k = coefficients.new_empty((2, rows.num_groups, rows.channels))
            dweight, dbias = (coefficients.new_empty(rows.channels) for _ in range(2))
            _merge_sums_kernel[(rows.channels // MERGE_COLUMNS,)](
                k,
                dweight,
                dbias,
                partial,
                coefficients,
                *shape,
                num_chunks,
                TRAINING=mode.training,
                BP=_merge_rows(num_chunks),
                BC=MERGE_COLUMNS,
                num_warps=MERGE_WARPS,
            )
            if dz is not None:  # from here on it stands for dy
                dy, mask = dz, NO_MASK
        if wants_dx or (wants_dz and dz is None):
            dx = torch.empty_like(dy)
            writes_dz = wants_dz and dz is None
            dz = torch.empty_like(dy) if writes_dz else dz
            _backward_kernel[rows.elementwise_grid](
                dx,
                dx if dz is None else dz,
                dy,
                x,
                x if bits is None else bits,
                coefficients,
                coefficients if k is None else k,
                *shape,
                TRAINING=mode.training and has_sums,
                MASK=mask,
                SLOPE=mode.negative_slope,
                WRITE_DZ=writes_dz,
                TILES=TILES,
                **tile,
            )
    return dx, dweight, dbias, dz


class _BatchNormAct(torch.autograd.Function):
    """y, and its gradients; forked, y twice."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, running_mean, running_var, mode, fork):
        """Keeps x, the coefficients and perhaps ReLU's bits; never y, nor the residual."""
        wants_bits = mode.relu and residual is not None
        y, coefficients, bits = _forward(
            x, weight, bias, residual, running_mean, running_var, mode, wants_bits
        )
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
        return dx, dweight, dbias if wants_bias else None, dresidual, None, None, None, None


class _Gradients(torch.autograd.Function):
    """`_backward` as a node of its own, whose own derivative is an error that says what to do.

    `torch.autograd.function.once_differentiable` would say less.
    """

    @staticmethod
    def forward(ctx, dy, shortcut_dy, x, weight, *arguments):
        """The weight is named only so that its second derivative is an error too."""
        return _backward(dy, shortcut_dy, x, *arguments)

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

    Returns:
        (N, C, H, W) of x's dtype, channels_last. With `fork` it and, behind ReLU and a residual in
        training, an alias of it: the same memory, whose gradient backward takes apart from the
        output's and adds in float32. Each has the gradient of its own readers only. Else, and
        without gradients, the same object twice.

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
    mode = Mode(training, momentum, eps, num_groups, relu, negative_slope)
    inputs = (x, weight, bias, residual)
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if not wants_grad:
        y, *_ = _forward(*inputs, running_mean, running_var, mode, wants_bits=False)
        return (y, y) if fork else y
    # What other kernels than the reduction behind ReLU's bits would have to sum, autograd sums.
    is_split = fork and training and relu and residual is not None
    y = _BatchNormAct.apply(*inputs, running_mean, running_var, mode, is_split)
    return (y, y) if fork and not is_split else y
