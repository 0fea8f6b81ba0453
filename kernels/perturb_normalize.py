"""Image + perturbation -> the network's input, in one pass.

    s = image + unit * delta                  grey levels; image is uint8, or float16 where it has
                                              been perturbed before; delta is stored in units
    x = (clip(s, 0, 255) / 255 - mean) / std  float32 in this order, rounded once to the output

Fused: addition, clip, scaling, normalisation, cast and layout. Images arrive as the loader holds
them, (N, H, W, C) bytes; the output is logically (N, C, H, W) in channels_last memory, which is
the same linear order, so the kernel walks all tensors linearly. With `space_to_depth` the output
is in the packed layout of space_to_depth.py, zeros included: no buffer is cleared before, and
nothing is assumed of an earlier one.

Bytes per value, bfloat16 output: 1 (image) + 1 (int8 delta) read, 2 written. The eager chain in
float32 (to float, add, clip, scale, subtract, divide, cast) moves 5 + 12 + 4 * 8 + 6 = 55. A packed
image of 224 pixels takes 301 kB read and 423 kB written.

Accesses of a thread, bfloat16 output, int8 delta, sm_90: 16 bytes stored and 8 loaded; packed, 16
bytes stored and, of images of even width, 2 loaded (a run of 6 neighbours has no wider common
divisor), of odd width 1.

Numerics: every operation is rounded as IEEE 754 says, also both divisions, so kernel and reference
agree bit for bit. A reciprocal in two floats gives the quotient in two operations (Brisebarre,
Muller and Raina, "Accelerating correctly rounded floating-point division when the divisor is known
in advance", 2004): correctly rounded for 255, as the tests check over all mantissas, and within one
unit in the last place for any divisor, so that one correction rounds it correctly (Markstein,
"Computation of elementary functions on the IBM RISC System/6000 processor", 1990). On sm_90 a value
then costs 17 instructions, packed 22 (counted in the machine code; no GPU timed it). The equality
needs quotients above 2^-100 in magnitude, or zero.

Not differentiable: methods take the gradient at the normalised input, a leaf, because its sign is
the sign with respect to delta (std > 0); `sign_ascent_` applies the clip's mask.

Source: Shafahi et al., "Adversarial Training for Free!", 2019, Algorithm 1, the argument x + delta.
"""

from __future__ import annotations

import torch
from torch import Tensor

from freeadv_fast.kernels.space_to_depth import (
    check_packable,
    held,
    locate,
    num_blocks,
    pack,
    packed_shape,
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
# 4 warps. A tile gives each thread 16 bytes of output, the widest store there is.
NUM_THREADS = 128
# Tiles in flight per program: 32 values a thread in bfloat16, 64 registers on sm_90; packed, 24
# values and 40 registers.
TILES = 4
# Spans of C * TILES tiles per program, so that channel constants cost little; one below the size
# at which the grid no longer fills a large GPU.
SPANS = 4
MANY_VALUES = 1 << 23
IMAGE_DTYPES = (torch.uint8, torch.float16)
DELTA_DTYPES = (torch.int8, torch.float16, torch.float32)
OUTPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check(
    images: Tensor,
    delta: Tensor | None,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    space_to_depth: bool,
) -> None:
    """Refuses inputs that the formula is not defined for.

    Raises:
        RuntimeError: shows what disagrees.
    """
    if images.dim() != 4 or images.dtype not in IMAGE_DTYPES or not images.is_contiguous():
        raise RuntimeError(
            "images: expected contiguous uint8 or float16 (N, H, W, C), got "
            f"{images.dtype} {tuple(images.shape)} with strides {images.stride()}"
        )
    if delta is not None:
        if delta.shape != images.shape:
            raise RuntimeError(
                f"delta {tuple(delta.shape)} and images {tuple(images.shape)} differ in shape"
            )
        if delta.dtype not in DELTA_DTYPES or not delta.is_contiguous():
            raise RuntimeError(
                "delta: expected contiguous int8, float16 or float32, got "
                f"{delta.dtype} with strides {delta.stride()}"
            )
        if delta.requires_grad:
            raise RuntimeError(
                "delta requires grad, but no autograd runs here; take the gradient at the "
                "result: x = perturb_normalize(...).requires_grad_()"
            )
    for name, constants in (("mean", mean), ("std", std)):
        is_float = constants.dtype is torch.float32 or constants.dtype is dtype is torch.float64
        if constants.shape != images.shape[3:] or not is_float:
            raise RuntimeError(
                f"{name}: expected float32 ({images.shape[3]},) for images "
                f"{tuple(images.shape)}, got {constants.dtype} {tuple(constants.shape)}"
            )
    for name, other in (("delta", delta), ("mean", mean), ("std", std)):
        if other is not None and other.device != images.device:
            raise RuntimeError(f"{name} is on {other.device}, images are on {images.device}")
    if dtype not in OUTPUT_DTYPES:
        raise RuntimeError(f"dtype {dtype}: not one of {OUTPUT_DTYPES}")
    if space_to_depth:
        check_packable(images.shape)


def perturb_normalize_ref(
    images: Tensor,
    delta: Tensor | None,
    mean: Tensor,
    std: Tensor,
    unit: float,
    dtype: torch.dtype,
    space_to_depth: bool,
) -> Tensor:
    """The specification in plain PyTorch, and the path of a CPU.

    Float64 output is computed in float64 throughout. Rows of W * C values are normalised by
    constants repeated W times: broadcasting along 3 channels would run loops of 3.
    """
    check(images, delta, mean, std, dtype, space_to_depth)
    num, height, width, channels = images.shape
    work = torch.float64 if dtype is torch.float64 else torch.float32
    row = width * channels
    out = torch.empty(images.shape, dtype=dtype, device=images.device)
    mean_row = mean.to(work).repeat(width)
    std_row = std.to(work).repeat(width)
    # A tensor, because CUDA replaces division by a number with multiplication by its reciprocal.
    levels = torch.full((), 255, dtype=work, device=images.device)
    rows = num * height
    if images.device.type == "cpu":
        rows = max(1, CPU_CHUNK * torch.get_num_threads() // max(row, 1))
    pieces = [t.view(-1, row).split(rows) for t in (images, out)]
    deltas = [None] * len(pieces[0]) if delta is None else delta.view(-1, row).split(rows)
    for image, target, perturbation in zip(*pieces, deltas, strict=True):
        s = target if dtype is work else torch.empty_like(target, dtype=work)
        s.copy_(image)
        if perturbation is not None:
            shift = perturbation.to(work)
            s.add_(shift if unit == 1.0 else shift.mul(unit)).clamp_(0, 255)
        s.div_(levels).sub_(mean_row).div_(std_row)
        if s is not target:
            target.copy_(s)
    x = out.permute(0, 3, 1, 2)
    return pack(x) if space_to_depth else x


@jit
def reciprocal(std):
    """1 / std in two floats: correctly rounded, and what that leaves."""
    one = tl.full(std.shape, 1.0, tl.float32)
    high = tl.div_rn(one, std)
    return high, tl.fma(high, -std, one) * high


@jit
def normalized(s, mean, std, high, low, FMA: tl.constexpr):
    """(clip(s, 0, 255) / 255 - mean) / std of grey levels, in float32.

    Args:
        high, low: `reciprocal(std)`.
        FMA: Without it (the interpreter's rounds twice) by general IEEE divisions.
    """
    if FMA:
        # 1 / 255 in two floats.
        pixel = tl.fma(s, 1.0 / 255.0, s * -2.3191758e-10)
    else:
        pixel = tl.div_rn(s, tl.full(s.shape, 255.0, tl.float32))
    # clip(s, 0, 255) / 255, bit for bit; clipped here it is a free modifier of the last fma.
    pixel = tl.minimum(tl.maximum(pixel, 0.0), 1.0)
    centred = pixel - mean
    if FMA:
        quotient = tl.fma(centred, high, centred * low)
        # -std stays in a register; negating the quotient would cost an instruction each time.
        result = tl.fma(tl.fma(quotient, -std, centred), high, quotient)
    else:
        result = tl.div_rn(centred, std)
    return result


@jit
def _normalize(
    x_ptr,
    image_ptr,
    delta_ptr,
    at,
    left,
    mean,
    std,
    high,
    low,
    unit,
    HAS_DELTA: tl.constexpr,
    MASKED: tl.constexpr,
    FMA: tl.constexpr,
):
    """One tile, at offsets `at`; if MASKED, only where they are below `left`."""
    mask = at < left if MASKED else None
    s = tl.load(image_ptr + at, mask=mask).to(tl.float32)
    if HAS_DELTA:
        s += unit * tl.load(delta_ptr + at, mask=mask).to(tl.float32)
    x = normalized(s, mean, std, high, low, FMA)
    tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=mask)


@jit
def _perturb_normalize_kernel(
    x_ptr,  # [N, H, W, C] bf16 | fp16 | fp32, output
    image_ptr,  # [N, H, W, C] u8 | fp16
    delta_ptr,  # [N, H, W, C] i8 | fp16 | fp32; unused without HAS_DELTA
    mean_ptr,  # [C] fp32
    std_ptr,  # [C] fp32
    total,  # N*H*W*C
    unit,  # grey levels in one unit of delta
    C: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    FMA: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    SPANS: tl.constexpr,
):
    """C programs share spans of C * TILES tiles, so a thread's channels never change.

    A span starts at channel 0. Program `lane` of its C programs takes the tiles lane, lane + C,
    lane + 2C, ...: mean and std are loaded, and inverted, once for all its spans.
    """
    SPAN: tl.constexpr = C * TILES * BLOCK
    lane = tl.program_id(0) % C
    start = (tl.program_id(0) // C).to(tl.int64) * (SPANS * SPAN)
    offsets = lane * BLOCK + tl.arange(0, BLOCK)
    channel = offsets % C
    mean = tl.load(mean_ptr + channel)
    std = tl.load(std_ptr + channel)
    high, low = reciprocal(std)
    for _ in range(SPANS):
        left = tl.minimum(total - start, SPAN)
        x = x_ptr + start
        image = image_ptr + start
        delta = delta_ptr + start
        # Whole spans go unmasked and unrolled: wide accesses whatever the total's divisors. The
        # remainder loops, lest its scalar accesses cost every program 200 registers.
        if left == SPAN:
            for tile in tl.static_range(TILES):
                at = offsets + tile * (C * BLOCK)
                _normalize(
                    x, image, delta, at, left, mean, std, high, low, unit, HAS_DELTA, False, FMA
                )
        else:
            for tile in tl.range(0, TILES, loop_unroll_factor=1):
                at = offsets + tile * (C * BLOCK)
                _normalize(
                    x, image, delta, at, left, mean, std, high, low, unit, HAS_DELTA, True, FMA
                )
        start += SPAN


@jit
def _perturb_normalize_packed_kernel(
    x_ptr,  # [N, ceil(H/2) + 3, ceil(W/2) + 3, 16] bf16 | fp16 | fp32, output
    image_ptr,  # [N, H, W, 3] u8 | fp16
    delta_ptr,  # [N, H, W, 3] i8 | fp16 | fp32; unused without HAS_DELTA
    mean_ptr,  # [3] fp32
    std_ptr,  # [3] fp32
    unit,  # grey levels in one unit of delta
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    FMA: tl.constexpr,
    TILES: tl.constexpr,
    BLOCKS: tl.constexpr,  # programs per image
):
    """A program takes TILES tiles of runs, one below the other, and its share of the border."""
    ROWS: tl.constexpr = (HEIGHT + 1) // 2
    COLUMNS: tl.constexpr = (WIDTH + 1) // 2
    block = tl.program_id(0) % BLOCKS
    num = (tl.program_id(0) // BLOCKS).to(tl.int64)
    row, column, dy, source, at = locate(block, HEIGHT, WIDTH, TILES)
    channel = tl.arange(0, 8)[None, :]
    packed = x_ptr + num * ((ROWS + 3) * (COLUMNS + 3) * 16)
    x = packed + at[:, None] + channel
    image = image_ptr + num * (HEIGHT * WIDTH * 3) + source[:, None] + channel
    delta = delta_ptr + num * (HEIGHT * WIDTH * 3) + source[:, None] + channel
    mean = tl.load(mean_ptr + channel % 3)
    std = tl.load(std_ptr + channel % 3)
    high, low = reciprocal(std)
    for tile in tl.static_range(TILES):
        down = tile * 4
        is_stored, _, is_value = held(row + down, column, dy, HEIGHT, WIDTH, TILES)
        s = tl.load(image + down * (6 * WIDTH), mask=is_value).to(tl.float32)
        if HAS_DELTA:
            s += unit * tl.load(delta + down * (6 * WIDTH), mask=is_value).to(tl.float32)
        value = tl.where(is_value, normalized(s, mean, std, high, low, FMA), 0.0)
        stored = value.to(x_ptr.dtype.element_ty)
        tl.store(x + down * ((COLUMNS + 3) * 16), stored, mask=is_stored[:, None])
    # The border's pixels in turn: the rows above and 2 columns, 3 between neighbouring rows, and
    # the rest. 64 of them are 16 bytes for each thread.
    HEAD: tl.constexpr = 2 * (COLUMNS + 3) + 2
    BORDER: tl.constexpr = 3 * (COLUMNS + 3) + 3 * ROWS
    first = block * 64
    while first < BORDER:
        index = first + tl.arange(0, 64)
        rows_passed = tl.minimum(tl.maximum(index - (HEAD - 3), 0) // 3, ROWS)
        pixel = (index + rows_passed * COLUMNS)[:, None]
        zeros = tl.zeros([64, 16], x_ptr.dtype.element_ty)
        where = packed + pixel * 16 + tl.arange(0, 16)[None, :]
        tl.store(where, zeros, mask=index[:, None] < BORDER)
        first += BLOCKS * 64


def _launch(
    images: Tensor,
    delta: Tensor | None,
    mean: Tensor,
    std: Tensor,
    unit: float,
    dtype: torch.dtype,
    space_to_depth: bool,
) -> Tensor:
    """Runs a kernel on inputs that the public function has checked."""
    if dtype is torch.float64:  # tests only
        return perturb_normalize_ref(images, delta, mean, std, unit, dtype, space_to_depth)
    num, height, width, channels = images.shape
    shape = images.shape
    if space_to_depth:
        _, depth, rows, columns = packed_shape(num, height, width)
        shape = torch.Size((num, rows, columns, depth))
    out = torch.empty(shape, dtype=dtype, device=images.device)
    total = out.numel()
    if total == 0:
        return out.permute(0, 3, 1, 2)
    inputs = (out, images, images if delta is None else delta, mean, std)
    constants = {
        "HAS_DELTA": delta is not None,
        "FMA": not triton.knobs.runtime.interpret,
        "TILES": TILES,
        "num_warps": NUM_THREADS // 32,
        # unit * delta is rounded before the addition, as in the reference.
        "enable_fp_fusion": False,
    }
    with torch.cuda.device_of(images):
        if space_to_depth:
            blocks = num_blocks(height, width, TILES)
            _perturb_normalize_packed_kernel[(num * blocks,)](
                *inputs, unit, HEIGHT=height, WIDTH=width, BLOCKS=blocks, **constants
            )
        else:
            block = NUM_THREADS * 16 // out.element_size()
            spans = SPANS if total >= MANY_VALUES else 1
            programs = channels * triton.cdiv(total, channels * spans * TILES * block)
            _perturb_normalize_kernel[(programs,)](
                *inputs, total, unit, C=channels, BLOCK=block, SPANS=spans, **constants
            )
    return out.permute(0, 3, 1, 2)


_op = torch.library.custom_op(
    "freeadv_fast::perturb_normalize", perturb_normalize_ref, mutates_args=(), device_types="cpu"
)
_op.register_kernel("cuda", _launch)


@_op.register_fake
def _(
    images: Tensor,
    delta: Tensor | None,
    mean: Tensor,
    std: Tensor,
    unit: float,
    dtype: torch.dtype,
    space_to_depth: bool,
) -> Tensor:
    """Shape, dtype and layout of the result."""
    num, height, width, channels = images.shape
    if space_to_depth:
        _, channels, height, width = packed_shape(num, height, width)
    return images.new_empty((num, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)


def perturb_normalize(
    images: Tensor,
    delta: Tensor | None,
    mean: Tensor,
    std: Tensor,
    *,
    unit: float = 1.0,
    dtype: torch.dtype = torch.float32,
    space_to_depth: bool = False,
) -> Tensor:
    """Adds a perturbation, clips to the pixel range and normalises, in one pass.

    Computes ``(clip(images + unit * delta, 0, 255) / 255 - mean) / std`` in float32 and rounds
    once. Not differentiable: the result is a leaf at which to take the gradient.

    Args:
        images: (N, H, W, C) uint8, or float16 grey levels in 0..255, contiguous.
        delta: (N, H, W, C) int8, float16 or float32, contiguous, finite; None for no perturbation.
        mean: (C,) float32, of pixels in [0, 1].
        std: (C,) float32, likewise, above 0.
        unit: Grey levels (1/255) that one unit of `delta` stands for.
        dtype: bfloat16, float16 or float32; float64 computes in float64, by the reference.
        space_to_depth: Whether to write the packed layout; C is 3 then.

    Returns:
        (N, C, H, W), or packed (N, 16, ceil(H / 2) + 3, ceil(W / 2) + 3); channels_last memory.

    Raises:
        RuntimeError: shapes, dtypes, layouts or devices disagree, or delta requires grad, or
            images that are not of 3 channels shall be packed.

    Source: Shafahi et al. 2019, Algorithm 1, the argument x + delta.
    """
    check(images, delta, mean, std, dtype, space_to_depth)
    return _op(images, delta, mean, std, unit, dtype, space_to_depth)
