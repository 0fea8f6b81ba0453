"""The perturbation's ascent step and the next replay's network input, in one pass.

    delta <- clip(delta + step * sign(grad) * mask, -eps, +eps)        sign_ascent.py
    x     <- (clip(image + unit * delta, 0, 255) / 255 - mean) / std   perturb_normalize.py

x is overwritten in place: the backward pass that gave `grad` is over, and the next forward pass
reads the new x at the same address, as a CUDA graph must. Both formulas are bit for bit those of
the two files; x and `grad` are plain (N, C, H, W) or in the packed layout of space_to_depth.py.

Bytes per value, bfloat16 and int8 delta: 2 (gradient) + 1 (image) + 1 (delta) read, 1 + 2 written:
7, against 9 of the two ops one after the other. A packed image of 224 pixels takes 1254 kB, against
1577: the zeros of x are left as `perturb_normalize` wrote them, and the border is not read either.

Accesses of a thread, bfloat16, int8 delta, sm_90: 8 bytes of gradient and x, 4 of delta and images;
packed, 16 bytes of gradient and x and, of images of even width, 2 of delta and images, of odd width
1.

Source: Shafahi et al., "Adversarial Training for Free!", 2019, Algorithm 1, lines 8 to 11.
"""

from __future__ import annotations

import torch
from torch import Tensor

from freeadv_fast.kernels import perturb_normalize as perturb
from freeadv_fast.kernels import sign_ascent as ascent
from freeadv_fast.kernels.perturb_normalize import normalized, reciprocal
from freeadv_fast.kernels.sign_ascent import ascended, count_packed, is_bad, store_runs, tainted
from freeadv_fast.kernels.space_to_depth import held, is_packed, locate

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # torch builds without CUDA may come without Triton; the reference remains

    def jit(kernel):
        """Leaves a kernel as it is; nothing launches it."""
        return kernel


CPU_CHUNK = perturb.CPU_CHUNK
# 4 warps. A plain tile gives each thread 8 bytes of the widest tensor: 56 registers on sm_90. With
# 16 it takes 89 to 96, and a bound of 64 registers spills.
NUM_THREADS = 128
BYTES = 8
# Tiles per program, one after the other, so that channel constants cost little.
TILES = 4


def _check(
    delta: Tensor,
    x: Tensor,
    grad: Tensor,
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    nonfinite: Tensor,
    step: float,
    eps: float,
    unit: float,
) -> None:
    """Refuses inputs that either formula is not defined for, or that do not fit each other.

    Raises:
        RuntimeError: shows what disagrees.
    """
    ascent.check(delta, grad, images, nonfinite, step, eps, unit)
    packed = is_packed(grad.shape, images.shape)
    perturb.check(images, delta, mean, std, x.dtype, packed)
    if x.shape != grad.shape or x.dtype is not grad.dtype or x.device != grad.device:
        raise RuntimeError(
            f"x: {x.dtype} {tuple(x.shape)} on {x.device} is not as its gradient, "
            f"{grad.dtype} {tuple(grad.shape)} on {grad.device}"
        )
    if not x.permute(0, 2, 3, 1).is_contiguous():
        raise RuntimeError(f"x: expected channels_last memory, got strides {x.stride()}")


def ascend_normalize_ref_(
    delta: Tensor,
    x: Tensor,
    grad: Tensor,
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    nonfinite: Tensor,
    step: float,
    eps: float,
    unit: float,
) -> None:
    """The specification, the two references in turn, and the path of a CPU.

    It walks whole images, so that what the first wrote is in the cache for the second.
    """
    _check(delta, x, grad, images, mean, std, nonfinite, step, eps, unit)
    packed = is_packed(grad.shape, images.shape)
    x = x.detach()
    num = max(len(images), 1)
    if delta.device.type == "cpu":
        num = max(1, CPU_CHUNK * torch.get_num_threads() * num // max(images.numel(), 1))
    for d, target, g, image in zip(*(t.split(num) for t in (delta, x, grad, images)), strict=True):
        ascent.sign_ascent_ref_(d, g, image, nonfinite, step, eps, unit)
        target.copy_(perturb.perturb_normalize_ref(image, d, mean, std, unit, x.dtype, packed))


@jit
def as_stored(delta, dtype: tl.constexpr):
    """A new perturbation as the next pass loads it; int8 and float32 hold it as it is."""
    if dtype == tl.float16:
        delta = delta.to(tl.float16).to(tl.float32)
    return delta


@jit
def _update(
    delta_ptr,
    x_ptr,
    grad_ptr,
    image_ptr,
    at,
    left,
    taint,
    mean,
    std,
    high,
    low,
    step_bits,
    eps,
    unit,
    MASKED: tl.constexpr,
    FMA: tl.constexpr,
):
    """One tile, at offsets `at`; if MASKED, only where they are below `left`.

    Returns:
        `taint` with this tile's gradients.
    """
    mask = at < left if MASKED else None
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0 if MASKED else None)
    delta = tl.load(delta_ptr + at, mask=mask).to(tl.float32)
    image = tl.load(image_ptr + at, mask=mask)
    delta, grad32 = ascended(delta, grad, image, step_bits, eps, unit)
    tl.store(delta_ptr + at, delta.to(delta_ptr.dtype.element_ty), mask=mask)
    s = image.to(tl.float32) + unit * as_stored(delta, delta_ptr.dtype.element_ty)
    x = normalized(s, mean, std, high, low, FMA)
    tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=mask)
    return tainted(taint, grad32)


@jit
def _ascend_normalize_kernel(
    delta_ptr,  # [N, H, W, C] i8 | fp16 | fp32, updated in place
    x_ptr,  # [N, H, W, C] bf16 | fp16 | fp32, overwritten
    nonfinite_ptr,  # [1] i64, incremented
    grad_ptr,  # [N, H, W, C], of x's dtype
    image_ptr,  # [N, H, W, C] u8
    mean_ptr,  # [C] fp32
    std_ptr,  # [C] fp32
    total,  # N*H*W*C
    step,  # in units of delta
    eps,  # in units of delta
    unit,  # grey levels in one unit of delta
    C: tl.constexpr,
    FMA: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """C programs share a span of C * TILES tiles, so a thread's channels never change."""
    SPAN: tl.constexpr = C * TILES * BLOCK
    lane = tl.program_id(0) % C
    start = (tl.program_id(0) // C).to(tl.int64) * SPAN
    left = tl.minimum(total - start, SPAN)
    delta = delta_ptr + start
    x = x_ptr + start
    grad = grad_ptr + start
    image = image_ptr + start
    offsets = lane * BLOCK + tl.arange(0, BLOCK)
    mean = tl.load(mean_ptr + offsets % C)
    std = tl.load(std_ptr + offsets % C)
    high, low = reciprocal(std)
    step_bits = tl.full([BLOCK], step, tl.float32).to(tl.uint32, bitcast=True)
    taint = tl.zeros([BLOCK], tl.float32)
    # Whole spans go unmasked: wide accesses whatever the total's divisors.
    if left == SPAN:
        for tile in tl.range(0, TILES, loop_unroll_factor=1):
            at = offsets + tile * (C * BLOCK)
            taint = _update(
                delta, x, grad, image, at, left, taint,
                mean, std, high, low, step_bits, eps, unit, False, FMA,
            )  # fmt: skip
    else:
        for tile in tl.range(0, TILES, loop_unroll_factor=1):
            at = offsets + tile * (C * BLOCK)
            taint = _update(
                delta, x, grad, image, at, left, taint,
                mean, std, high, low, step_bits, eps, unit, True, FMA,
            )  # fmt: skip
    if tl.min((taint == 0.0).to(tl.int32), 0) == 0:
        count = tl.zeros([BLOCK], tl.int32)
        for tile in tl.range(0, TILES, loop_unroll_factor=1):
            at = offsets + tile * (C * BLOCK)
            count += is_bad(tl.load(grad + at, mask=at < left, other=0.0))
        tl.atomic_add(nonfinite_ptr, tl.sum(count, 0).to(tl.int64))


@jit
def _ascend_normalize_packed_kernel(
    delta_ptr,  # [N, H, W, 3] i8 | fp16 | fp32, updated in place
    x_ptr,  # [N, ceil(H/2) + 3, ceil(W/2) + 3, 16] bf16 | fp16 | fp32, overwritten
    nonfinite_ptr,  # [1] i64, incremented
    grad_ptr,  # as x
    image_ptr,  # [N, H, W, 3] u8
    mean_ptr,  # [3] fp32
    std_ptr,  # [3] fp32
    step,  # in units of delta
    eps,  # in units of delta
    unit,  # grey levels in one unit of delta
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    FMA: tl.constexpr,
    TILES: tl.constexpr,
    BLOCKS: tl.constexpr,  # programs per image
    PAIRS: tl.constexpr,
):
    """A program takes TILES tiles of runs, one below the other."""
    ROWS: tl.constexpr = (HEIGHT + 1) // 2
    COLUMNS: tl.constexpr = (WIDTH + 1) // 2
    num = (tl.program_id(0) // BLOCKS).to(tl.int64)
    row, column, dy, source, at = locate(tl.program_id(0) % BLOCKS, HEIGHT, WIDTH, TILES)
    channel = tl.arange(0, 8)[None, :]
    x = x_ptr + num * ((ROWS + 3) * (COLUMNS + 3) * 16) + at[:, None] + channel
    grad = grad_ptr + num * ((ROWS + 3) * (COLUMNS + 3) * 16) + at[:, None] + channel
    image = image_ptr + num * (HEIGHT * WIDTH * 3) + source[:, None] + channel
    runs = delta_ptr + num * (HEIGHT * WIDTH * 3) + source
    delta = delta_ptr + num * (HEIGHT * WIDTH * 3) + source[:, None] + channel
    mean = tl.load(mean_ptr + channel % 3)
    std = tl.load(std_ptr + channel % 3)
    high, low = reciprocal(std)
    step_bits = tl.full(grad.shape, step, tl.float32).to(tl.uint32, bitcast=True)
    taint = tl.zeros(grad.shape, tl.float32)
    for tile in tl.static_range(TILES):
        down = tile * 4
        is_stored, is_run, is_value = held(row + down, column, dy, HEIGHT, WIDTH, TILES)
        # A run's two zeros are read and written with it, so that accesses stay whole.
        whole = is_stored[:, None]
        slope = tl.load(grad + down * ((COLUMNS + 3) * 16), mask=whole, other=0.0)
        pixels = tl.load(image + down * (6 * WIDTH), mask=is_value)
        old = tl.load(delta + down * (6 * WIDTH), mask=is_value).to(tl.float32)
        new, slope32 = ascended(old, slope, pixels, step_bits, eps, unit)
        store_runs(runs + down * (6 * WIDTH), new, is_run, is_value, PAIRS)
        s = pixels.to(tl.float32) + unit * as_stored(new, delta_ptr.dtype.element_ty)
        value = tl.where(is_value, normalized(s, mean, std, high, low, FMA), 0.0)
        tl.store(x + down * ((COLUMNS + 3) * 16), value.to(x_ptr.dtype.element_ty), mask=whole)
        taint = tl.where(is_value, tainted(taint, slope32), taint)
    if tl.min((tl.sum(taint, 1) == 0.0).to(tl.int32)) == 0:
        count_packed(nonfinite_ptr, grad, row, column, dy, HEIGHT, WIDTH, TILES)


def _launch_(
    delta: Tensor,
    x: Tensor,
    grad: Tensor,
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    nonfinite: Tensor,
    step: float,
    eps: float,
    unit: float,
) -> None:
    """Runs a kernel on inputs that the public function has checked."""
    if x.dtype is torch.float64:  # tests only
        ascend_normalize_ref_(delta, x, grad, images, mean, std, nonfinite, step, eps, unit)
        return
    total = delta.numel()
    if total == 0:
        return
    grad = grad.permute(0, 2, 3, 1).contiguous()
    inputs = (delta, x.detach(), nonfinite, grad, images, mean, std)
    scalars = (*ascent.in_units(delta, step, eps, unit), unit)
    constants = {
        "FMA": not triton.knobs.runtime.interpret,
        "num_warps": NUM_THREADS // 32,
        # unit * delta is rounded before the addition, as in the references.
        "enable_fp_fusion": False,
    }
    with torch.cuda.device_of(delta):
        if is_packed(x.shape, images.shape):
            sizes = ascent.packed_constants(delta, grad, TILES)
            _ascend_normalize_packed_kernel[(len(images) * sizes["BLOCKS"],)](
                *inputs, *scalars, **sizes, **constants
            )
        else:
            channels = images.shape[3]
            block = NUM_THREADS * BYTES // max(grad.element_size(), delta.element_size())
            programs = channels * triton.cdiv(total, channels * TILES * block)
            _ascend_normalize_kernel[(programs,)](
                *inputs, total, *scalars, C=channels, BLOCK=block, TILES=TILES, **constants
            )


_op_ = torch.library.custom_op(
    "freeadv_fast::ascend_normalize_",
    ascend_normalize_ref_,
    mutates_args=("delta", "x", "nonfinite"),
    device_types="cpu",
)
_op_.register_kernel("cuda", _launch_)


@_op_.register_fake
def _(
    delta: Tensor,
    x: Tensor,
    grad: Tensor,
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    nonfinite: Tensor,
    step: float,
    eps: float,
    unit: float,
) -> None:
    """Nothing is returned."""


def ascend_normalize_(
    delta: Tensor,
    x: Tensor,
    grad: Tensor,
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    nonfinite: Tensor,
    *,
    step: float,
    eps: float,
    unit: float = 1.0,
) -> None:
    """Ascends with `sign_ascent_`, then overwrites x with `perturb_normalize` of the new delta.

    Args:
        delta: (N, H, W, C) int8, float16 or float32, contiguous, in `unit` grey levels; updated.
        x: (N, C, H, W) network input, or packed (N, 16, ceil(H / 2) + 3, ceil(W / 2) + 3), as
            `perturb_normalize` returned it: a packed one's zeros are left as they are.
            bfloat16, float16 or float32 (float64: by the reference) in channels_last memory. May be
            a leaf that requires grad, of which no backward pass is outstanding.
        grad: Gradient at x, of its shape and dtype; channels_last, else it is copied.
        images: (N, H, W, C) uint8, contiguous.
        mean: (C,) float32, of pixels in [0, 1].
        std: (C,) float32, likewise, above 0.
        nonfinite: One int64 on the device; the number of non-finite gradients is added to it.
        step: Length of the step in grey levels.
        eps: Radius of the ball in grey levels.
        unit: Grey levels that one unit of `delta` stands for. int8: unit = step, and eps a whole
            number of steps, at most 127.

    Raises:
        RuntimeError: shapes, dtypes, layouts or devices disagree; int8 would not be exact.

    Source: Shafahi et al. 2019, Algorithm 1, lines 8 to 11.
    """
    _check(delta, x, grad, images, mean, std, nonfinite, step, eps, unit)
    # Detached, so that no autograd node is made; x's version counter moves all the same.
    _op_(delta, x.detach(), grad.detach(), images, mean, std, nonfinite, step, eps, unit)
