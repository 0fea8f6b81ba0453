"""The stem's 4x4 convolution of packed images: stride 1, no padding, 16 channels in.

    y[n, o, r, c]  = sum over i, j, ch of x[n, ch, r + i, c + j] * w[o, ch, i, j]
    dx[n, ch, r, c] = sum over i, j, o of dy[n, o, r - i, c - j] * w[o, ch, i, j]
    dw[o, ch, i, j] = sum over n, r, c of x[n, ch, r + i, c + j] * dy[n, o, r, c]

x: (N, 16, H + 3, W + 3), the layout of `space_to_depth.py`. y: (N, O, H, W). Both channels_last. In
their memory the 4 horizontal neighbours of a position are 64 consecutive values, so that one tap
row's im2col matrix is a strided load: a row of 64 values every 16. Everything is products of such
tiles, on tensor cores, with float32 sums:

- Forward, a program walks down BM columns (n, c). A row of x is loaded once and multiplied by all
  four tap rows at once, [BM, 64] x [64, 4 * O]: block b of the sums belongs to output row
  r - 3 + b. Block 0 is then complete and is stored, the others move up.
- The input's gradient walks down dy in the same way, [BM, O] x [O, 4 * 64]: a value of dy tells of
  four rows of dx, which move up as above, and of four columns, which are brought together from
  neighbouring rows of a complete block (`tl.gather`) and summed. A product of dx's 16 channels
  alone would be too narrow for tensor cores.
- The weights' gradient: x^T dy of BM columns, a product for every tap row, 4 x [64, O] sums. Of
  ROWS output rows each row of dy and of x is loaded once and used up to four times. Programs write
  sums of their own, a second kernel adds them in a fixed order: no atomics.

As many programs as run at once share all rows equally, so that none waits for a last wave.

Why: of 256 images of 224 pixels, with 64 channels, cuDNN 9.19 takes 647, 875 and 458 us for the
three on an H200 (bf16; bench/results/h200/trials/stem-convolution.log), where the bytes take 121 at
4.3 TB/s and the products 133 at 790 TFLOP/s.

Numerics: the weights are rounded to x's dtype as they are loaded, and need no cast of their own;
sums are float32 and rounded once, dw to the weights' dtype. Each of the three is the derivative of
the others, hence the derivatives of all orders. dx at what the layout keeps zero is the
convolution's own gradient.

Source: implicit GEMM: Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning", 2014,
section 3.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Arguments that kernels are not compiled anew for. What alignment needs to be known is constant.
SIZES = ("num_columns", "height", "width", "row_blocks", "num_tasks", "share", "num_programs")

try:
    import triton
    import triton.language as tl

    jit = triton.jit(do_not_specialize=SIZES)
except ImportError:  # torch builds without CUDA may come without Triton; the reference remains

    def jit(kernel):
        """Leaves a kernel as it is; nothing launches it."""
        return kernel


# Channels of a packed image, and rows and columns of the kernel. The Triton code, which may not
# read globals, repeats them: 3 = TAPS - 1, 64 = TAPS * CHANNELS, 256 = TAPS * 64.
CHANNELS, TAPS = 16, 4
# Channels of the output: sums for four times as many fit into the registers.
OUT_CHANNELS = (16, 32, 64)
DTYPES = (torch.bfloat16, torch.float16)
# Output rows of a task of the weights' gradient: 3 more are read of x.
TASK_ROWS = 3
# Elements that a program of the merge adds up, programs' sums that it loads at once, its warps.
MERGE_COLUMNS, MERGE_ROWS, MERGE_WARPS = 64, 128, 8


class Tile(NamedTuple):
    """How one kernel is launched.

    Attributes:
        columns: Columns of images in a tile, BM: at least 64 for Hopper's warp groups.
        num_warps: Of a program.
        num_stages: Tiles whose loads are under way, that at hand included.
        per_sm: Programs of an SM at once; their registers are limited to this.
    """

    columns: int
    num_warps: int
    num_stages: int
    per_sm: int

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        registers = min(65536 // (self.per_sm * self.num_warps * 32) // 8 * 8, 255)
        return {
            "BM": self.columns,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": registers,
        }


class Tiles(NamedTuple):
    """How the three kernels are launched."""

    forward: Tile
    input_gradient: Tile
    weight_gradient: Tile


# By major compute capability; no other is known to compile.
TILES = {
    8: Tiles(Tile(64, 4, 3, 2), Tile(64, 4, 3, 2), Tile(16, 4, 2, 2)),
    9: Tiles(Tile(64, 4, 3, 3), Tile(64, 4, 3, 2), Tile(32, 4, 2, 3)),
}


def stem_convolution_ref(x: Tensor, weight: Tensor) -> Tensor:
    """The specification in plain PyTorch; see `stem_convolution`."""
    return F.conv2d(x, weight.to(x.dtype))


def input_gradient_ref(dy: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `stem_convolution_ref` by x, channels_last."""
    num, _, height, width = dy.shape
    shape = (num, CHANNELS, height + TAPS - 1, width + TAPS - 1)
    dx = torch.nn.grad.conv2d_input(shape, weight.to(dy.dtype), dy)
    return dx.contiguous(memory_format=torch.channels_last)


def weight_gradient_ref(x: Tensor, dy: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of `stem_convolution_ref` by weights of a dtype, channels_last."""
    dw = torch.nn.grad.conv2d_weight(x, (dy.size(1), CHANNELS, TAPS, TAPS), dy)
    return dw.to(dtype, memory_format=torch.channels_last)


@jit
def _next_row(sums, BM: tl.constexpr, BN: tl.constexpr):
    """The first of four blocks of columns, and the others, each one place further, then zeros.

    Columns of a tensor core's sums are registers: nothing moves between threads.
    """
    blocks = tl.reshape(sums, [BM, 2, 2, BN]).permute(0, 3, 2, 1)
    left, right = tl.split(blocks)
    block0, block1 = tl.split(left)
    block2, block3 = tl.split(right)
    none = tl.zeros([BM, BN], tl.float32)
    blocks = tl.join(tl.join(block1, block2), tl.join(block3, none))
    return block0, tl.reshape(blocks.permute(0, 3, 2, 1), [BM, 4 * BN])


@jit
def _stem_forward_kernel(
    y_ptr,  # [N, H, W, OUT] as x, output
    x_ptr,  # [N, H + 3, W + 3, 16] bf16 | fp16 | fp32
    weight_ptr,  # [OUT, 4, 4, 16] fp32 | as x
    num_columns,  # N*W
    height,  # H
    width,  # W
    num_tasks,  # H * ceil(N*W / BM)
    share,  # tasks of a program
    OUT: tl.constexpr,
    BM: tl.constexpr,
):
    """A share of all tasks, each a row of BM columns of y."""
    k = tl.arange(0, 64)
    n = tl.arange(0, 4 * OUT)
    o = tl.arange(0, OUT)
    weight_ptr += (n % OUT * 256 + (3 - n // OUT) * 64)[None, :] + k[:, None]
    weight = tl.load(weight_ptr).to(x_ptr.dtype.element_ty)
    task = tl.program_id(0) * share
    last = tl.minimum(task + share, num_tasks)
    while task < last:  # the rows below each other that are left, of one block of columns
        column = task // height * BM + tl.arange(0, BM)
        is_column = (column < num_columns)[:, None]
        image = (column // width).to(tl.int64)
        column %= width
        xs = x_ptr + ((image * (height + 3) * (width + 3) + column) * 16)[:, None] + k[None, :]
        ys = y_ptr + ((image * height * width + column) * OUT)[:, None] + o[None, :]
        first = task % height
        end = tl.minimum(first + last - task, height)
        sums = tl.zeros([BM, 4 * OUT], tl.float32)
        for row in range(first, end + 3):
            x = tl.load(xs + row * ((width + 3) * 16), mask=is_column, other=0.0)
            y, sums = _next_row(tl.dot(x, weight, sums), BM, OUT)
            is_y = is_column & (row >= first + 3)
            y_row = ys + (row - 3) * (width * OUT)
            tl.store(y_row, y.to(y_ptr.dtype.element_ty), mask=is_y)
        task += end - first


@jit
def _stem_input_gradient_kernel(
    dx_ptr,  # [N, H + 3, W + 3, 16] as dy, output
    dy_ptr,  # [N, H, W, OUT] bf16 | fp16 | fp32
    weight_ptr,  # [OUT, 4, 4, 16] fp32 | as dy
    num_columns,  # N * (W + 3)
    height,  # H
    width,  # W
    num_tasks,  # (H + 3) * ceil(N * (W + 3) / (BM - 3))
    share,  # tasks of a program
    OUT: tl.constexpr,
    BM: tl.constexpr,
):
    """A share of all tasks, each a row of BM - 3 columns of dx."""
    m = tl.arange(0, BM)
    n = tl.arange(0, 64)  # j, ch
    o = tl.arange(0, OUT)
    ch = tl.arange(0, 16)
    weight_ptr += o[:, None] * 256 + tl.arange(0, 256)[None, :]
    weight = tl.load(weight_ptr).to(dy_ptr.dtype.element_ty)
    left = tl.maximum(m[:, None] - n[None, :] // 16, 0)
    task = tl.program_id(0) * share
    last = tl.minimum(task + share, num_tasks)
    while task < last:  # the rows below each other that are left, of one block of columns
        # The first three are the last block's: dx is whole from the fourth on. An image's last
        # three, where dy has none, keep it apart from the next.
        column = task // (height + 3) * (BM - 3) - 3 + m
        is_column = (column >= 0) & (column < num_columns)
        image = (column // (width + 3)).to(tl.int64)
        column %= width + 3
        is_dy = (is_column & (column < width))[:, None]
        is_dx = (is_column & (m >= 3))[:, None]
        dxs = dx_ptr + ((image * (height + 3) * (width + 3) + column) * 16)[:, None] + ch[None, :]
        dys = dy_ptr + ((image * height * width + column) * OUT)[:, None] + o[None, :]
        first = task % (height + 3)
        end = tl.minimum(first + last - task, height + 3)
        sums = tl.zeros([BM, 256], tl.float32)
        for row in range(first - 3, end):
            is_row = is_dy & (row >= 0) & (row < height)
            dy = tl.load(dys + row * (width * OUT), mask=is_row, other=0.0)
            taps, sums = _next_row(tl.dot(dy, weight, sums), BM, 64)
            dx = tl.sum(tl.reshape(tl.gather(taps, left, 0), [BM, 4, 16]), 1)
            dx_row = dxs + row * ((width + 3) * 16)
            tl.store(dx_row, dx.to(dx_ptr.dtype.element_ty), mask=is_dx & (row >= first))
        task += end - first


@jit
def _stem_weight_gradient_kernel(
    partial_ptr,  # [P, 4, 64, OUT] fp32, output
    x_ptr,  # [N, H + 3, W + 3, 16] bf16 | fp16 | fp32
    dy_ptr,  # [N, H, W, OUT] as x
    num_columns,  # N*W
    height,  # H
    width,  # W
    row_blocks,  # ceil(H / ROWS)
    num_tasks,  # row_blocks * ceil(N*W / BM)
    share,  # tasks of a program
    OUT: tl.constexpr,
    BM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The sums of a share of all tasks, each ROWS rows of BM columns of dy."""
    k = tl.arange(0, 64)
    o = tl.arange(0, OUT)
    dw0 = tl.zeros([64, OUT], tl.float32)
    dw1 = tl.zeros([64, OUT], tl.float32)
    dw2 = tl.zeros([64, OUT], tl.float32)
    dw3 = tl.zeros([64, OUT], tl.float32)
    first = tl.program_id(0) * share
    for task in range(first, tl.minimum(first + share, num_tasks)):
        column = task // row_blocks * BM + tl.arange(0, BM)
        is_column = (column < num_columns)[:, None]
        image = (column // width).to(tl.int64)
        column %= width
        row = task % row_blocks * ROWS
        xs = x_ptr + ((image * (height + 3) * (width + 3) + column) * 16)[:, None] + k[None, :]
        dys = dy_ptr + ((image * height * width + column) * OUT)[:, None] + o[None, :]
        dy0 = tl.zeros([BM, OUT], dy_ptr.dtype.element_ty)
        dy1, dy2, dy3 = dy0, dy0, dy0
        for tap in tl.static_range(ROWS + 3):  # row of x; dy0 to dy3 are of this row and above
            is_x = is_column & (row < height + 3)
            x = tl.trans(tl.load(xs + row * ((width + 3) * 16), mask=is_x, other=0.0))
            if tap < ROWS:
                is_dy = is_column & (row < height)
                dy0 = tl.load(dys + row * (width * OUT), mask=is_dy, other=0.0)
                dw0 = tl.dot(x, dy0, dw0)
            if tap >= 1 and tap < ROWS + 1:
                dw1 = tl.dot(x, dy1, dw1)
            if tap >= 2 and tap < ROWS + 2:
                dw2 = tl.dot(x, dy2, dw2)
            if tap >= 3:
                dw3 = tl.dot(x, dy3, dw3)
            dy3 = dy2
            dy2 = dy1
            dy1 = dy0
            row += 1
    partial_ptr += (tl.program_id(0) * 256 + k)[:, None] * OUT + o[None, :]
    tl.store(partial_ptr, dw0)
    tl.store(partial_ptr + 64 * OUT, dw1)
    tl.store(partial_ptr + 128 * OUT, dw2)
    tl.store(partial_ptr + 192 * OUT, dw3)


@jit
def _stem_merge_kernel(
    dw_ptr,  # [OUT, 4, 4, 16] fp32 | bf16 | fp16, output
    partial_ptr,  # [P, 4, 64, OUT] fp32
    num_programs,  # P
    OUT: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
):
    """The sums of all programs, in their order."""
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    program = tl.arange(0, BP)
    sums = tl.zeros([BP, BN], tl.float32)
    for done in range(0, num_programs, BP):
        is_program = (done + program < num_programs)[:, None]
        offsets = (done + program)[:, None] * (256 * OUT) + at[None, :]
        sums += tl.load(partial_ptr + offsets, mask=is_program, other=0.0)
    dw = tl.sum(sums, 0).to(dw_ptr.dtype.element_ty)
    tl.store(dw_ptr + at % OUT * 256 + at // OUT, dw)


@functools.cache
def _tiles(device: torch.device) -> Tiles:
    """How kernels are launched on a device; small tiles for the interpreter."""
    if device.type != "cuda":
        return Tiles(*[Tile(16, 4, 1, 1)] * 3)
    return TILES[torch.cuda.get_device_capability(device)[0]]


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    """SMs of a GPU; 3 for the interpreter."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def supports(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels take a packed input and weights, on a GPU.

    Args:
        x: Of the dtype in which the product is to be taken.
        weight: Of any float dtype.
    """
    return (
        x.dtype in DTYPES
        and x.dim() == 4
        and x.size(1) == CHANNELS
        and x.numel() > 0
        and min(x.shape[2:]) >= TAPS
        and x.is_contiguous(memory_format=torch.channels_last)
        and weight.device == x.device
        and weight.size(0) in OUT_CHANNELS
        and weight.shape[1:] == (CHANNELS, TAPS, TAPS)
        # Offsets within an image, and columns, are int32.
        and max(x[0].numel(), x[0, 0].numel() * weight.size(0), x.size(0) * x.size(3)) < 1 << 31
        and torch.cuda.get_device_capability(x.device)[0] in TILES
    )


def _shares(num_tasks: int, tile: Tile, device: torch.device) -> tuple[int, int]:
    """Programs, as many as run at once, and tasks of each, one after the other."""
    share = triton.cdiv(num_tasks, tile.per_sm * _num_multiprocessors(device))
    return triton.cdiv(num_tasks, share), share


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    """y."""
    num, _, height, width = x.shape
    height, width, out = height - TAPS + 1, width - TAPS + 1, weight.size(0)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    y = x.new_empty((num, height, width, out)).permute(0, 3, 1, 2)
    tile = _tiles(x.device).forward
    columns = num * width
    num_tasks = height * triton.cdiv(columns, tile.columns)
    num_programs, share = _shares(num_tasks, tile, x.device)
    with torch.cuda.device_of(x):
        _stem_forward_kernel[(num_programs,)](
            y, x, weight, columns, height, width, num_tasks, share, OUT=out, **tile.options
        )
    return y


def _input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """dx, in the strides that a packed input has."""
    num, out, height, width = dy.shape
    dy, weight = (t.contiguous(memory_format=torch.channels_last) for t in (dy, weight))
    packed = (height + TAPS - 1, width + TAPS - 1)
    dx = dy.new_empty((num, *packed, CHANNELS)).permute(0, 3, 1, 2)
    tile = _tiles(dy.device).input_gradient
    columns = num * packed[1]
    num_tasks = packed[0] * triton.cdiv(columns, tile.columns - TAPS + 1)
    num_programs, share = _shares(num_tasks, tile, dy.device)
    with torch.cuda.device_of(dy):
        _stem_input_gradient_kernel[(num_programs,)](
            dx, dy, weight, columns, height, width, num_tasks, share, OUT=out, **tile.options
        )
    return dx


def _weight_gradient(x: Tensor, dy: Tensor, dtype: torch.dtype) -> Tensor:
    """dw, channels_last."""
    num, out, height, width = dy.shape
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    dw = dy.new_empty((out, TAPS, TAPS, CHANNELS), dtype=dtype).permute(0, 3, 1, 2)
    tile = _tiles(x.device).weight_gradient
    row_blocks = triton.cdiv(height, TASK_ROWS)
    num_tasks = row_blocks * triton.cdiv(num * width, tile.columns)
    num_programs, share = _shares(num_tasks, tile, x.device)
    with torch.cuda.device_of(x):
        partial = dw.new_empty((num_programs, dw.numel()), dtype=torch.float32)
        _stem_weight_gradient_kernel[(num_programs,)](
            partial,
            x,
            dy,
            num * width,
            height,
            width,
            row_blocks,
            num_tasks,
            share,
            OUT=out,
            ROWS=TASK_ROWS,
            **tile.options,
        )
        _stem_merge_kernel[(dw.numel() // MERGE_COLUMNS,)](
            dw,
            partial,
            num_programs,
            OUT=out,
            BP=MERGE_ROWS,
            BN=MERGE_COLUMNS,
            num_warps=MERGE_WARPS,
        )
    return dw


_op = torch.library.custom_op(
    "freeadv_fast::stem_convolution", stem_convolution_ref, mutates_args=(), device_types="cpu"
)
_op.register_kernel("cuda", _forward)
_input_gradient_op = torch.library.custom_op(
    "freeadv_fast::stem_input_gradient", input_gradient_ref, mutates_args=(), device_types="cpu"
)
_input_gradient_op.register_kernel("cuda", _input_gradient)
_weight_gradient_op = torch.library.custom_op(
    "freeadv_fast::stem_weight_gradient", weight_gradient_ref, mutates_args=(), device_types="cpu"
)
_weight_gradient_op.register_kernel("cuda", _weight_gradient)


@_op.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    """Shape, dtype and layout of y."""
    num, _, height, width = x.shape
    shape = (num, height - TAPS + 1, width - TAPS + 1, weight.size(0))
    return x.new_empty(shape).permute(0, 3, 1, 2)


@_input_gradient_op.register_fake
def _(dy: Tensor, weight: Tensor) -> Tensor:
    """Shape, dtype and layout of dx."""
    num, _, height, width = dy.shape
    shape = (num, height + TAPS - 1, width + TAPS - 1, CHANNELS)
    return dy.new_empty(shape).permute(0, 3, 1, 2)


@_weight_gradient_op.register_fake
def _(x: Tensor, dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Shape, dtype and layout of dw."""
    return dy.new_empty((dy.size(1), TAPS, TAPS, CHANNELS), dtype=dtype).permute(0, 3, 1, 2)


class _Convolution(torch.autograd.Function):
    """y and dx. The weights' gradient is `_WeightPath`'s: dy is handed on to it."""

    @staticmethod
    def forward(ctx, x, weight, path):
        """Keeps the weights."""
        ctx.save_for_backward(weight)
        return _op(x, weight)

    @staticmethod
    def backward(ctx, dy):
        """dx if x may need one, and dy for the path."""
        (weight,) = ctx.saved_tensors
        dx = _input_gradient_op(dy, weight) if ctx.needs_input_grad[0] else None
        return dx, None, dy


class _WeightPath(torch.autograd.Function):
    """dw as a node of its own, which autograd leaves out of passes that ask for dx alone.

    In one node with dx it could not: what `ctx.needs_input_grad` says is whether weights require a
    gradient at all, and not whether this pass, an attack's perhaps, wants it.
    """

    @staticmethod
    def forward(ctx, weight, other):
        """Something in the shape and dtype of y, in no memory, which nobody reads.

        `other` is (x,): autograd does not look into tuples. Were x an input, this node would be on
        its way to x's gradient.
        """
        (x,) = other
        ctx.save_for_backward(x)
        ctx.dtype = weight.dtype
        num, _, height, width = x.shape
        shape = (num, weight.size(0), height - TAPS + 1, width - TAPS + 1)
        return x.new_empty(()).expand(shape)

    @staticmethod
    def backward(ctx, dy):
        """dw."""
        (x,) = ctx.saved_tensors
        return _weight_gradient_op(x, dy, ctx.dtype), None


def _save(ctx, inputs, output):
    """Keeps a product's two factors."""
    ctx.save_for_backward(*inputs[:2])


def _backward_of_input_gradient(ctx, ddx):
    """The derivatives of dx by dy and the weights; ddx stands where x did."""
    dy, weight = ctx.saved_tensors
    return stem_convolution(ddx, weight), _weight_gradient_op(ddx, dy, weight.dtype)


def _backward_of_weight_gradient(ctx, ddw):
    """The derivatives of dw by x and dy; ddw stands where the weights did."""
    x, dy = ctx.saved_tensors
    return _input_gradient_op(dy, ddw), stem_convolution(x, ddw), None


_input_gradient_op.register_autograd(_backward_of_input_gradient, setup_context=_save)
_weight_gradient_op.register_autograd(_backward_of_weight_gradient, setup_context=_save)


def stem_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Convolves packed images with 4x4 kernels, by the Triton kernels on a GPU.

    Differentiable as often as wanted. A gradient that is not asked for costs nothing, but for x's
    where x requires one and only the weights' is asked for.

    Args:
        x: (N, 16, H + 3, W + 3) bfloat16 or float16, channels_last, as `supports` has it.
        weight: (O, 16, 4, 4), O of 16, 32 and 64; of x's dtype, or float32, which is rounded to it.

    Returns:
        (N, O, H, W) of x's dtype, channels_last.
    """
    y: Tensor = _Convolution.apply(x, weight, _WeightPath.apply(weight, (x,)))
    return y
