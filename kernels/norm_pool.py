"""Batch norm, ReLU and 3x3 max pooling (stride 2, padding 1) of NHWC activations in one pass.

    z  = a * x + b         a = weight / sqrt(var + eps), b = bias - mean * a, of batch_norm.py
    y  = max(relu(z)) over a window's taps = relu(a * peak + b)       peak: x at the tap that wins
    dz = sum of dy over the windows that a pixel wins, where z > 0; a pixel lies in up to four
    dbias = sum(dz),  dweight = sum(dz * (x - mean)) * rstd           rstd = 1 / sqrt(var + eps)
    dx = a * dz + k1 * x + k2         k1 = -a * rstd * dweight / M,  k2 = -a * dbias / M - k1 * mean

The end of a ResNet's stem. Only the pooled y reaches memory, and beside it for backward `peak` and
a byte: which of the nine taps won, or that ReLU let nothing through. Every window hands its
gradient to one pixel, so the sums over all pixels are sums over the windows, of dy and of
dy * (peak - mean) where a * peak + b > 0: the reduction of batch_norm_backward.py, of a quarter of
the rows. dx gathers: in a block of 2x2 pixels the first lies in one window, two lie in two, the
last in four.

Bytes per element of x, 16-bit activations, statistics' 2 apart, forward + backward:

    here            3.25 + 5.75       y, peak and tap are .5, .5 and .25
      read twice    3.25 + 6.75       with a sum by autograd 3.25 + 7.25
    one by one      8.5  + 16.5       PyTorch's pooling: 8-byte indices, a gradient zeroed, then
                                      written

At 4.3 TB/s 256 images of 112x112x64 take .16 + .28 ms. An H200 took .20 + .49 ms for batch norm
with ReLU and .83 + 1.96 ms for PyTorch's pooling.

A first block and its shortcut both read y. With `fork` there is an output for each, as in
batch_norm.py: both kernels of backward read both gradients and sum them.

A program walks down a strip of windows. Its next row of windows starts with the row of pixels on
which the last one ended, whose winners stay in registers: memory is read once, and a pixel met 1.5
times instead of 2.25.

Numerics: float32; y is rounded once, and bit for bit what batch_norm.py and PyTorch make one after
the other. As in PyTorch the first of equal taps wins, or the last NaN. Taps are compared as
sign(a) * x, exactly: of two that are apart but round to one y the greater wins, where PyTorch, that
sees y, takes the first. ReLU's gradient at 0 is 0. All runs give the same bits.

Sources: Ioffe & Szegedy, "Batch Normalization", 2015; He et al., "Deep Residual Learning for Image
Recognition", 2015, table 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from freeadv_fast.kernels import batch_norm
from freeadv_fast.kernels import batch_norm_statistics as statistics
from freeadv_fast.kernels.batch_norm_backward import reduced
from freeadv_fast.kernels.batch_norm_forward import Mode
from freeadv_fast.kernels.batch_norm_statistics import Norm, Rows, group_rows, jit

try:
    import triton.language as tl
except ImportError:  # torch builds without CUDA may come without Triton; the reference remains
    pass

KERNEL, STRIDE, PADDING = 3, 2, 1
# What stands for a tap where ReLU let nothing through. The nine taps are 0 to 8, row by row.
CLOSED = 9


class Tile(NamedTuple):
    """A program's share: windows side by side times bytes of their channels, and a strip down."""

    size: int  # bytes of a tensor, one row of windows
    strip: int  # rows of windows
    warps: int


FORWARD = Tile(2048, 8, 4)
BACKWARD = Tile(2048, 8, 4)


def batch_norm_relu_pool_ref(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    num_groups: int,
) -> Tensor:
    """The specification in plain PyTorch; any memory format is kept."""
    inputs = (x, weight, bias, running_mean, running_var)
    y = batch_norm.batch_norm_act_ref(*inputs, training, momentum, eps, num_groups, True, None)
    return F.max_pool2d(y, KERNEL, STRIDE, PADDING)


@jit
def _wins(value, best, LAST_NAN: tl.constexpr):
    """Whether a tap takes the place of the best before it."""
    if LAST_NAN:
        return (value > best) | (value != value)
    else:
        return value > best


@jit
def _row_winner(x_ptr, row, has_left, has_right, sign, C: tl.constexpr, LAST_NAN: tl.constexpr):
    """The best of three taps in a row of pixels, times sign, and which tap it is.

    A tap beyond the image's side reads the middle one and passes for it. `row` is the number of
    the row's first tap.
    """
    value = tl.load(x_ptr - has_left * C).to(tl.float32) * sign
    middle = tl.load(x_ptr).to(tl.float32) * sign
    last = tl.load(x_ptr + has_right * C).to(tl.float32) * sign
    takes = _wins(middle, value, LAST_NAN)
    value = tl.where(takes, middle, value)
    tap = tl.where(takes, row + 1, row + 1 - has_left)
    takes = _wins(last, value, LAST_NAN)
    return tl.where(takes, last, value), tl.where(takes, row + 1 + has_right, tap)


@jit
def _windows(num_images, num_groups, OW, C, num_strips, BM: tl.constexpr, BC: tl.constexpr):
    """Which windows a program has: image, column, whether they are its own, channels, strip.

    The windows in a row of all images of a group are counted through. A number beyond the last
    stands for the last: that window is read once more, and not written.
    """
    strip = tl.program_id(0) % num_strips
    blocks = C // BC
    block = tl.program_id(0) // num_strips % blocks
    window = tl.program_id(0) // (num_strips * blocks) * BM + tl.arange(0, BM)
    first, images = group_rows(tl.program_id(1), num_images, 1, num_groups)
    count = images.to(tl.int32) * OW
    inside = (window < count)[:, None]
    window = tl.minimum(window, count - 1)[:, None]
    cols = block * BC + tl.arange(0, BC)[None, :]
    return first + window // OW, window % OW, inside, cols, strip


@jit
def _store(pointer, values, mask):
    """Rounds to what is stored."""
    tl.store(pointer, values.to(pointer.dtype.element_ty), mask=mask)


@jit
def _norm_pool_forward_kernel(
    y_ptr,  # [N, OH, OW, C] bf16 | fp16 | fp32, output; OH = ceil(H / 2), OW = ceil(W / 2)
    peak_ptr,  # [N, OH, OW, C] like y, output if KEEPS
    tap_ptr,  # [N, OH, OW, C] u8, output if KEEPS
    x_ptr,  # [N, H, W, C] like y
    coefficients_ptr,  # [4, G, C] fp32: a, b, mean, rstd
    num_images,  # N
    num_groups,  # G
    HEIGHT: tl.constexpr,  # H
    WIDTH: tl.constexpr,  # W
    C: tl.constexpr,
    KEEPS: tl.constexpr,
    LAST_NAN: tl.constexpr,
    CLOSED: tl.constexpr,
    STRIP: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """STRIP rows of BM windows of a group, BC channels of them."""
    OH: tl.constexpr = (HEIGHT + 1) // 2
    OW: tl.constexpr = (WIDTH + 1) // 2
    image, column, inside, cols, strip = _windows(
        num_images, num_groups, OW, C, (OH + STRIP - 1) // STRIP, BM, BC
    )
    known = coefficients_ptr + tl.program_id(1).to(tl.int64) * C + cols
    a = tl.load(known)
    b = tl.load(known + num_groups.to(tl.int64) * C)
    sign = tl.where(a < 0.0, -1.0, 1.0)
    has_left = (column > 0).to(tl.int32)
    has_right = (2 * column + 1 < WIDTH).to(tl.int32)
    x_ptr += (image * HEIGHT * WIDTH + 2 * column) * C + cols
    windows = (image * OH * OW + column) * C + cols
    row = strip * STRIP
    end = tl.minimum(row + STRIP, OH)
    # A row of taps above the image reads the first row of pixels, the window's middle one, and
    # passes for it; so does a row below the image.
    above = tl.maximum(2 * row - 1, 0).to(tl.int64)
    value, tap = _row_winner(
        x_ptr + above * WIDTH * C, tl.where(row > 0, 0, 3), has_left, has_right, sign, C, LAST_NAN
    )
    while row < end:  # the interpreter has no range() with a bound known at run time
        middle_ptr = x_ptr + row.to(tl.int64) * (2 * WIDTH * C)
        has_below = (2 * row + 1 < HEIGHT).to(tl.int32)
        middle, middle_tap = _row_winner(middle_ptr, 3, has_left, has_right, sign, C, LAST_NAN)
        below, below_tap = _row_winner(
            middle_ptr + has_below * (WIDTH * C),
            3 + 3 * has_below,
            has_left,
            has_right,
            sign,
            C,
            LAST_NAN,
        )
        takes = _wins(middle, value, LAST_NAN)
        value = tl.where(takes, middle, value)
        tap = tl.where(takes, middle_tap, tap)
        takes = _wins(below, value, LAST_NAN)
        value = tl.where(takes, below, value)
        tap = tl.where(takes, below_tap, tap)
        peak = value * sign
        z = tl.fma(peak, a, b)
        y = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        at = windows + row.to(tl.int64) * (OW * C)
        _store(y_ptr + at, y, inside)
        if KEEPS:
            _store(peak_ptr + at, peak, inside)
            _store(tap_ptr + at, tl.where(z <= 0.0, CLOSED, tap), inside)
        # The last row of taps is the first of the windows below.
        value, tap = below, below_tap - 6
        row += 1


@jit
def _gradient(dy_ptr, shortcut_dy_ptr, tap_ptr, at, there, CLOSED: tl.constexpr):
    """Gradients of windows and the taps that get them: none of windows that are not there."""
    tap = tl.load(tap_ptr + at, mask=there, other=CLOSED)
    dy = tl.load(dy_ptr + at, mask=there).to(tl.float32)
    if shortcut_dy_ptr is not None:
        dy += tl.load(shortcut_dy_ptr + at, mask=there).to(tl.float32)
    return dy, tap


@jit
def _shift(x_ptr, there, k1, k2, TRAINING: tl.constexpr):
    """What dx is beside a * dz."""
    if TRAINING:
        return tl.fma(tl.load(x_ptr, mask=there).to(tl.float32), k1, k2)
    else:
        return 0.0


@jit
def _norm_pool_backward_kernel(
    dx_ptr,  # [N, H, W, C] bf16 | fp16 | fp32, output
    dy_ptr,  # [N, OH, OW, C] like dx; OH = ceil(H / 2), OW = ceil(W / 2)
    shortcut_dy_ptr,  # [N, OH, OW, C] like dx, added to dy; or None
    tap_ptr,  # [N, OH, OW, C] u8
    x_ptr,  # [N, H, W, C] like dx; unused without TRAINING
    coefficients_ptr,  # [4, G, C] fp32: a, b, mean, rstd
    k_ptr,  # [2, G, C] fp32: k1, k2; unused without TRAINING
    num_images,  # N
    num_groups,  # G
    HEIGHT: tl.constexpr,  # H
    WIDTH: tl.constexpr,  # W
    C: tl.constexpr,
    TRAINING: tl.constexpr,
    CLOSED: tl.constexpr,
    STRIP: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """The pixels in the middle, right, below and right below of as many windows as forward has."""
    OH: tl.constexpr = (HEIGHT + 1) // 2
    OW: tl.constexpr = (WIDTH + 1) // 2
    image, column, inside, cols, strip = _windows(
        num_images, num_groups, OW, C, (OH + STRIP - 1) // STRIP, BM, BC
    )
    known = tl.program_id(1).to(tl.int64) * C + cols
    a = tl.load(coefficients_ptr + known)
    k1 = a
    k2 = a
    if TRAINING:
        k1 = tl.load(k_ptr + known)
        k2 = tl.load(k_ptr + num_groups.to(tl.int64) * C + known)
    has_right = inside & (column + 1 < OW)
    pixel_right = inside
    if WIDTH % 2 == 1:
        pixel_right = has_right
    pixels = (image * HEIGHT * WIDTH + 2 * column) * C + cols
    windows = (image * OH * OW + column) * C + cols
    row = strip * STRIP
    end = tl.minimum(row + STRIP, OH)
    while row < end:
        is_next = row + 1 < OH
        window = windows + row.to(tl.int64) * (OW * C)
        dy, tap = _gradient(dy_ptr, shortcut_dy_ptr, tap_ptr, window, inside, CLOSED)
        right_dy, right_tap = _gradient(
            dy_ptr, shortcut_dy_ptr, tap_ptr, window + C, has_right, CLOSED
        )
        window += OW * C
        next_dy, next_tap = _gradient(
            dy_ptr, shortcut_dy_ptr, tap_ptr, window, inside & is_next, CLOSED
        )
        last_dy, last_tap = _gradient(
            dy_ptr, shortcut_dy_ptr, tap_ptr, window + C, has_right & is_next, CLOSED
        )
        below = inside
        corner = pixel_right
        if HEIGHT % 2 == 1:
            below = inside & is_next
            corner = pixel_right & is_next
        at = pixels + row.to(tl.int64) * (2 * WIDTH * C)
        at_below = at + WIDTH * C
        # All loads stand before the stores, which the compiler may not pass.
        shift = _shift(x_ptr + at, inside, k1, k2, TRAINING)
        right_shift = _shift(x_ptr + at + C, pixel_right, k1, k2, TRAINING)
        below_shift = _shift(x_ptr + at_below, below, k1, k2, TRAINING)
        corner_shift = _shift(x_ptr + at_below + C, corner, k1, k2, TRAINING)
        # A pixel is another tap of each window that it lies in.
        dz = tl.where(tap == 4, dy, 0.0)
        right_dz = tl.where(tap == 5, dy, 0.0) + tl.where(right_tap == 3, right_dy, 0.0)
        below_dz = tl.where(tap == 7, dy, 0.0) + tl.where(next_tap == 1, next_dy, 0.0)
        corner_dz = tl.where(tap == 8, dy, 0.0) + tl.where(right_tap == 6, right_dy, 0.0)
        corner_dz += tl.where(next_tap == 2, next_dy, 0.0)
        corner_dz += tl.where(last_tap == 0, last_dy, 0.0)
        _store(dx_ptr + at, tl.fma(dz, a, shift), inside)
        _store(dx_ptr + at + C, tl.fma(right_dz, a, right_shift), pixel_right)
        _store(dx_ptr + at_below, tl.fma(below_dz, a, below_shift), below)
        _store(dx_ptr + at_below + C, tl.fma(corner_dz, a, corner_shift), corner)
        row += 1


def supports(x: Tensor, norm: Norm) -> bool:
    """Whether the kernels take these activations: as batch_norm.py's, in channels_last."""
    return statistics.supports(x, norm) and x.is_contiguous(memory_format=torch.channels_last)


def _launch(kernel, tile: Tile, x: Tensor, rows: Rows, *pointers, **switches) -> None:
    """Runs a kernel over all windows of x.

    Sides and channels are constants: a network has few stems, and with pitches that the compiler
    knows one address serves four pixels, which saves a fifth of the registers.
    """
    num, channels, height, width = x.shape
    windows = max(1, tile.size // x.element_size() // rows.columns)
    in_a_row = -(-num // rows.num_groups) * -(-width // STRIDE)  # of the first group
    strips = -(-height // STRIDE // tile.strip)
    programs = -(-in_a_row // windows) * rows.column_blocks * strips
    kernel[programs, rows.num_groups](
        *pointers,
        num,
        rows.num_groups,
        HEIGHT=height,
        WIDTH=width,
        C=channels,
        **switches,
        CLOSED=CLOSED,
        STRIP=tile.strip,
        BM=windows,
        BC=rows.columns,
        num_warps=tile.warps,
    )


def _forward(
    x: Tensor, norm: Norm, mode: Mode, keeps: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y, the coefficients, and what backward reads, if it is kept: peak and taps."""
    num, channels, height, width = x.shape
    shape = (num, channels, -(-height // STRIDE), -(-width // STRIDE))
    layout = {"device": x.device, "memory_format": torch.channels_last}
    y = torch.empty(shape, dtype=x.dtype, **layout)
    peak = torch.empty(shape, dtype=x.dtype, **layout) if keeps else None
    tap = torch.empty(shape, dtype=torch.uint8, **layout) if keeps else None
    rows = mode.rows(x)
    with torch.cuda.device_of(x):
        coefficients = statistics.coefficients(x, norm, rows, mode.training)
        _launch(
            _norm_pool_forward_kernel,
            FORWARD,
            x,
            rows,
            y,
            y if peak is None else peak,
            y if tap is None else tap,
            x,
            coefficients,
            KEEPS=keeps,
            # In training one NaN makes all of its channel NaN, whichever tap wins.
            LAST_NAN=not mode.training,
        )
    return y, coefficients, peak, tap


def _backward(
    dy: Tensor,
    shortcut_dy: Tensor | None,
    x: Tensor,
    coefficients: Tensor,
    peak: Tensor,
    tap: Tensor,
    mode: Mode,
    wants_dx: bool,
    wants_affine: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight and dbias; None where not wanted.

    dy, shortcut_dy and x are channels_last. A shortcut_dy is added to dy.
    """
    dx = dweight = dbias = k = None
    with torch.cuda.device_of(dy):
        if wants_affine or mode.training:
            pixels = x.shape[2] * x.shape[3]
            k, dweight, dbias, _ = reduced(dy, shortcut_dy, peak, coefficients, None, mode, pixels)
        if wants_dx:
            dx = torch.empty_like(x)
            _launch(
                _norm_pool_backward_kernel,
                BACKWARD,
                x,
                mode.rows(x),
                dx,
                dy,
                shortcut_dy,
                tap,
                x,
                coefficients,
                coefficients if k is None else k,
                TRAINING=mode.training,
            )
    return dx, dweight, dbias


class _NormPool(torch.autograd.Function):
    """y, and its gradients; forked, y twice."""

    @staticmethod
    def forward(ctx, x, weight, bias, norm, mode, fork):
        """Keeps x, the coefficients, peak and taps; never y."""
        y, *kept = _forward(x, norm, mode, keeps=True)
        ctx.save_for_backward(x, weight, *kept)
        ctx.mode = mode
        ctx.set_materialize_grads(False)
        return (y, y.detach()) if fork else y  # as in batch_norm.py

    @staticmethod
    def backward(ctx, *gradients):
        """Only what some input needs."""
        x, weight, *kept = ctx.saved_tensors
        wants_dx, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        # An output that nothing reads has none.
        given = [
            g.contiguous(memory_format=torch.channels_last) for g in gradients if g is not None
        ]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        dy, shortcut_dy = given if len(given) > 1 else (*given, None)
        wants_affine = wants_weight or wants_bias
        dx, dweight, dbias = _Gradients.apply(
            dy, shortcut_dy, x, weight, *kept, ctx.mode, wants_dx, wants_affine
        )
        dweight = dweight if wants_weight else None
        return dx, dweight, dbias if wants_bias else None, None, None, None


class _Gradients(torch.autograd.Function):
    """`_backward` as a node of its own, whose own derivative is an error that says what to do."""

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
            "batch_norm_relu_pool was differentiated twice, and its kernels have first derivatives "
            "only: methods with second derivatives (GradAlign) train with unfused batch norm, "
            "nn.BatchNorm2d, ReLU and pooling as layers of their own"
        )


def batch_norm_relu_pool(
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
    fork: bool = False,
    num_batches_tracked: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalises, rectifies and pools, by the kernels; differentiable once.

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
        fork: Whether the output is returned twice, for two readers.
        num_batches_tracked: () int64, one is added in training; None for none.

    Returns:
        (N, C, ceil(H / 2), ceil(W / 2)) of x's dtype, channels_last. With `fork` it and an alias of
        it, as from `batch_norm_act`, in eval mode, too; without gradients the same object twice.

    Raises:
        RuntimeError: shapes, dtypes or devices disagree, or a group would hold fewer than two
            values of a channel; in backward, of a second derivative.

    Source: He et al. 2015, table 1; Ioffe & Szegedy 2015, algorithms 1 and 2.
    """
    batch_norm.check(x, weight, bias, running_mean, running_var, training, num_groups, None, 0.0)
    inputs = (x.contiguous(memory_format=torch.channels_last), weight, bias)
    norm = Norm(weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps)
    mode = Mode(training, num_groups, relu=True, negative_slope=0.0)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _NormPool.apply(*inputs, norm, mode, fork)
    y, *_ = _forward(inputs[0], norm, mode, keeps=False)
    return (y, y) if fork else y
