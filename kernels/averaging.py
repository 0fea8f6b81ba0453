"""The running average of weights, many tensors at once.

For each average a of a weight w, and the share f that w gets in it:

    a <- a + f (w - a)

Fused, one launch for all tensors of a network. Tensors are found by a table of their addresses
(`multi_tensor`). Bytes per element: reads a and w, writes a, 12: 0.31 GB for ResNet-50, as much as
`torch._foreach_lerp_` moves, which takes its share as a number of the host: a CUDA graph would
repeat that of its recording. Here it is read on the device.

Accesses of a thread: 16 bytes, where all addresses are multiples of 16, as the allocator's are.

Numerics: float32, in the order of `torch.lerp`: from half the way on w - (1 - f) (w - a), so that
at f = 1 the average is the weight itself, whatever finite value stood there.

Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM Journal
on Control and Optimization 30(4), 1992, with weights that fall off exponentially.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from freeadv_fast.kernels import multi_tensor
from freeadv_fast.kernels.multi_tensor import (
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


# 4 warps, 16 bytes a thread of each tensor.
NUM_THREADS = 128
BLOCK = 4 * NUM_THREADS
# Tiles of a chunk, as in `sgd`.
TILES = 16
CHUNK = TILES * BLOCK


def average_ref_(
    averages: Sequence[Tensor], weights: Sequence[Tensor], share: float | Tensor
) -> None:
    """The average by torch's own multi-tensor operation; see `ops.average_`.

    A share that is a tensor goes along as one, a launch for each weight: the host reads nothing.
    """
    if isinstance(share, Tensor):
        torch._foreach_lerp_(averages, weights, [share.to(a.dtype) for a in averages])
    else:
        torch._foreach_lerp_(averages, weights, share)


@jit
def _average_kernel(
    table_ptr,  # [2, tensors] i64, addresses of a and w
    layout_ptr,  # [2, tensors] i64, values, first chunk
    tensor_ptr,  # [chunks] i64, the tensor of each chunk
    share_ptr,  # [] fp32
    num_tensors,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A program takes one chunk: TILES * BLOCK neighbouring values of a tensor."""
    chunk = tl.program_id(0)
    tensor = tl.load(tensor_ptr + chunk)
    start = (chunk - tl.load(layout_ptr + num_tensors + tensor)) * (TILES * BLOCK)
    left = tl.minimum(tl.load(layout_ptr + tensor) - start, TILES * BLOCK)
    share = tl.load(share_ptr)
    a = tensor_at(table_ptr, tensor, tl.float32, ALIGNED) + start
    w = tensor_at(table_ptr, num_tensors + tensor, tl.float32, ALIGNED) + start
    offsets = tl.arange(0, BLOCK)
    if left == TILES * BLOCK:  # whole chunks go unmasked, for wide accesses
        for tile in tl.range(0, TILES, loop_unroll_factor=1):
            _average(a, w, offsets + tile * BLOCK, left, share, False)
    else:
        done = 0
        while done < left:
            _average(a, w, offsets + done, left, share, True)
            done += BLOCK


@jit
def _average(a_ptr, w_ptr, at, left, share, MASKED: tl.constexpr):
    """Updates one tile, at offsets `at`; if MASKED, only where they are below `left`."""
    mask = at < left if MASKED else None
    w = tl.load(w_ptr + at, mask=mask)
    a = tl.load(a_ptr + at, mask=mask)
    way = w - a
    a = tl.where(share < 0.5, a + share * way, w - (1.0 - share) * way)
    tl.store(a_ptr + at, a, mask=mask)


class Table(multi_tensor.Table):
    """Where the kernel finds the tensors of a network.

    Args:
        averages: Float32, on one device.
    """

    def __init__(self, averages: Sequence[Tensor]) -> None:
        """Fills what depends on shapes; addresses come with the first update."""
        super().__init__(averages, CHUNK, num_rows=2)


def average_(
    table: Table, averages: Sequence[Tensor], weights: Sequence[Tensor], share: float | Tensor
) -> None:
    """The average by the kernel; see `ops.average_`."""
    sources = in_layout_of(averages, weights)  # held until they were read
    addresses = addresses_of(averages, sources)
    if not isinstance(share, Tensor):
        share = torch.full((), share, device=table.layout.device)
    with torch.cuda.device_of(table.layout):
        _average_kernel[(table.num_chunks,)](
            table.hold(addresses),
            table.layout,
            table.tensors,
            share,
            table.num_tensors,
            BLOCK=BLOCK,
            TILES=TILES,
            ALIGNED=are_aligned(addresses),
            num_warps=NUM_THREADS // 32,
        )
    torch.autograd.graph.increment_version(averages)  # of which torch knows only the addresses
