"""One ascent step on the perturbation, in place, in one pass.

    s     = image + unit * delta              grey levels, before the update
    mask  = 0 <= s <= 255, inclusive          where the clip of `perturb_normalize` lets gradient by
    delta <- clip(delta + step * sign(grad) * mask, -eps, +eps)

Fused: pixel mask, sign, step, projection, and the count of non-finite gradients, which move
nothing. sign(0) = 0. `step`, `eps` and `unit` are in grey levels (1/255); delta is stored in units.
The gradient is the one at the normalised input, logically (N, C, H, W): 1/std > 0 does not change
its sign, and its channels_last memory has the linear order of the (N, H, W, C) images. Or it is in
the packed layout of space_to_depth.py, known by its 16 channels; what is not finite on the border
and in padding channels does not count.

Bytes per value, bfloat16 gradient and int8 delta: 2 + 1 + 1 read, 1 written. The eager chain of
bench/bench_kernels.py, eleven operations with a float32 delta, moves 84. A packed image of 224
pixels takes 401 kB of gradient (no border) and 452 kB of the others.

Accesses of a thread, bfloat16 gradient, int8 delta, sm_90: 16 bytes of gradient, 8 of delta and
images; packed, 16 bytes of gradient and, of images of even width, 2 of delta and images, of odd
width 1.

Numerics: int8 delta counts steps (unit = step) and moves on the integers, so nothing is rounded;
float delta is updated in float32 and rounded once. Gradients are compared, never converted
downwards: a float64 gradient of 1e-300 still has its sign.

Source: Shafahi et al., "Adversarial Training for Free!", 2019, Algorithm 1, lines 9 to 11; the mask
is that of the authors' code, whose gradient passes through the clip.
"""

from __future__ import annotations

import torch
from torch import Tensor

from freeadv_fast.kernels.space_to_depth import (
    check_packable,
    held,
    is_packed,
    locate,
    num_blocks,
    packed_shape,
    unpack,
)

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # torch builds without CUDA may come without Triton; the reference remains

    def jit(kernel):
        """Leaves a kernel as it is; nothing launches it."""
        return kernel


# Values per thread in which a CPU walks, so that temporaries stay in its cache: the fastest of
# 2^14 to 2^19 on two cores of an EPYC; half a megabyte of float32 each.
CPU_CHUNK = 1 << 17
# 4 warps. A tile gives each thread 16 bytes of the widest tensor: no access is split.
NUM_THREADS = 128
# Tiles per program: independent loads in flight, one count and at most one atomic for all.
TILES = 4
INT8_MAX = 127
DELTA_DTYPES = (torch.int8, torch.float16, torch.float32)
GRAD_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check(
    delta: Tensor,
    grad: Tensor,
    images: Tensor,
    nonfinite: Tensor,
    step: float,
    eps: float,
    unit: float,
) -> None:
    """Refuses inputs that the formula is not defined for.

    Raises:
        RuntimeError: shows what disagrees.
    """
    if images.dim() != 4 or images.dtype is not torch.uint8 or not images.is_contiguous():
        raise RuntimeError(
            "images: expected contiguous uint8 (N, H, W, C), got "
            f"{images.dtype} {tuple(images.shape)} with strides {images.stride()}"
        )
    if delta.shape != images.shape:
        raise RuntimeError(
            f"delta {tuple(delta.shape)} and images {tuple(images.shape)} differ in shape"
        )
    if delta.dtype not in DELTA_DTYPES or not delta.is_contiguous() or delta.requires_grad:
        raise RuntimeError(
            "delta: expected contiguous int8, float16 or float32 without requires_grad, got "
            f"{delta.dtype} with strides {delta.stride()}, requires_grad={delta.requires_grad}"
        )
    num, height, width, channels = images.shape
    if is_packed(grad.shape, images.shape):
        check_packable(images.shape)
    elif grad.shape != (num, channels, height, width):
        raise RuntimeError(
            f"grad: expected {(num, channels, height, width)} (N, C, H, W) for images "
            f"{tuple(images.shape)}, or packed {packed_shape(num, height, width)} for three "
            f"channels, got {tuple(grad.shape)}"
        )
    if grad.dtype not in GRAD_DTYPES:
        raise RuntimeError(f"grad: {grad.dtype} is no float dtype")
    if nonfinite.numel() != 1 or nonfinite.dtype is not torch.int64:
        raise RuntimeError(
            f"nonfinite: expected one int64, got {nonfinite.dtype} {tuple(nonfinite.shape)}"
        )
    for name, other in (("delta", delta), ("grad", grad), ("nonfinite", nonfinite)):
        if other.device != images.device:
            raise RuntimeError(f"{name} is on {other.device}, images are on {images.device}")
    if step < 0 or eps < 0 or unit <= 0:
        raise RuntimeError(f"step {step}, eps {eps}, unit {unit}: expected >= 0, >= 0 and > 0")
    if delta.dtype is torch.int8:
        steps = eps / unit
        if step != unit or abs(steps - round(steps)) > 1e-6 or round(steps) > INT8_MAX:
            raise RuntimeError(
                "int8 delta counts steps: expected unit = step and eps a whole number of steps "
                f"up to {INT8_MAX}, got step {step}, eps {eps}, unit {unit}"
            )


def in_units(delta: Tensor, step: float, eps: float, unit: float) -> tuple[float, float]:
    """Step and radius in the units in which `delta` is stored; whole numbers for int8."""
    if delta.dtype is torch.int8:
        return 1.0, float(round(eps / unit))
    return step / unit, eps / unit


def sign_ascent_ref_(
    delta: Tensor,
    grad: Tensor,
    images: Tensor,
    nonfinite: Tensor,
    step: float,
    eps: float,
    unit: float,
) -> None:
    """The specification in plain PyTorch, and the path of a CPU."""
    check(delta, grad, images, nonfinite, step, eps, unit)
    step, eps = in_units(delta, step, eps, unit)
    grad = grad.detach()
    if is_packed(grad.shape, images.shape):
        grad = unpack(grad, *images.shape[1:3])
    grad = grad.permute(0, 2, 3, 1).contiguous()
    chunk = max(delta.numel(), 1)
    if delta.device.type == "cpu":
        chunk = CPU_CHUNK * torch.get_num_threads()
    pieces = [t.view(-1).split(chunk) for t in (delta, grad, images)]
    for d, g, image in zip(*pieces, strict=True):
        is_finite = g.abs().lt_(torch.inf)  # 1 or 0 in g's dtype; false for NaN
        # Counted in float32: exact below 2^24, and vectorised where a sum of bools is not.
        nonfinite.add_(g.numel() - is_finite.sum(dtype=torch.float64).to(torch.int64))
        stored = d.to(torch.float32)
        s = stored.mul(unit).add_(image)
        inside = s.eq_(s.clamp(0, 255))
        # sign(NaN) is 0 and sign(+-inf) is +-1: the product is 0 wherever is_finite is.
        direction = torch.sign(g).mul_(is_finite).to(torch.float32).mul_(inside)
        d.copy_(direction.mul_(step).add_(stored).clamp_(-eps, eps))


@jit
def ascended(delta, grad, image, step_bits, eps, unit):
    """The updated perturbation and the gradient, both in float32.

    Args:
        delta: Stored perturbation in float32. grad, image: As loaded.
        step_bits: u32, the step in units of delta as a float32's bits.
    """
    s = unit * delta + image.to(tl.float32)
    grad32 = grad.to(tl.float32)  # keeps the sign bit; float64 may underflow or overflow
    # Floats from +0 up are ordered like their bits, negative ones lie above: one unsigned
    # comparison tests both ends of a range. Instructions are as scarce here as bytes.
    bits = grad32.to(tl.uint32, bitcast=True)
    if grad.dtype == tl.float64:
        is_usable = (tl.abs(grad) > 0.0) & (tl.abs(grad) < float("inf"))
    else:
        is_usable = bits + bits - 1 < 0xFEFFFFFF  # 0 < |grad| < inf; doubled, the sign is gone
    is_inside = s.to(tl.uint32, bitcast=True) <= 0x437F0000  # 0 <= s <= 255; s is never -0
    signed_step = (step_bits | (bits & 0x80000000)).to(tl.float32, bitcast=True)
    move = tl.where(is_usable & is_inside, signed_step, 0.0)
    return tl.minimum(tl.maximum(delta + move, -eps), eps), grad32


@jit
def tainted(taint, grad32):
    """Zero while every gradient so far is finite, NaN from the first on that is not."""
    return tl.fma(grad32, tl.zeros(grad32.shape, tl.float32), taint)


@jit
def is_bad(grad):
    """1 where a gradient is not finite, else 0."""
    value = grad
    if grad.dtype != tl.float64:
        value = grad.to(tl.float32)
    return tl.where(tl.abs(value) < float("inf"), 0, 1)


@jit
def _ascend(
    delta_ptr,
    grad_ptr,
    image_ptr,
    at,
    left,
    taint,
    step_bits,
    eps,
    unit,
    MASKED: tl.constexpr,
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
    return tainted(taint, grad32)


@jit
def _sign_ascent_kernel(
    delta_ptr,  # [N, H, W, C] i8 | fp16 | fp32, updated in place
    nonfinite_ptr,  # [1] i64, incremented
    grad_ptr,  # [N, H, W, C] bf16 | fp16 | fp32 | fp64
    image_ptr,  # [N, H, W, C] u8
    total,  # N*H*W*C
    step,  # in units of delta
    eps,  # in units of delta
    unit,  # grey levels in one unit of delta
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Linear in memory: program p takes TILES * BLOCK neighbouring values."""
    start = tl.program_id(0).to(tl.int64) * (TILES * BLOCK)
    left = tl.minimum(total - start, TILES * BLOCK)
    delta = delta_ptr + start
    grad = grad_ptr + start
    image = image_ptr + start
    offsets = tl.arange(0, BLOCK)
    step_bits = tl.full([BLOCK], step, tl.float32).to(tl.uint32, bitcast=True)
    taint = tl.zeros([BLOCK], tl.float32)
    # Whole programs go unmasked and unrolled: wide accesses whatever the total's divisors. The
    # remainder loops, lest its scalar accesses cost every program its registers.
    if left == TILES * BLOCK:
        for tile in tl.static_range(TILES):
            at = offsets + tile * BLOCK
            taint = _ascend(delta, grad, image, at, left, taint, step_bits, eps, unit, False)
    else:
        for tile in tl.range(0, TILES, loop_unroll_factor=1):
            at = offsets + tile * BLOCK
            taint = _ascend(delta, grad, image, at, left, taint, step_bits, eps, unit, True)
    # Counting would cost every value three instructions; it is done where there is one to count.
    if tl.min((taint == 0.0).to(tl.int32), 0) == 0:
        count = tl.zeros([BLOCK], tl.int32)
        for tile in tl.range(0, TILES, loop_unroll_factor=1):
            at = offsets + tile * BLOCK
            count += is_bad(tl.load(grad + at, mask=at < left, other=0.0))
        tl.atomic_add(nonfinite_ptr, tl.sum(count, 0).to(tl.int64))


@jit
def first_six(runs):
    """[128, 8] as its first six columns."""
    even, odd = tl.split(runs.reshape(runs.shape[0], 4, 2))
    columns04, columns26 = tl.split(even.reshape(runs.shape[0], 2, 2))
    columns15, columns37 = tl.split(odd.reshape(runs.shape[0], 2, 2))
    column0, column4 = tl.split(columns04)
    column1, column5 = tl.split(columns15)
    column2, _ = tl.split(columns26)
    column3, _ = tl.split(columns37)
    return column0, column1, column2, column3, column4, column5


@jit
def store_runs(delta, new, is_run, is_value, PAIRS: tl.constexpr):
    """Stores a tile of the updated perturbation, every run by the thread that holds it.

    A masked store of [128, 8] would pass through shared memory, to threads of one or two values.

    Args:
        delta: [128] pointers to the runs.
        new: [128, 8] fp32. is_run, is_value: See `held`.
        PAIRS: Whether delta is int8 and all its runs start at even addresses and are whole; two
            values are stored at once then.
    """
    if PAIRS:
        first, second = tl.split(new.reshape(new.shape[0], 4, 2))
        # Two bytes, 128 added to each, as the last bits of a whole number in a float32.
        both = tl.fma(second, tl.full(first.shape, 256.0, tl.float32), first) + 12615808.0
        pairs = (both.to(tl.uint32, bitcast=True) ^ 0x8080).to(tl.uint16)
        even, odd = tl.split(pairs.reshape(new.shape[0], 2, 2))
        pair0, pair2 = tl.split(even)
        pair1, _ = tl.split(odd)
        delta = delta.to(tl.pointer_type(tl.uint16))
        tl.store(delta, pair0, mask=is_run)
        tl.store(delta + 1, pair1, mask=is_run)
        tl.store(delta + 2, pair2, mask=is_run)
    else:
        values = first_six(new.to(delta.dtype.element_ty))
        masks = first_six(is_value.to(tl.int8))
        for k in tl.static_range(6):
            tl.store(delta + k, values[k], mask=masks[k] != 0)


@jit
def count_packed(
    nonfinite_ptr,
    grad,
    row,
    column,
    dy,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):
    """Adds the non-finite gradients of a program's tiles.

    Args:
        grad: [128, 8] pointers to the first tile. row, column, dy: See `locate`.
    """
    count = tl.zeros(grad.shape, tl.int32)
    for tile in tl.range(0, TILES, loop_unroll_factor=1):
        down = tile * 4
        _, _, is_value = held(row + down, column, dy, HEIGHT, WIDTH, TILES)
        values = tl.load(grad + down * (((WIDTH + 1) // 2 + 3) * 16), mask=is_value, other=0.0)
        count += is_bad(values)
    tl.atomic_add(nonfinite_ptr, tl.sum(count).to(tl.int64))


@jit
def _sign_ascent_packed_kernel(
    delta_ptr,  # [N, H, W, 3] i8 | fp16 | fp32, updated in place
    nonfinite_ptr,  # [1] i64, incremented
    grad_ptr,  # [N, ceil(H/2) + 3, ceil(W/2) + 3, 16] bf16 | fp16 | fp32 | fp64
    image_ptr,  # [N, H, W, 3] u8
    step,  # in units of delta
    eps,  # in units of delta
    unit,  # grey levels in one unit of delta
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
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
    grad = grad_ptr + num * ((ROWS + 3) * (COLUMNS + 3) * 16) + at[:, None] + channel
    image = image_ptr + num * (HEIGHT * WIDTH * 3) + source[:, None] + channel
    runs = delta_ptr + num * (HEIGHT * WIDTH * 3) + source
    delta = delta_ptr + num * (HEIGHT * WIDTH * 3) + source[:, None] + channel
    step_bits = tl.full(grad.shape, step, tl.float32).to(tl.uint32, bitcast=True)
    taint = tl.zeros(grad.shape, tl.float32)
    for tile in tl.static_range(TILES):
        down = tile * 4
        is_stored, is_run, is_value = held(row + down, column, dy, HEIGHT, WIDTH, TILES)
        # The border is not read. A run's two zeros are, so that a load stays whole.
        whole = is_stored[:, None]
        slope = tl.load(grad + down * ((COLUMNS + 3) * 16), mask=whole, other=0.0)
        pixels = tl.load(image + down * (6 * WIDTH), mask=is_value)
        old = tl.load(delta + down * (6 * WIDTH), mask=is_value).to(tl.float32)
        new, slope32 = ascended(old, slope, pixels, step_bits, eps, unit)
        store_runs(runs + down * (6 * WIDTH), new, is_run, is_value, PAIRS)
        taint = tl.where(is_value, tainted(taint, slope32), taint)
    if tl.min((tl.sum(taint, 1) == 0.0).to(tl.int32)) == 0:
        count_packed(nonfinite_ptr, grad, row, column, dy, HEIGHT, WIDTH, TILES)


def packed_constants(delta: Tensor, grad: Tensor, tiles: int) -> dict[str, int | bool]:
    """What packed kernels are compiled for.

    Args:
        tiles: Tiles per program of half precision; wider gradients take fewer registers so.
    """
    height, width = delta.shape[1:3]
    tiles = tiles * 2 // grad.element_size()
    return {
        "HEIGHT": height,
        "WIDTH": width,
        "TILES": tiles,
        "BLOCKS": num_blocks(height, width, tiles),
        "PAIRS": delta.dtype is torch.int8 and width % 2 == 0 and delta.data_ptr() % 2 == 0,
    }


def _launch_(
    delta: Tensor,
    grad: Tensor,
    images: Tensor,
    nonfinite: Tensor,
    step: float,
    eps: float,
    unit: float,
) -> None:
    """Runs a kernel on inputs that the public function has checked."""
    total = delta.numel()
    if total == 0:
        return
    packed = is_packed(grad.shape, images.shape)
    grad = grad.permute(0, 2, 3, 1).contiguous()
    inputs = (delta, nonfinite, grad, images)
    scalars = (*in_units(delta, step, eps, unit), unit)
    constants = {
        "num_warps": NUM_THREADS // 32,
        # unit * delta is rounded before the addition, as in the reference.
        "enable_fp_fusion": False,
    }
    with torch.cuda.device_of(delta):
        if packed:
            sizes = packed_constants(delta, grad, TILES)
            _sign_ascent_packed_kernel[(len(images) * sizes["BLOCKS"],)](
                *inputs, *scalars, **sizes, **constants
            )
        else:
            block = NUM_THREADS * 16 // max(grad.element_size(), delta.element_size())
            _sign_ascent_kernel[(triton.cdiv(total, TILES * block),)](
                *inputs, total, *scalars, BLOCK=block, TILES=TILES, **constants
            )


_op_ = torch.library.custom_op(
    "freeadv_fast::sign_ascent_",
    sign_ascent_ref_,
    mutates_args=("delta", "nonfinite"),
    device_types="cpu",
)
_op_.register_kernel("cuda", _launch_)


@_op_.register_fake
def _(
    delta: Tensor,
    grad: Tensor,
    images: Tensor,
    nonfinite: Tensor,
    step: float,
    eps: float,
    unit: float,
) -> None:
    """Nothing is returned."""


def sign_ascent_(
    delta: Tensor,
    grad: Tensor,
    images: Tensor,
    nonfinite: Tensor,
    *,
    step: float,
    eps: float,
    unit: float = 1.0,
) -> None:
    """Moves the perturbation one sign step up the loss and back into the L-infinity ball.

    Computes ``delta <- clip(delta + step * sign(grad) * mask, -eps, +eps)`` in place, with
    ``mask = 0 <= images + delta <= 255`` taken before the update: there, and only there, does
    gradient pass the clip to the pixel range.

    Args:
        delta: (N, H, W, C) int8, float16 or float32, contiguous, in `unit` grey levels; updated.
        grad: (N, C, H, W) gradient at the normalised input, bfloat16 to float64; or packed
            (N, 16, ceil(H / 2) + 3, ceil(W / 2) + 3). channels_last, else it is copied. Non-finite
            values move nothing.
        images: (N, H, W, C) uint8, contiguous.
        nonfinite: One int64 on the device; the number of non-finite gradients is added to it.
        step: Length of the step in grey levels.
        eps: Radius of the ball in grey levels.
        unit: Grey levels that one unit of `delta` stands for. int8: unit = step, and eps a whole
            number of steps, at most 127.

    Raises:
        RuntimeError: shapes, dtypes, layouts or devices disagree; int8 would not be exact.

    Source: Shafahi et al. 2019, Algorithm 1, lines 9 to 11.
    """
    check(delta, grad, images, nonfinite, step, eps, unit)
    _op_(delta, grad, images, nonfinite, step, eps, unit)
