"""SGD with momentum on float32 weights that have copies in half precision, many tensors at once.

For each weight w with gradient g, momentum buffer v and, of some weights, a copy h:

    v <- momentum v + (g + decay w)
    w <- w - lr v
    h <- w, rounded

Where there is a copy the gradient may be of its type, as the backward pass of the layer that read
the copy made it. Nothing else casts: autocast's cast of each weight in each pass and that of each
gradient are two launches a weight, 112 of them for ResNet-50.

Fused, one launch for all tensors of a parameter group. Tensors are found by a table of their
addresses (`multi_tensor`), which a launch of 2 microseconds writes for 64 of them.

Bytes per element with a copy: reads w, v, g and writes w, v, h, 20. Apart it is 32: w read and h
written by one cast, g read and written as float32 by another, and 20 in torch's fused SGD. That is
0.51 instead of 0.82 GB for ResNet-50.

Accesses of a thread: 16 bytes of w and v, 8 of g and h, where all addresses are multiples of 16, as
the allocator's are; else one value, side by side.

Numerics: float32, one rounding for h. Under fp16's gradient scaler gradients are divided by the
scale as they are read; after an overflow all stays as it is, and the host never learns of it. The
gradients themselves stay scaled, where torch's kernel writes the divided ones back.

Sources: Sutskever et al., "On the importance of initialization and momentum in deep learning",
ICML 2013, as `torch.optim.SGD` computes it; Micikevicius et al., "Mixed Precision Training", ICLR
2018, section 3.1, master copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from freeadv_fast.kernels import multi_tensor
from freeadv_fast.kernels.multi_tensor import (
    NOWHERE,
    addresses_of,
    are_aligned,
    in_layout_of,
    tensor_at,
)

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # torch builds without CUDA may come without Triton; the reference remains

    def jit(kernel):
        """Leaves a kernel as it is; nothing launches it."""
        return kernel


# 4 warps, 16 bytes a thread of each float32 tensor.
NUM_THREADS = 128
BLOCK = 4 * NUM_THREADS
# Tiles of a chunk. ResNet-50 has 3,200 chunks of 8,192 values, 24 to each of an H100's SMs.
TILES = 16
CHUNK = TILES * BLOCK


def sgd_ref_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momentum_buffers: Sequence[Tensor | None],
    copies: Sequence[Tensor | None],
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """The update by torch's own SGD between the casts; see `ops.sgd_`. The host reads numbers."""
    if found_inf is not None and found_inf:
        return
    present = [i for i, g in enumerate(grads) if g is not None]
    theta = [params[i] for i in present]
    g32 = [grads[i].to(params[i].dtype) for i in present]  # type: ignore[union-attr]
    if grad_scale is not None:
        g32 = [g / grad_scale for g in g32]
    sgd(
        theta,
        g32,
        [momentum_buffers[i] for i in present],
        foreach=False,
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,  # type: ignore[arg-type]
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )
    for i in present:
        copy = copies[i]
        if copy is not None:
            copy.copy_(params[i])


@jit
def _descend(
    w_ptr,
    g_ptr,
    v_ptr,
    h_ptr,
    at,
    left,
    rate,
    inverse_scale,
    momentum,
    weight_decay,
    HAS_MOMENTUM: tl.constexpr,
    HAS_COPY: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Updates one tile, at offsets `at`; if MASKED, only where they are below `left`."""
    mask = at < left if MASKED else None
    w = tl.load(w_ptr + at, mask=mask)
    step = tl.load(g_ptr + at, mask=mask).to(tl.float32) * inverse_scale + weight_decay * w
    if HAS_MOMENTUM:
        step += momentum * tl.load(v_ptr + at, mask=mask)
        tl.store(v_ptr + at, step, mask=mask)
    w -= rate * step
    tl.store(w_ptr + at, w, mask=mask)
    if HAS_COPY:
        tl.store(h_ptr + at, w.to(h_ptr.dtype.element_ty), mask=mask)


@jit
def _descend_chunk(
    w_ptr,
    g_ptr,
    v_ptr,
    h_ptr,
    left,
    rate,
    inverse_scale,
    momentum,
    weight_decay,
    HAS_MOMENTUM: tl.constexpr,
    HAS_COPY: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Updates the `left` values of a chunk; whole ones go unmasked, for wide accesses."""
    offsets = tl.arange(0, BLOCK)
    if left == TILES * BLOCK:
        for tile in tl.range(0, TILES, loop_unroll_factor=1):
            _descend(
                w_ptr, g_ptr, v_ptr, h_ptr, offsets + tile * BLOCK, left, rate, inverse_scale,
                momentum, weight_decay, HAS_MOMENTUM, HAS_COPY, False,
            )  # fmt: skip
    else:
        done = 0
        while done < left:
            _descend(
                w_ptr, g_ptr, v_ptr, h_ptr, offsets + done, left, rate, inverse_scale,
                momentum, weight_decay, HAS_MOMENTUM, HAS_COPY, True,
            )  # fmt: skip
            done += BLOCK


@jit
def _sgd_kernel(
    table_ptr,  # [4, tensors] i64, addresses of w, g, v and h
    layout_ptr,  # [2, tensors] i64, values, first chunk
    tensor_ptr,  # [chunks] i64, the tensor of each chunk
    lr_ptr,  # [] fp32
    grad_scale_ptr,  # [] fp32, or None
    found_inf_ptr,  # [] fp32, or None
    num_tensors,
    momentum,
    weight_decay,
    HALF: tl.constexpr,
    GRAD: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    NOWHERE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A program takes one chunk: TILES * BLOCK neighbouring values of a tensor.

    Copies are of type HALF, gradients of weights that have one of type GRAD.
    """
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0.0:
            return
    inverse_scale = 1.0
    if grad_scale_ptr is not None:
        inverse_scale = 1.0 / tl.load(grad_scale_ptr)
    chunk = tl.program_id(0)
    tensor = tl.load(tensor_ptr + chunk)
    if tl.load(table_ptr + num_tensors + tensor) == NOWHERE:
        return
    start = (chunk - tl.load(layout_ptr + num_tensors + tensor)) * (TILES * BLOCK)
    left = tl.minimum(tl.load(layout_ptr + tensor) - start, TILES * BLOCK)
    rate = tl.load(lr_ptr)
    w = tensor_at(table_ptr, tensor, tl.float32, ALIGNED) + start
    v = tensor_at(table_ptr, 2 * num_tensors + tensor, tl.float32, ALIGNED) + start
    if tl.load(table_ptr + 3 * num_tensors + tensor) == NOWHERE:
        _descend_chunk(
            w, tensor_at(table_ptr, num_tensors + tensor, tl.float32, ALIGNED) + start, v, w, left,
            rate, inverse_scale, momentum, weight_decay, HAS_MOMENTUM, False, BLOCK, TILES,
        )  # fmt: skip
    else:
        _descend_chunk(
            w, tensor_at(table_ptr, num_tensors + tensor, GRAD, ALIGNED) + start, v,
            tensor_at(table_ptr, 3 * num_tensors + tensor, HALF, ALIGNED) + start, left,
            rate, inverse_scale, momentum, weight_decay, HAS_MOMENTUM, True, BLOCK, TILES,
        )  # fmt: skip


class Table(multi_tensor.Table):
    """Where the kernel finds the tensors of a parameter group.

    Args:
        params: Float32, on one device.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        """Fills what depends on shapes; addresses come with the first update."""
        super().__init__(params, CHUNK, num_rows=4)


def sgd_(
    table: Table,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momentum_buffers: Sequence[Tensor | None],
    copies: Sequence[Tensor | None],
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """The update by the kernel; see `ops.sgd_`."""
    half, grad_of_copied = _types(grads, copies)
    grads = in_layout_of(params, grads)  # held until they were read
    addresses = addresses_of(params, grads, momentum_buffers, copies)
    device = table.layout.device
    if not isinstance(lr, Tensor):
        lr = torch.full((), lr, device=device)
    with torch.cuda.device_of(table.layout):
        _sgd_kernel[(table.num_chunks,)](
            table.hold(addresses),
            table.layout,
            table.tensors,
            lr,
            grad_scale,
            found_inf,
            table.num_tensors,
            momentum,
            weight_decay,
            HALF=half,
            GRAD=grad_of_copied,
            HAS_MOMENTUM=momentum != 0,
            NOWHERE=NOWHERE,
            BLOCK=BLOCK,
            TILES=TILES,
            ALIGNED=are_aligned(addresses),
            num_warps=NUM_THREADS // 32,
        )
    # Of which torch knows only the addresses.
    torch.autograd.graph.increment_version([*params, *(c for c in copies if c is not None)])


def _types(
    grads: Sequence[Tensor | None], copies: Sequence[Tensor | None]
) -> tuple[tl.dtype, tl.dtype]:
    """The type of all copies, and that of all gradients of weights that have one."""
    halves = {copy.dtype for copy in copies if copy is not None}
    pairs = [(grad, copy) for grad, copy in zip(grads, copies, strict=True) if grad is not None]
    of_copied = {grad.dtype for grad, copy in pairs if copy is not None}
    of_others = {grad.dtype for grad, copy in pairs if copy is None}
    torch._check(
        len(halves) <= 1
        and len(of_copied) <= 1
        and of_copied <= {torch.float32, *halves}
        and of_others <= {torch.float32},
        lambda: f"sgd: gradients {of_copied} of weights with copies {halves}, others {of_others}",
    )
    half = tl.float16 if torch.float16 in halves else tl.bfloat16
    return half, tl.float32 if torch.float32 in of_copied else half
