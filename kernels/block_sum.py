"""The sum at the end of a block that normalises first, with its channels' mean and variance.

    y = x + shortcut            x of the block's last convolution
    mean, var  of each column of y, over the rows of its group of images

The next block's first batch norm asks for mean and var; asking y itself would read it once more.
Its forward kernel (batch_norm_forward.py) takes a, b and rstd from them, every program for its own
columns, and the programs at a group's first rows write them down for backward and move the running
statistics, so that no kernel of its own is launched for that. The gradients of x and of the
shortcut are y's.

Bytes per element, 16-bit activations: 6 forward, where PyTorch's sum and the statistics move 8, and
one launch where they are two.

Numerics: y is rounded once, as PyTorch's sum is, and statistics are those of the rounded y, as
batch_norm_statistics.py takes them: float32, shifted, programs added in a fixed order.

Source: He et al., "Identity Mappings in Deep Residual Networks", 2016, equation 7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from freeadv_fast.kernels import batch_norm_statistics as statistics
from freeadv_fast.kernels.batch_norm_statistics import (
    Rows,
    Schedule,
    group_moments,
    group_rows,
    is_last,
    jit,
    last_tile,
    tile_mask,
)

try:
    import triton.language as tl
except ImportError:  # torch builds without CUDA may come without Triton; the reference remains
    pass

# As many bytes under way as the statistics have, of two inputs. Not tried on a GPU.
SUM = Schedule(columns=128, num_warps=8, per_sm=2, depth=4, turn=4)


@jit
def _block_sum_kernel(
    y_ptr,  # [M, C] bf16 | fp16 | fp32, output
    moments_ptr,  # [2, G, C] fp32, output: mean, var
    partial_ptr,  # [2, G, P, C] fp32, a chunk's sums of y - shift and of its square
    counters_ptr,  # [C/BC] i32, zeros before and after
    x_ptr,  # [M, C] like y
    shortcut_ptr,  # [M, C] like y
    num_images,  # N
    image_rows,  # H*W
    num_groups,  # G
    channels8,  # C/8
    num_chunks,  # P
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
    y_ptr += first * C
    x_ptr += first * C
    shortcut_ptr += first * C
    at = rows[:, None] * C + cols[None, :]
    tile, offset, step = last_tile(chunk, count, num_chunks, C, BM)
    xs, shortcuts = (), ()
    for i in tl.static_range(DEPTH):
        inside = tile_mask(tile - i * num_chunks, count, rows, BM)
        ahead = offset - i * step
        xs = xs + (tl.load(x_ptr + ahead + at, mask=inside, other=0.0),)
        shortcuts = shortcuts + (tl.load(shortcut_ptr + ahead + at, mask=inside, other=0.0),)
    spread = (rows * count // BM)[:, None] * C + cols[None, :]
    sample = tl.load(x_ptr + spread).to(tl.float32) + tl.load(shortcut_ptr + spread).to(tl.float32)
    shift = (tl.sum(sample, 0) / BM)[None, :]
    sums = tl.zeros([BM, BC], tl.float32)
    squares = tl.zeros([BM, BC], tl.float32)
    while tile >= 0:
        for _ in tl.static_range(TURN):
            # Whole where it is there at all: only a group's last tile may be ragged.
            is_there = tile >= DEPTH * num_chunks
            ahead = offset - DEPTH * step
            xs = xs + (tl.load(x_ptr + ahead + at, mask=is_there, other=0.0),)
            shortcuts = shortcuts + (tl.load(shortcut_ptr + ahead + at, mask=is_there, other=0.0),)
            inside = tile_mask(tile, count, rows, BM)
            y = (xs[0].to(tl.float32) + shortcuts[0].to(tl.float32)).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + offset + at, y, mask=inside)
            deviation = tl.where(inside, y.to(tl.float32) - shift, 0.0)
            sums += deviation
            squares += deviation * deviation
            xs, shortcuts = xs[1:], shortcuts[1:]
            tile -= num_chunks
            offset -= step
    plane = num_groups.to(tl.int64) * C
    squares_ptr = partial_ptr + plane * num_chunks
    out = (group.to(tl.int64) * num_chunks + chunk) * C + cols
    tl.store(partial_ptr + out, tl.sum(sums, 0))
    tl.store(squares_ptr + out, tl.sum(squares, 0))
    if chunk == 0:  # in the mean's place, until there is one
        tl.store(moments_ptr + group.to(tl.int64) * C + cols, tl.reshape(shift, [BC]))
    if is_last(counters_ptr + block, num_chunks * num_groups):
        group = tl.full([], 0, tl.int32)
        while group < num_groups:
            _, count = group_rows(group, num_images, image_rows, num_groups)
            known = moments_ptr + group.to(tl.int64) * C + cols
            chunks = group.to(tl.int64) * num_chunks * C
            mean, squared = group_moments(
                tl.load(known, cache_modifier=".cg"),
                partial_ptr + chunks,
                squares_ptr + chunks,
                cols,
                count.to(tl.float32),
                num_chunks,
                C,
                BP,
                LOADS,
                BC,
            )
            tl.store(known, mean)
            tl.store(known + plane, tl.div_rn(squared, count.to(tl.float32)))
            group += 1


class _BlockSum(torch.autograd.Function):
    """y and its moments; y's gradient is that of both."""

    @staticmethod
    def forward(ctx, x, shortcut, num_groups):
        """Keeps nothing."""
        num, channels, height, width = x.shape
        rows = Rows(num, height * width, num_groups, channels, x.element_size()).tiled(SUM)
        num_chunks = rows.num_chunks(SUM, x.device)
        with torch.cuda.device_of(x):
            y = torch.empty_like(x)
            moments = x.new_empty((2, num_groups, channels), dtype=torch.float32)
            _block_sum_kernel[(num_chunks * rows.column_blocks, num_groups)](
                y,
                moments,
                moments.new_empty((2, num_groups, num_chunks, channels)),
                statistics.counters(rows.column_blocks, x.device),
                x,
                shortcut,
                *rows.shape,
                num_chunks,
                **SUM.options(rows),
            )
        ctx.mark_non_differentiable(moments)
        ctx.set_materialize_grads(False)  # zeros for the moments would be a launch
        return y, moments

    @staticmethod
    def backward(ctx, dy, _):
        """Differentiable as often as wanted."""
        return dy, dy, None


def supports(x: Tensor, shortcut: Tensor, num_groups: int) -> bool:
    """Whether the kernel takes these activations."""
    return (
        (x.shape, x.dtype, x.device) == (shortcut.shape, shortcut.dtype, shortcut.device)
        and x.dtype in statistics.DTYPES
        and x.dim() == 4
        and x.shape[1] % statistics.LANES == 0
        and x.numel() > 0
        and num_groups <= len(x)
    )


def block_sum_ref(x: Tensor, shortcut: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """The specification in plain PyTorch; moments in float32, or float64 of float64."""
    y = x + shortcut
    dtype = torch.promote_types(y.dtype, torch.float32)
    moments = [
        torch.var_mean(group.detach().to(dtype), (0, 2, 3), correction=0)[::-1]
        for group in y.tensor_split(num_groups)
    ]
    return y, torch.stack([torch.stack(values) for values in zip(*moments, strict=True)])


def block_sum(x: Tensor, shortcut: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Adds two activations, and takes the sum's moments, by the kernel.

    Args:
        x: (N, C, H, W) bfloat16, float16 or float32, C a multiple of 8; copied unless
            channels_last.
        shortcut: Of x's shape, dtype and device; likewise.
        num_groups: Groups of consecutive images with moments of their own.

    Returns:
        The sum, of x's shape and dtype, channels_last; and (2, G, C) float32, each group's means
        and biased variances, without a gradient.

    Raises:
        RuntimeError: shapes, dtypes or devices disagree.

    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks", equation 7.
    """
    if not supports(x, shortcut, num_groups):
        raise RuntimeError(
            f"expected two activations of one shape, dtype and device with a multiple of 8 "
            f"channels, and a group an image at most; got {x.dtype} {tuple(x.shape)} on {x.device},"
            f" {shortcut.dtype} {tuple(shortcut.shape)} on {shortcut.device}, {num_groups} groups"
        )
    layout = torch.channels_last
    both = x.contiguous(memory_format=layout), shortcut.contiguous(memory_format=layout)
    y, moments = _BlockSum.apply(*both, num_groups)
    return y, moments
