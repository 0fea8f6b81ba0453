"""Two batch norms, their sum and ReLU: the end of a residual block whose shortcut is projected.

Activations x of the block and s of its shortcut are rows of matrices [M, C] with M = N*H*W.

    z  = a * x + b + a' * s + b'         a, b, a', b' of each norm's statistics, as in batch_norm.py
    y  = max(z, 0)
    dz = dy where not z <= 0, else 0
    dbias = dbias' = sum(dz),  dweight = sum(dz * (x - mean)) * rstd,  dweight' likewise of s
    dx = a * dz + k1 * x + k2,           ds = a' * dz + k1' * s + k2'

In training only; groups, the fork of the output and what becomes of the running statistics are
batch_norm.py's. One kernel forward behind the two statistics, two kernels backward: the sums, then
both gradients. ReLU's mask is recomputed from x and s, which both read anyway.

Bytes per element, 16-bit activations, forward + backward, the two statistics' 4 apart:

    here           6 + 16        a fork's two gradients: 6 + 20
    apart      10.13 + 22.13     batch_norm.py twice; a fork's two gradients: 10.13 + 24.13

The four such blocks of a ResNet-50 at 224 px have 1.5 million elements an image: 256 images move
3.2 GB less. z is rounded once, where apart the shortcut's norm is rounded by itself first.

Source: He et al., "Deep Residual Learning for Image Recognition", 2015, section 3.3, option B.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from freeadv_fast.kernels import batch_norm
from freeadv_fast.kernels import batch_norm_statistics as statistics
from freeadv_fast.kernels.batch_norm_backward import merge_sums
from freeadv_fast.kernels.batch_norm_forward import Mode, elementwise
from freeadv_fast.kernels.batch_norm_statistics import (
    Norm,
    Schedule,
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

# The four projection blocks of a ResNet-50 at batch 256, forward and backward, on an H200: 2.99 ms,
# apart 3.77 (bench/results/h200/trials/batch-norm.log).
REDUCTION = Schedule(columns=128, num_warps=8, per_sm=2, depth=1, turn=1)


@jit
def _joined_norms_forward_kernel(
    y_ptr,  # [M, C] bf16 | fp16 | fp32, output
    x_ptr,  # [M, C] like y
    shortcut_ptr,  # [M, C] like y
    coefficients_ptr,  # [4, G, C] fp32: a, b, mean, rstd
    shortcut_coefficients_ptr,  # [4, G, C] fp32, likewise
    num_images,  # N
    image_rows,  # H*W
    num_groups,  # G
    channels8,  # C/8
    BM: tl.constexpr,
    BC: tl.constexpr,
    TILES: tl.constexpr,
):
    """TILES * BM rows of a group, BC columns of them."""
    C = channels8 * 8
    plane = num_groups.to(tl.int64) * C
    blocks = channels8 // (BC // 8)
    group = tl.program_id(1)
    cols = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    rows = tl.arange(0, BM)
    first, count = group_rows(group, num_images, image_rows, num_groups)
    y_ptr += first * C
    x_ptr += first * C
    shortcut_ptr += first * C
    start = (tl.program_id(0) // blocks).to(tl.int64) * (TILES * BM)
    left = tl.minimum(count - start, TILES * BM).to(tl.int32)
    offset = start * C
    known = coefficients_ptr + group.to(tl.int64) * C + cols
    shortcut_known = shortcut_coefficients_ptr + group.to(tl.int64) * C + cols
    a = tl.load(known)[None, :]
    shortcut_a = tl.load(shortcut_known)[None, :]
    b = (tl.load(known + plane) + tl.load(shortcut_known + plane))[None, :]
    at = rows[:, None] * C + cols[None, :]
    inside = (rows < left)[:, None]
    x = tl.load(x_ptr + offset + at, mask=inside)
    shortcut = tl.load(shortcut_ptr + offset + at, mask=inside)
    for _ in tl.static_range(TILES):
        # The next tile's loads stand before this one's store, which the compiler may not pass.
        left -= BM
        is_next = (rows < left)[:, None]
        ahead = offset + BM * C
        x_next = tl.load(x_ptr + ahead + at, mask=is_next)
        shortcut_next = tl.load(shortcut_ptr + ahead + at, mask=is_next)
        z = tl.fma(x.to(tl.float32), a, tl.fma(shortcut.to(tl.float32), shortcut_a, b))
        y = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(y_ptr + offset + at, y.to(y_ptr.dtype.element_ty), mask=inside)
        inside, x, shortcut = is_next, x_next, shortcut_next
        offset = ahead


@jit
def _joined_norms_reduce_kernel(
    k_ptr,  # [2, G, C] fp32, output: k1, k2
    shortcut_k_ptr,  # [2, G, C] fp32, output, likewise
    dweight_ptr,  # [C] fp32, output
    dbias_ptr,  # [C] fp32, output
    shortcut_dweight_ptr,  # [C] fp32, output
    shortcut_dbias_ptr,  # [C] fp32, output
    partial_ptr,  # [3, G, P, C] fp32, a chunk's sums of dz, of dz * (x - mean), of the shortcut's
    counters_ptr,  # [C/BC] i32, zeros before and after
    dy_ptr,  # [M, C] bf16 | fp16 | fp32
    shortcut_dy_ptr,  # [M, C] like dy, added to it; or None
    x_ptr,  # [M, C] like dy
    shortcut_ptr,  # [M, C] like dy
    coefficients_ptr,  # [4, G, C] fp32: a, b, mean, rstd
    shortcut_coefficients_ptr,  # [4, G, C] fp32, likewise
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
    shortcut_ptr += first * C
    if shortcut_dy_ptr is not None:
        shortcut_dy_ptr += first * C
    at = rows[:, None] * C + cols[None, :]
    tile, offset, step = last_tile(chunk, count, num_chunks, C, BM)
    dys, shortcut_dys, xs, shortcuts = (), (), (), ()
    for i in tl.static_range(DEPTH):
        inside = tile_mask(tile - i * num_chunks, count, rows, BM)
        ahead = offset - i * step
        dys = dys + (tl.load(dy_ptr + ahead + at, mask=inside, other=0.0),)
        xs = xs + (tl.load(x_ptr + ahead + at, mask=inside, other=0.0),)
        shortcuts = shortcuts + (tl.load(shortcut_ptr + ahead + at, mask=inside, other=0.0),)
        if shortcut_dy_ptr is not None:
            shortcut_dy = tl.load(shortcut_dy_ptr + ahead + at, mask=inside, other=0.0)
            shortcut_dys = shortcut_dys + (shortcut_dy,)
    known = coefficients_ptr + group.to(tl.int64) * C + cols
    shortcut_known = shortcut_coefficients_ptr + group.to(tl.int64) * C + cols
    a = tl.load(known)[None, :]
    shortcut_a = tl.load(shortcut_known)[None, :]
    b = (tl.load(known + plane) + tl.load(shortcut_known + plane))[None, :]
    mean = tl.load(known + 2 * plane)[None, :]
    shortcut_mean = tl.load(shortcut_known + 2 * plane)[None, :]
    sums = tl.zeros([BM, BC], tl.float32)
    products = tl.zeros([BM, BC], tl.float32)
    shortcut_products = tl.zeros([BM, BC], tl.float32)
    while tile >= 0:
        for _ in tl.static_range(TURN):
            # Whole where it is there at all: only a group's last tile may be ragged.
            is_there = tile >= DEPTH * num_chunks
            ahead = offset - DEPTH * step
            dys = dys + (tl.load(dy_ptr + ahead + at, mask=is_there, other=0.0),)
            xs = xs + (tl.load(x_ptr + ahead + at, mask=is_there, other=0.0),)
            shortcut_next = tl.load(shortcut_ptr + ahead + at, mask=is_there, other=0.0)
            dz = dys[0].to(tl.float32)
            x = xs[0].to(tl.float32)
            shortcut = shortcuts[0].to(tl.float32)
            if shortcut_dy_ptr is not None:
                shortcut_dy = tl.load(shortcut_dy_ptr + ahead + at, mask=is_there, other=0.0)
                dz += shortcut_dys[0].to(tl.float32)
                shortcut_dys = shortcut_dys[1:] + (shortcut_dy,)
            z = tl.fma(x, a, tl.fma(shortcut, shortcut_a, b))
            dz = tl.where(z <= 0.0, 0.0, dz)
            sums += dz
            products += dz * (x - mean)
            shortcut_products += dz * (shortcut - shortcut_mean)
            dys, xs, shortcuts = dys[1:], xs[1:], shortcuts[1:] + (shortcut_next,)
            tile -= num_chunks
            offset -= step
    out = partial_ptr + (group.to(tl.int64) * num_chunks + chunk) * C + cols
    products_ptr = partial_ptr + plane * num_chunks
    shortcut_products_ptr = products_ptr + plane * num_chunks
    tl.store(out, tl.sum(sums, 0))
    tl.store(out + plane * num_chunks, tl.sum(products, 0))
    tl.store(out + 2 * plane * num_chunks, tl.sum(shortcut_products, 0))
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
            image_rows,
            num_groups,
            num_chunks,
            C,
            True,
            BP,
            LOADS,
            BC,
        )
        merge_sums(
            shortcut_k_ptr,
            shortcut_dweight_ptr,
            shortcut_dbias_ptr,
            partial_ptr,
            shortcut_products_ptr,
            shortcut_coefficients_ptr,
            cols,
            num_images,
            image_rows,
            num_groups,
            num_chunks,
            C,
            True,
            BP,
            LOADS,
            BC,
        )


@jit
def _joined_norms_backward_kernel(
    dx_ptr,  # [M, C] bf16 | fp16 | fp32, output
    dshortcut_ptr,  # [M, C] like dx, output
    dy_ptr,  # [M, C] like dx
    shortcut_dy_ptr,  # [M, C] like dx, added to dy; or None
    x_ptr,  # [M, C] like dx
    shortcut_ptr,  # [M, C] like dx
    coefficients_ptr,  # [4, G, C] fp32: a, b, mean, rstd
    shortcut_coefficients_ptr,  # [4, G, C] fp32, likewise
    k_ptr,  # [2, G, C] fp32: k1, k2
    shortcut_k_ptr,  # [2, G, C] fp32, likewise
    num_images,  # N
    image_rows,  # H*W
    num_groups,  # G
    channels8,  # C/8
    BM: tl.constexpr,
    BC: tl.constexpr,
    TILES: tl.constexpr,
):
    """TILES * BM rows of a group, BC columns of them."""
    C = channels8 * 8
    plane = num_groups.to(tl.int64) * C
    blocks = channels8 // (BC // 8)
    group = tl.program_id(1)
    cols = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    rows = tl.arange(0, BM)
    first, count = group_rows(group, num_images, image_rows, num_groups)
    dx_ptr += first * C
    dshortcut_ptr += first * C
    dy_ptr += first * C
    x_ptr += first * C
    shortcut_ptr += first * C
    if shortcut_dy_ptr is not None:
        shortcut_dy_ptr += first * C
    start = (tl.program_id(0) // blocks).to(tl.int64) * (TILES * BM)
    left = tl.minimum(count - start, TILES * BM).to(tl.int32)
    offset = start * C
    known = group.to(tl.int64) * C + cols
    a = tl.load(coefficients_ptr + known)[None, :]
    b = tl.load(coefficients_ptr + plane + known)
    k1 = tl.load(k_ptr + known)[None, :]
    k2 = tl.load(k_ptr + plane + known)[None, :]
    shortcut_a = tl.load(shortcut_coefficients_ptr + known)[None, :]
    b = (b + tl.load(shortcut_coefficients_ptr + plane + known))[None, :]
    shortcut_k1 = tl.load(shortcut_k_ptr + known)[None, :]
    shortcut_k2 = tl.load(shortcut_k_ptr + plane + known)[None, :]
    at = rows[:, None] * C + cols[None, :]
    inside = (rows < left)[:, None]
    dy = tl.load(dy_ptr + offset + at, mask=inside)
    if shortcut_dy_ptr is not None:
        shortcut_dy = tl.load(shortcut_dy_ptr + offset + at, mask=inside)
    x = tl.load(x_ptr + offset + at, mask=inside)
    shortcut = tl.load(shortcut_ptr + offset + at, mask=inside)
    for _ in tl.static_range(TILES):
        left -= BM
        is_next = (rows < left)[:, None]
        ahead = offset + BM * C
        dy_next = tl.load(dy_ptr + ahead + at, mask=is_next)
        x_next = tl.load(x_ptr + ahead + at, mask=is_next)
        shortcut_next = tl.load(shortcut_ptr + ahead + at, mask=is_next)
        dz = dy.to(tl.float32)
        if shortcut_dy_ptr is not None:
            shortcut_dy_next = tl.load(shortcut_dy_ptr + ahead + at, mask=is_next)
            dz += shortcut_dy.to(tl.float32)
            shortcut_dy = shortcut_dy_next
        x32 = x.to(tl.float32)
        s32 = shortcut.to(tl.float32)
        dz = tl.where(tl.fma(x32, a, tl.fma(s32, shortcut_a, b)) <= 0.0, 0.0, dz)
        dx = tl.fma(dz, a, tl.fma(x32, k1, k2))
        ds = tl.fma(dz, shortcut_a, tl.fma(s32, shortcut_k1, shortcut_k2))
        tl.store(dx_ptr + offset + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        tl.store(dshortcut_ptr + offset + at, ds.to(dx_ptr.dtype.element_ty), mask=inside)
        inside, dy, x, shortcut = is_next, dy_next, x_next, shortcut_next
        offset = ahead


class Joint(NamedTuple):
    """Both norms, and how their activations are grouped."""

    norm: Norm
    shortcut_norm: Norm
    mode: Mode


def _forward(x: Tensor, shortcut: Tensor, joint: Joint) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the coefficients of both norms. x and shortcut are channels_last."""
    rows = joint.mode.rows(x)
    grid, options = elementwise(rows)
    with torch.cuda.device_of(x):
        shortcut_coefficients = statistics.coefficients(shortcut, joint.shortcut_norm, rows, True)
        coefficients = statistics.coefficients(x, joint.norm, rows, True)
        y = torch.empty_like(x)
        _joined_norms_forward_kernel[grid](
            y, x, shortcut, coefficients, shortcut_coefficients, *rows.shape, **options
        )
    return y, coefficients, shortcut_coefficients


def _backward(
    dy: Tensor,
    shortcut_dy: Tensor | None,
    x: Tensor,
    shortcut: Tensor,
    coefficients: Tensor,
    shortcut_coefficients: Tensor,
    mode: Mode,
) -> tuple[Tensor, ...]:
    """Gradients of x, shortcut, weight, bias and of the shortcut's weight and bias.

    All activations are channels_last. A shortcut_dy is added to dy.
    """
    rows = mode.rows(x).tiled(REDUCTION)
    given = (dy, shortcut_dy, x, shortcut, coefficients, shortcut_coefficients)
    with torch.cuda.device_of(x):
        num_chunks = rows.num_chunks(REDUCTION, x.device)
        k, shortcut_k = (coefficients.new_empty((2, *coefficients.shape[1:])) for _ in range(2))
        affine = [coefficients.new_empty(rows.channels) for _ in range(4)]
        _joined_norms_reduce_kernel[(num_chunks * rows.column_blocks, rows.num_groups)](
            k,
            shortcut_k,
            *affine,
            coefficients.new_empty((3, rows.num_groups, num_chunks, rows.channels)),
            statistics.counters(rows.column_blocks, x.device),
            *given,
            *rows.shape,
            num_chunks,
            **REDUCTION.options(rows),
        )
        dx, dshortcut = torch.empty_like(x), torch.empty_like(x)
        grid, options = elementwise(mode.rows(x), accesses=1)
        _joined_norms_backward_kernel[grid](
            dx, dshortcut, *given, k, shortcut_k, *rows.shape, **options
        )
    return dx, dshortcut, *affine


class _JoinedNorms(torch.autograd.Function):
    """y, and its gradients; forked, y twice."""

    @staticmethod
    def forward(ctx, x, shortcut, weight, bias, shortcut_weight, shortcut_bias, joint, fork):
        """Keeps x, shortcut and the coefficients; never y."""
        y, *coefficients = _forward(x, shortcut, joint)
        ctx.save_for_backward(x, shortcut, weight, shortcut_weight, *coefficients)
        ctx.mode = joint.mode
        ctx.set_materialize_grads(False)
        return (y, y.detach()) if fork else y  # as in batch_norm.py

    @staticmethod
    def backward(ctx, *gradients):
        """All of them in any case: the sums are for every one."""
        x, shortcut, weight, shortcut_weight, *coefficients = ctx.saved_tensors
        # An output that nothing reads has none.
        given = [
            g.contiguous(memory_format=torch.channels_last) for g in gradients if g is not None
        ]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        dy, shortcut_dy = given if len(given) > 1 else (*given, None)
        found = _Gradients.apply(
            weight, shortcut_weight, dy, shortcut_dy, x, shortcut, *coefficients, ctx.mode
        )
        wanted = zip(found, ctx.needs_input_grad, strict=False)
        return *(gradient if is_wanted else None for gradient, is_wanted in wanted), None, None


class _Gradients(torch.autograd.Function):
    """`_backward` as a node of its own, whose own derivative is an error that says what to do."""

    @staticmethod
    def forward(ctx, weight, shortcut_weight, *arguments):
        """The weights are named only so that their second derivatives are errors too."""
        return _backward(*arguments)

    @staticmethod
    def backward(ctx, *gradients):
        """Second derivatives.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "joined_norms was differentiated twice, and its kernels have first derivatives only: "
            "methods with second derivatives (GradAlign) train with unfused batch norm, "
            "nn.BatchNorm2d and ReLU as layers of their own"
        )


def joined_norms_ref(
    x: Tensor,
    norm: Norm,
    shortcut: Tensor,
    shortcut_norm: Norm,
    num_groups: int = 1,
) -> Tensor:
    """The specification: the norms one after the other."""
    residual = _apart(shortcut, shortcut_norm, num_groups, relu=False, residual=None)
    return _apart(x, norm, num_groups, relu=True, residual=residual)


def _apart(
    x: Tensor, norm: Norm, num_groups: int, *, relu: bool, residual: Tensor | None
) -> Tensor:
    """One of the two norms."""
    return batch_norm.batch_norm_act_ref(
        x,
        *norm[:4],
        True,
        norm.momentum,
        norm.eps,
        num_groups,
        relu,
        residual,
        num_batches_tracked=norm.num_batches_tracked,
    )


def joined_norms(
    x: Tensor,
    norm: Norm,
    shortcut: Tensor,
    shortcut_norm: Norm,
    *,
    num_groups: int = 1,
    fork: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``relu(norm(x) + shortcut_norm(shortcut))`` in training, by the kernels.

    Differentiable once. Running statistics are updated behind autograd's back.

    Args:
        x: (N, C, H, W) bfloat16, float16 or float32, C a multiple of 8; copied unless
            channels_last.
        norm: Of x's channels.
        shortcut: (N, C, H, W) of x's dtype; copied unless channels_last.
        shortcut_norm: Of the shortcut's channels.
        num_groups: Groups of consecutive images with statistics of their own.
        fork: Whether the output is returned twice, for two readers.

    Returns:
        (N, C, H, W) of x's dtype, channels_last. With `fork` it and an alias of it, as from
        `batch_norm_act`; without gradients the same object twice.

    Raises:
        RuntimeError: shapes, dtypes or devices disagree, or a group would hold fewer than two
            values of a channel; in backward, of a second derivative.

    Source: He et al. 2015, section 3.3, option B; Ioffe & Szegedy 2015, algorithm 1.
    """
    batch_norm.check(x, *norm[:4], True, num_groups, shortcut, 0.0)
    batch_norm.check(shortcut, *shortcut_norm[:4], True, num_groups, None, 0.0)
    x, shortcut = (t.contiguous(memory_format=torch.channels_last) for t in (x, shortcut))
    joint = Joint(norm, shortcut_norm, Mode(True, num_groups, True, 0.0))
    inputs = (x, shortcut, norm.weight, norm.bias, shortcut_norm.weight, shortcut_norm.bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _JoinedNorms.apply(*inputs, joint, fork)
    y, *_ = _forward(x, shortcut, joint)
    return (y, y) if fork else y
