"""Many tensors in one launch: where kernels find them, chunk by chunk.

A program takes one chunk of one tensor. It finds the tensor by a table of addresses on the device.
These travel as arguments of a tiny kernel of their own, so that a CUDA graph holds those of the
gradients that were born in it, without a copy from memory of the host; outside of recordings it
runs only when an address has changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # torch builds without CUDA may come without Triton; the references remain

    def jit(kernel):
        """Leaves a kernel as it is; nothing launches it."""
        return kernel


# Addresses per launch that writes them: 2 of the 4 kB that a kernel's arguments may take.
NUM_WRITTEN = 256
# The address of no tensor. Wide, so that all addresses are int64 to Triton's compiler.
NOWHERE = 1 << 62


def in_layout_of(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients whose memory has the order of their parameters'; copies where it has not."""
    return [
        g if g is None or is_laid_out_like(g, p) else torch.empty_like(p, dtype=g.dtype).copy_(g)
        for p, g in zip(params, grads, strict=True)
    ]


def is_laid_out_like(tensor: Tensor, other: Tensor) -> bool:
    """Whether the strides are the same, but for those of single indices, which mean nothing."""
    if tensor.stride() == other.stride():
        return True
    strides = zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
    return all(size == 1 or ours == theirs for size, ours, theirs in strides)


@jit
def _write_addresses_kernel(
    table_ptr,  # [COUNT] i64
    addresses,  # COUNT int64 arguments, each one more than an address
    COUNT: tl.constexpr,
):
    """One program."""
    for k in tl.static_range(COUNT):
        tl.store(table_ptr + k, addresses[k] - 1)


@jit
def tensor_at(table_ptr, index, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to the tensor whose address is in the table."""
    pointer = tl.load(table_ptr + index).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


class Table:
    """Where kernels find the tensors of a parameter group.

    Args:
        params: Float32, on one device.
        chunk: Values of a chunk.
        num_rows: Tensors to each parameter, itself included.

    Attributes:
        num_tensors: Parameters.
        num_chunks: Of them all.
        layout: [2, tensors] int64, values and first chunk of each.
        tensors: [chunks] int64, the tensor of each chunk.
    """

    def __init__(self, params: Sequence[Tensor], chunk: int, num_rows: int) -> None:
        """Fills what depends on shapes; addresses come with the first update."""
        device = params[0].device
        num_values = [p.numel() for p in params]
        num_chunks = [triton.cdiv(count, chunk) for count in num_values]
        first = [0, *itertools.accumulate(num_chunks)]
        tensors = [i for i, count in enumerate(num_chunks) for _ in range(count)]
        self.num_tensors = len(params)
        self.num_chunks = len(tensors)
        self.layout = torch.tensor([num_values, first[:-1]], device=device)
        self.tensors = torch.tensor(tensors, device=device)
        num_addresses = triton.cdiv(num_rows * self.num_tensors, NUM_WRITTEN) * NUM_WRITTEN
        self._addresses = torch.empty(num_addresses, dtype=torch.int64, device=device)
        self._held: list[int] = []

    def hold(self, addresses: list[int]) -> Tensor:
        """The addresses on the device, [rows * tensors] and padding.

        A recording has a table of its own, which each of its launches fills anew.
        """
        padding = [NOWHERE] * (len(self._addresses) - len(addresses))
        if _is_recorded(self._addresses):
            table = torch.empty_like(self._addresses)
            _write(table, addresses + padding)
            return table
        if addresses != self._held:
            _write(self._addresses, addresses + padding)
            self._held = addresses
        return self._addresses


def addresses_of(*rows: Sequence[Tensor | None]) -> list[int]:
    """Where tensors lie, row after row; `NOWHERE` for None."""
    return [NOWHERE if t is None else t.data_ptr() for row in rows for t in row]


def are_aligned(addresses: list[int]) -> bool:
    """Whether all are multiples of 16, as the allocator's are: accesses of 16 bytes then."""
    return all(address % 16 == 0 for address in addresses)


def _is_recorded(tensor: Tensor) -> bool:
    """Whether what happens to a tensor now becomes part of a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _write(table: Tensor, addresses: list[int]) -> None:
    """Writes addresses into a table on the device, as arguments of launches."""
    for start in range(0, len(addresses), NUM_WRITTEN):
        # Odd, for Triton compiles anew for each choice of multiples of 16 in a tuple.
        part = tuple(address + 1 for address in addresses[start : start + NUM_WRITTEN])
        _write_addresses_kernel[(1,)](table[start:], part, COUNT=NUM_WRITTEN, num_warps=1)
