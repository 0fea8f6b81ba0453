"""Mean and variance of NHWC activations' channels, by groups of images, as batch norm wants them.

Activations are rows of a matrix [M, C] with M = N*H*W; every channel is a column.

    shift     = mean of a few rows spread over a group, in x's dtype
    S, Q      = sum(x - shift), sum((x - shift)^2)          of each column, over the group's rows
    mean      = shift + S / M,  var = (Q - S^2 / M) / M
    a         = weight / sqrt(var + eps),  b = bias - mean * a,  rstd = 1 / sqrt(var + eps)
    running_* <- (1 - momentum) * running_* + momentum * (mean over the groups)

One kernel reads x once, 2 bytes an element in half precision. Each of its programs sums tiles of
rows; whichever of them is the last to store its sums adds up all of theirs, always in the same
order, so that no kernel of its own is launched for that (106 a ResNet-50 pass, 4.8 us each) and
results are the same in every run. The sums of the backward pass (batch_norm_backward.py) end
likewise.

Programs start at the last rows. The convolution before has just written them, and up to 50 MB are
still in an H200's L2 cache; the kernels after this one start at the first rows, which it read last.

Numerics: float32. The shift lies within a few deviations of the mean whatever the mean, so that
mean 1000 with deviation 2 keeps five digits of the variance. Groups (ghost batch norm) are
consecutive images, of near-equal number as `torch.tensor_split` cuts them; running statistics take
the mean over the groups of their means and of their unbiased variances.

Sources: Ioffe & Szegedy, "Batch Normalization", 2015; Chan, Golub & LeVeque, "Algorithms for
Computing the Sample Variance", 1983, section 3 (shifted data); Hoffer et al., "Train longer,
generalize better", 2017 (ghost batch norm).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

# Arguments that kernels are not compiled anew for: a network has many shapes. What alignment needs
# to be known is in channels8.
SHAPE = ("num_images", "image_rows", "num_groups", "channels8", "num_chunks", "pixels")

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
THREAD_BYTES = 16
MAX_COLUMNS = 128
# Accesses of 16 bytes to each of two planes of sums that the last program's threads have under way.
MERGE_LOADS = 8
# Counters of a stream, one a tile's columns: 8 channels where their number is 8 times an odd one.
# Recordings take two or three streams; those beyond this number get zeros made anew.
NUM_COUNTERS = 4096
NUM_STREAMS = 65


class Schedule(NamedTuple):
    """How a kernel that sums over rows fills an SM.

    Attributes:
        columns: Of a tile, at most. Few of them leave few programs' sums to the last program.
        num_warps: Of a program. Its tile is one access of 16 bytes a thread.
        per_sm: Programs on an SM. All run at once: each is held to its share of the registers.
        depth: Tiles of each input that a program has under way. At 4.3 TB/s an H200 gives an SM
            33 KB a microsecond, which is about what a load takes.
        turn: Tiles that one turn of its loop takes: all of them, so that none moves from register
            to register, or one, which takes fewer registers.
    """

    columns: int
    num_warps: int
    per_sm: int
    depth: int
    turn: int

    @property
    def max_registers(self) -> int:
        """Registers of a thread where these programs share the 65,536 of an SM; in eights."""
        return min(65536 // (self.per_sm * self.num_warps * 32) // 8 * 8, 255)

    def options(self, rows: Rows) -> dict[str, int]:
        """The kernel's constants and the compiler's options, for rows in its tiles."""
        return {
            "BM": rows.tile_rows(self.num_warps),
            "BC": rows.columns,
            "BP": self.num_warps * 32 * 4 // rows.columns,
            "LOADS": MERGE_LOADS,
            "DEPTH": self.depth,
            "TURN": self.turn,
            "num_warps": self.num_warps,
            "maxnreg": self.max_registers,
        }


# All norms of a ResNet-50 at batch 256, forward, on an H200
# (bench/results/h200/trials/batch-norm.log): 5.69 ms (bytes 4.86). Half as many
# tiles 5.73, three programs 5.80, 16 warps 5.84; two tiles of twice the size, six programs of four
# warps and a kernel apart for their merge 5.93.
STATISTICS = Schedule(columns=128, num_warps=8, per_sm=2, depth=8, turn=8)


class Rows(NamedTuple):
    """Activations as a matrix: which rows belong to which group, and how programs share them."""

    num_images: int
    image_rows: int  # H*W
    num_groups: int
    channels: int
    element_size: int  # bytes
    most_columns: int = MAX_COLUMNS  # of a tile

    def tiled(self, schedule: Schedule) -> Rows:
        """The same in a schedule's tiles."""
        return self._replace(most_columns=schedule.columns)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """What every kernel is told."""
        return self.num_images, self.image_rows, self.num_groups, self.channels // LANES

    @property
    def columns(self) -> int:
        """Columns of a tile: the largest power of two that divides C, if that is not too many."""
        return min(self.channels & -self.channels, self.most_columns)

    def tile_rows(self, num_warps: int, accesses: int = 1) -> int:
        """Rows of a tile in which each thread has so many accesses of 16 bytes."""
        num_bytes = num_warps * 32 * accesses * THREAD_BYTES
        return num_bytes // self.element_size // self.columns

    @property
    def column_blocks(self) -> int:
        """Tiles side by side."""
        return self.channels // self.columns

    @property
    def largest_group(self) -> int:
        """Rows of the first group; none has more."""
        return -(-self.num_images // self.num_groups) * self.image_rows

    def num_chunks(self, schedule: Schedule, device: torch.device) -> int:
        """Programs that share a group's rows, which they take a tile each in turn."""
        tiles = -(-self.largest_group // self.tile_rows(schedule.num_warps))
        programs = schedule.per_sm * num_multiprocessors(device)
        wanted = max(1, programs // (self.column_blocks * self.num_groups))
        turns = -(-tiles // min(wanted, tiles))
        return -(-tiles // turns)


class Norm(NamedTuple):
    """A batch norm's tensors, each (C,) float32 and contiguous or None, and its numbers."""

    weight: Tensor | None  # None for ones
    bias: Tensor | None  # None for zeros
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None  # () int64
    momentum: float
    eps: float


def supports(x: Tensor, norm: Norm) -> bool:
    """Whether the kernels take these activations."""
    vectors, counter = norm[:4], norm.num_batches_tracked
    return (
        x.dtype in DTYPES
        and x.dim() == 4
        and x.shape[1] % LANES == 0
        and x.numel() > 0
        and all(v is None or (v.dtype is torch.float32 and v.is_contiguous()) for v in vectors)
        and (counter is None or (counter.dtype is torch.int64 and counter.device == x.device))
    )


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """SMs of a GPU; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


_COUNTERS: dict[tuple[torch.device, int], Tensor] = {}
_UNUSED_COUNTERS: dict[torch.device, list[Tensor]] = {}


def counters(num: int, device: torch.device) -> Tensor:
    """At least `num` int32 zeros, with which programs find their last one; it leaves zeros behind.

    A stream has its own, for its kernels follow one another. Recordings use those of the stream on
    which they were made: two of one stream must not run at once, which their memory forbids anyway.
    """
    is_cuda = device.type == "cuda"
    key = device, torch.cuda.current_stream(device).cuda_stream if is_cuda else 0
    if key not in _COUNTERS:
        is_recording = is_cuda and torch.cuda.is_current_stream_capturing()
        if device not in _UNUSED_COUNTERS and not is_recording:
            # From the host, which waits for the copy: other streams find zeros, too.
            zeros = torch.zeros((NUM_STREAMS, NUM_COUNTERS), dtype=torch.int32).to(device)
            _UNUSED_COUNTERS[device] = list(zeros.unbind())
        if _UNUSED_COUNTERS.get(device):
            _COUNTERS[key] = _UNUSED_COUNTERS[device].pop()
    found = _COUNTERS.get(key)
    if found is None or len(found) < num:
        return torch.zeros(num, dtype=torch.int32, device=device)
    return found


@jit
def group_rows(group, num_images, image_rows, num_groups):
    """First row of a group and its number of rows, int64; larger groups come first."""
    images = num_images // num_groups
    remainder = num_images % num_groups
    first = group * images + tl.minimum(group, remainder)
    count = images + (group < remainder).to(tl.int32)
    return first.to(tl.int64) * image_rows, count.to(tl.int64) * image_rows


@jit
def last_tile(chunk, count, num_chunks, C, BM: tl.constexpr):
    """A chunk's last tile, its offset in the group, and the distance to the chunk's tile before."""
    tile = ((count + BM - 1) // BM).to(tl.int32) - 1 - chunk
    return tile, tile.to(tl.int64) * BM * C, num_chunks.to(tl.int64) * BM * C


@jit
def tile_mask(tile, count, rows, BM: tl.constexpr):
    """Which rows of a tile are there: none before the first tile, where chunks end."""
    left = tl.where(tile < 0, 0, tl.minimum(count - tile.to(tl.int64) * BM, BM)).to(tl.int32)
    return (rows < left)[:, None]


@jit
def is_last(counter_ptr, num_programs):
    """Whether all other programs have been here: what they stored before, this one can load."""
    tl.debug_barrier()  # every thread's stores come before the one thread's count
    was_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_programs - 1
    if was_last:
        tl.store(counter_ptr, 0)
    return was_last


@jit
def merged(
    first_ptr,
    second_ptr,
    cols,
    num_chunks,
    C,
    BP: tl.constexpr,
    LOADS: tl.constexpr,
    BC: tl.constexpr,
):
    """Column sums of two planes [P, C] of what other programs have stored.

    From the L2 cache, where they stored it; an SM's own may hold what lay there before. All wait
    for the last program: many loads are under way at once.
    """
    first = tl.zeros([BP, BC], tl.float32)
    second = tl.zeros([BP, BC], tl.float32)
    done = tl.full([], 0, tl.int32)
    while done < num_chunks:  # the interpreter has no range() with a bound known at run time
        firsts, seconds = (), ()
        for _ in tl.static_range(LOADS):
            chunk = done + tl.arange(0, BP)
            at = chunk[:, None] * C + cols[None, :]
            mask = (chunk < num_chunks)[:, None]
            found = tl.load(first_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
            firsts = firsts + (found,)
            found = tl.load(second_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
            seconds = seconds + (found,)
            done += BP
        for i in tl.static_range(LOADS):
            first += firsts[i]
            second += seconds[i]
    return tl.sum(first, 0), tl.sum(second, 0)


@jit
def group_moments(
    shift,
    sums_ptr,
    squares_ptr,
    cols,
    total,
    num_chunks,
    C,
    BP: tl.constexpr,
    LOADS: tl.constexpr,
    BC: tl.constexpr,
):
    """A group's means, and sums of squared distances from them, of what its programs stored."""
    deviation, squared = merged(sums_ptr, squares_ptr, cols, num_chunks, C, BP, LOADS, BC)
    squared -= deviation * tl.div_rn(deviation, total)
    # Rounding may leave a constant column a hair below zero.
    squared = tl.maximum(squared, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return shift + tl.div_rn(deviation, total), squared


@jit
def update_running(running_ptrs, running, found, momentum):
    """Moves running statistics, which have been loaded, towards a minibatch's."""
    tl.store(running_ptrs, (1.0 - momentum) * running + momentum * found)


@jit
def _stats_kernel(
    coefficients_ptr,  # [4, G, C] fp32, output: a, b, mean, rstd
    running_mean_ptr,  # [C] fp32, updated in place; or None
    running_var_ptr,  # [C] fp32, updated in place; or None
    num_batches_ptr,  # [] i64, one is added; or None
    partial_ptr,  # [2, G, P, C] fp32, S and Q of chunks
    counters_ptr,  # [C/BC] i32, zeros before and after
    x_ptr,  # [M, C] bf16 | fp16 | fp32
    weight_ptr,  # [C] fp32; or None
    bias_ptr,  # [C] fp32; or None
    num_images,  # N
    image_rows,  # H*W
    num_groups,  # G
    channels8,  # C/8, so that the compiler knows that rows are aligned
    num_chunks,  # P
    momentum,
    eps,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
    LOADS: tl.constexpr,
    DEPTH: tl.constexpr,
    TURN: tl.constexpr,
):
    """A chunk of a group's rows, BC columns of it: every P-th tile."""
    C = channels8 * 8
    blocks = channels8 // (BC // 8)
    chunk = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    group = tl.program_id(1)
    cols = block * BC + tl.arange(0, BC)
    rows = tl.arange(0, BM)
    first, count = group_rows(group, num_images, image_rows, num_groups)
    x_ptr += first * C
    at = rows[:, None] * C + cols[None, :]
    tile, offset, step = last_tile(chunk, count, num_chunks, C, BM)
    tiles = ()
    for i in tl.static_range(DEPTH):
        inside = tile_mask(tile - i * num_chunks, count, rows, BM)
        tiles = tiles + (tl.load(x_ptr + (offset - i * step) + at, mask=inside),)
    spread = rows * count // BM
    sample = tl.load(x_ptr + spread[:, None] * C + cols[None, :]).to(tl.float32)
    # Of x's dtype, so that it can stand for rows that are not there, which add nothing then.
    fill = (tl.sum(sample, 0) / BM).to(x_ptr.dtype.element_ty)[None, :]
    shift = fill.to(tl.float32)
    filled = ()
    for i in tl.static_range(DEPTH):
        inside = tile_mask(tile - i * num_chunks, count, rows, BM)
        filled = filled + (tl.where(inside, tiles[i], fill),)
    tiles = filled
    sums = tl.zeros([BM, BC], tl.float32)
    squares = tl.zeros([BM, BC], tl.float32)
    while tile >= 0:
        for _ in tl.static_range(TURN):
            # Whole where it is there at all: only a group's last tile may be ragged.
            is_there = tile >= DEPTH * num_chunks
            x_next = tl.load(x_ptr + (offset - DEPTH * step) + at, mask=is_there, other=fill)
            deviation = tiles[0].to(tl.float32) - shift
            sums += deviation
            squares += deviation * deviation
            tiles = tiles[1:] + (x_next,)
            tile -= num_chunks
            offset -= step
    plane = num_groups.to(tl.int64) * C
    known = group.to(tl.int64) * C + cols
    out = partial_ptr + (group.to(tl.int64) * num_chunks + chunk) * C + cols
    tl.store(out, tl.sum(sums, 0))
    tl.store(out + plane * num_chunks, tl.sum(squares, 0))
    if chunk == 0:  # in the mean's place, until there is one
        tl.store(coefficients_ptr + 2 * plane + known, tl.reshape(shift, [BC]))
    if is_last(counters_ptr + block, num_chunks * num_groups):
        # What else it needs comes while it waits for the sums.
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + cols)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + cols)
        if running_mean_ptr is not None:
            running_mean = tl.load(running_mean_ptr + cols)
            running_var = tl.load(running_var_ptr + cols)
        means = tl.zeros([BC], tl.float32)
        variances = tl.zeros([BC], tl.float32)
        group = tl.full([], 0, tl.int32)
        while group < num_groups:
            _, count = group_rows(group, num_images, image_rows, num_groups)
            total = count.to(tl.float32)
            out = coefficients_ptr + group.to(tl.int64) * C + cols
            sums_ptr = partial_ptr + group.to(tl.int64) * num_chunks * C
            squares_ptr = sums_ptr + plane * num_chunks
            mean, squared = group_moments(
                tl.load(out + 2 * plane, cache_modifier=".cg"),
                sums_ptr,
                squares_ptr,
                cols,
                total,
                num_chunks,
                C,
                BP,
                LOADS,
                BC,
            )
            rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squared, total) + eps))
            a = rstd
            if weight_ptr is not None:
                a *= weight
            b = -mean * a
            if bias_ptr is not None:
                b += bias
            tl.store(out, a)
            tl.store(out + plane, b)
            tl.store(out + 2 * plane, mean)
            tl.store(out + 3 * plane, rstd)
            means += mean
            variances += tl.div_rn(squared, total - 1.0)
            group += 1
        if running_mean_ptr is not None:
            groups = num_groups.to(tl.float32)
            found = tl.div_rn(means, groups)
            update_running(running_mean_ptr + cols, running_mean, found, momentum)
            found = tl.div_rn(variances, groups)
            update_running(running_var_ptr + cols, running_var, found, momentum)
        if num_batches_ptr is not None:
            if block == 0:
                tl.store(num_batches_ptr, tl.load(num_batches_ptr) + 1)


@jit
def coefficients_of_moments(
    coefficients_ptr,  # [4, G, C] fp32, output: a, b, mean, rstd
    running_mean_ptr,  # [C] fp32, updated in place; or None
    running_var_ptr,  # [C] fp32, updated in place; or None
    num_batches_ptr,  # [] i64, one is added; or None
    moments_ptr,  # [2, G, C] fp32: mean, var
    weight_ptr,  # [C] fp32; or None
    bias_ptr,  # [C] fp32; or None
    cols,
    group,
    is_first,  # of the programs of these columns and this group
    num_images,
    image_rows,
    num_groups,
    C,
    momentum,
    eps,
    BC: tl.constexpr,
):
    """a and b of BC columns; the group's first program writes what others will ask for."""
    plane = num_groups.to(tl.int64) * C
    known = group.to(tl.int64) * C + cols
    mean = tl.load(moments_ptr + known)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.load(moments_ptr + plane + known) + eps))
    a = rstd
    if weight_ptr is not None:
        a *= tl.load(weight_ptr + cols)
    b = -mean * a
    if bias_ptr is not None:
        b += tl.load(bias_ptr + cols)
    if is_first:
        tl.store(coefficients_ptr + known, a)
        tl.store(coefficients_ptr + plane + known, b)
        tl.store(coefficients_ptr + 2 * plane + known, mean)
        tl.store(coefficients_ptr + 3 * plane + known, rstd)
        if running_mean_ptr is not None:
            if group == 0:
                means = tl.zeros([BC], tl.float32)
                variances = tl.zeros([BC], tl.float32)
                other = tl.full([], 0, tl.int32)
                while other < num_groups:
                    _, count = group_rows(other, num_images, image_rows, num_groups)
                    total = count.to(tl.float32)
                    theirs = moments_ptr + other.to(tl.int64) * C + cols
                    means += tl.load(theirs)
                    variances += tl.load(theirs + plane) * tl.div_rn(total, total - 1.0)
                    other += 1
                groups = num_groups.to(tl.float32)
                running = tl.load(running_mean_ptr + cols)
                update_running(running_mean_ptr + cols, running, tl.div_rn(means, groups), momentum)
                running = tl.load(running_var_ptr + cols)
                found = tl.div_rn(variances, groups)
                update_running(running_var_ptr + cols, running, found, momentum)
        if num_batches_ptr is not None:
            if tl.program_id(0) + tl.program_id(1) == 0:
                tl.store(num_batches_ptr, tl.load(num_batches_ptr) + 1)
    return a, b


@jit
def _running_coefficients_kernel(
    coefficients_ptr,  # [4, 1, C] fp32, output: a, b, mean, rstd
    running_mean_ptr,  # [C] fp32
    running_var_ptr,  # [C] fp32
    weight_ptr,  # [C] fp32; or None
    bias_ptr,  # [C] fp32; or None
    channels,  # C
    eps,
    BLOCK: tl.constexpr,
):
    """Eval mode. Backward must not read the running statistics: a training pass may move them."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < channels
    mean = tl.load(running_mean_ptr + cols, mask=inside)
    variance = tl.load(running_var_ptr + cols, mask=inside, other=1.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    a = rstd
    if weight_ptr is not None:
        a = rstd * tl.load(weight_ptr + cols, mask=inside)
    b = -mean * a
    if bias_ptr is not None:
        b = tl.load(bias_ptr + cols, mask=inside) - mean * a
    tl.store(coefficients_ptr + cols, a, mask=inside)
    tl.store(coefficients_ptr + channels + cols, b, mask=inside)
    tl.store(coefficients_ptr + 2 * channels + cols, mean, mask=inside)
    tl.store(coefficients_ptr + 3 * channels + cols, rstd, mask=inside)


def coefficients(x: Tensor, norm: Norm, rows: Rows, training: bool) -> Tensor:
    """a, b, mean and rstd of a batch norm; in training the running statistics are updated.

    Args:
        x: (N, C, H, W) bfloat16, float16 or float32, channels_last, as `supports` takes it.
        norm: Of x's channels, on x's device.
        rows: x as a matrix.
        training: Whether statistics are those of x, by groups, and not the running ones.

    Returns:
        (4, G, C) float32.
    """
    values = x.new_empty((4, rows.num_groups, rows.channels), dtype=torch.float32)
    if not training:
        _running_coefficients_kernel[(triton.cdiv(rows.channels, 128),)](
            values,
            norm.running_mean,
            norm.running_var,
            norm.weight,
            norm.bias,
            rows.channels,
            norm.eps,
            BLOCK=128,
            num_warps=4,
        )
        return values
    rows = rows.tiled(STATISTICS)
    num_chunks = rows.num_chunks(STATISTICS, x.device)
    _stats_kernel[(num_chunks * rows.column_blocks, rows.num_groups)](
        values,
        norm.running_mean,
        norm.running_var,
        norm.num_batches_tracked,
        values.new_empty((2, rows.num_groups, num_chunks, rows.channels)),
        counters(rows.column_blocks, x.device),
        x,
        norm.weight,
        norm.bias,
        *rows.shape,
        num_chunks,
        norm.momentum,
        norm.eps,
        **STATISTICS.options(rows),
    )
    return values
