"""Gradients at one signed byte an element: the formula of the codecs, and what a message holds.

A parameter's gradient, in the order of its memory, is cut into blocks of 512 elements; its last
block may be shorter. The blocks of all parameters are numbered through in the order of the
network's parameters. Where data parallelism keeps a gradient (which bucket, which place in it)
decides nothing: a resumed run, whose first update has other buckets, gets the same bits.

Blocks that share a scale are a segment:

- ``bucket``: a block; its scale is the largest magnitude in it.
- ``paper``: what a rank encodes of a tensor; its scale is the L2 norm of that.

With 24 random bits for each element,

    level = sign(g) * ((int(min(|g| * (127 * 2^24 / scale), 127 * 2^24)) + bits) >> 24)
    decoded = scale * level / 127

in fp32: a = 127 |g| / scale is rounded up with probability a - floor(a), to within 2^-24.

- A scale is sent with 16 significant bits, rounded up, so that scale * level is exact: compilers
  that fuse a product and a sum change nothing. It is 0 below 2^-96, and all levels are 0. It is
  NaN where a gradient or the scale is not finite, or from 2^96 on; the segment decodes to NaN.
- An L2 norm is summed in fp64 in a fixed order (`_segment_norms`): all machines get the same bits.
- The bits of elements 4q..4q+3 are the upper ones of Philox4x32-10's four words at counter
  (q, update mod 2^32, update div 2^32, 2^31 + 2 * rank + stage) under the run's seed, where element
  512 b + i is element i of block b.

The exchange has two stages. W = N g ranks are on N machines, g on each; rank m g + l is the one at
place l of machine m. All g hold the mean of their machine's gradients, an fp32 sum times fl(1 / g),
and each encodes a share of it: the one at place l the blocks b with b mod g = l. Block b belongs to
the rank at place b mod g of machine floor(b / g) mod N, which gets it from the N ranks at its
place, decodes all N, averages them in the order of machines,

    mean = (scale_0 * level_0 + scale_1 * level_1 + ...) * fl(1 / (127 N)),

encodes the mean of its blocks and sends that to everybody. So for ``paper`` the first norm is that
of a rank's share of a tensor and the second that of an owner's part of it. Where g = 1 a rank is
what a machine is: it encodes everything, and block b belongs to rank b mod W. A message is

    levels      int8, of the owner's blocks in order, each block filled up to a multiple of 4
    scales      float32, of the owner's segments in order
    filling     up to the longest message of the bucket's W owners

so a rank sends N - 1 messages a bucket and then W - 1. Filling is 0.04 % of ResNet-50's in buckets
of 25 MiB on 8 ranks and 1 % on 128; in a network of 6,000 elements, 14 % on 2.

This file is the specification, and runs where `freeadv_fast._C` was not built; csrc/ does the same
in C++ and CUDA, bit for bit. `compress` sends the messages.

Sources: Zhang et al., "Distributed adversarial training to robustify deep neural networks at
scale", UAI 2022 (``paper``, sent one way in its code); Alistarh et al., "QSGD", 2017 (buckets).
Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from freeadv_fast import ops

Codec = Literal["paper", "bucket"]

BLOCK = 512
LEVELS = 127
# Levels in fixed point with 24 binary places; 127 * 2^24 + 2^24 - 1 = 2^31 - 1 is the largest sum.
UNITS = LEVELS * 2.0**24
SMALLEST_SCALE, NO_SCALE = 2.0**-96, 2.0**96
# The counter of four elements is one word.
MOST_BLOCKS = 2**32 * 4 // BLOCK


class Stage(enum.IntEnum):
    """The two times that a gradient is encoded."""

    GRADIENTS = 0
    MEAN = 1


@dataclasses.dataclass(frozen=True)
class RandomStream:
    """Names the random bits of one rank's encoding.

    Attributes:
        seed: 0..2^63-1, of the run.
        update: One int64 on the device, where a recorded update finds it anew at every replay.
        rank: Who encodes. stage: And when.
    """

    seed: int
    update: Tensor
    rank: int
    stage: Stage

    @property
    def word(self) -> int:
        """The counter's last word; the exchange of images has those below 2^31."""
        return 2**31 + 2 * self.rank + self.stage


class Column(enum.IntEnum):
    """What `Blocks.table` says of a block."""

    OFFSET = 0  # of its first element in the gradients
    LENGTH = 1  # in elements, 1..512
    NUMBER = 2  # among all blocks of the network
    LEVELS = 3  # first byte in the messages
    SCALE = 4  # float32 in the messages
    SEGMENT = 5  # its tensor in `Blocks.segments`; 0 where there are none


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks that are encoded or decoded together.

    Attributes:
        table: (K, 6) int32, a row a block, tensor after tensor.
        segments: (T + 1,) int32, the first row of each tensor and the end; None where every block
            has a scale of its own.
    """

    table: Tensor
    segments: Tensor | None


@dataclasses.dataclass(frozen=True)
class Piece:
    """One parameter's gradient in a bucket.

    Attributes:
        first_block: Number of its first block. offset: Of its first element in the bucket.
        num_elements: Its size.
    """

    first_block: int
    offset: int
    num_elements: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """The messages of one bucket, seen from one rank.

    Attributes:
        blocks: All blocks, placed in the messages of ranks 0, 1, ... end to end.
        share: Those that this rank encodes, placed in the messages of the N owners at its place of
            machines 0, 1, ... end to end.
        own: Those that belong to this rank, placed in its own message.
        num_bytes: Length of every message.
    """

    blocks: Blocks
    share: Blocks
    own: Blocks
    num_bytes: int


def number_blocks(sizes: Sequence[int]) -> list[int]:
    """The number of each parameter's first block.

    Args:
        sizes: Elements of the network's parameters, in order.

    Raises:
        ValueError: more blocks than random numbers.
    """
    ends = np.cumsum([0, *(-(-size // BLOCK) for size in sizes)])
    if ends[-1] > MOST_BLOCKS:
        raise ValueError(f"{ends[-1]} blocks of gradients: expected at most {MOST_BLOCKS}")
    return [int(first) for first in ends[:-1]]


def lay_out(
    pieces: Sequence[Piece],
    *,
    codec: Codec,
    rank: int,
    num_ranks: int,
    local_size: int = 1,
    device: torch.device,
) -> Layout:
    """Where every block of a bucket goes.

    Args:
        pieces: The bucket's gradients, in any order.
        codec: Decides who shares a scale.
        rank: This rank. num_ranks: W.
        local_size: g, the ranks of a machine.
        device: Of the gradients.
    """
    first, offsets, sizes = np.array([dataclasses.astuple(piece) for piece in pieces]).T
    counts = -(-sizes // BLOCK)
    tensor = np.repeat(np.arange(len(pieces)), counts)
    index = np.arange(len(tensor)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.zeros((len(tensor), len(Column)), np.int64)
    table[:, Column.OFFSET] = offsets[tensor] + BLOCK * index
    table[:, Column.LENGTH] = np.minimum(sizes[tensor] - BLOCK * index, BLOCK)
    table[:, Column.NUMBER] = first[tensor] + index
    num_machines = num_ranks // local_size
    machine = table[:, Column.NUMBER] // local_size % num_machines
    place = table[:, Column.NUMBER] % local_size
    owner = machine * local_size + place

    num_bytes = 0
    for peer in range(num_ranks):
        is_peers = owner == peer
        filled = -(-table[is_peers, Column.LENGTH] // 4) * 4
        begins = _begins(tensor[is_peers], codec)
        table[is_peers, Column.LEVELS] = np.cumsum(filled) - filled
        table[is_peers, Column.SCALE] = filled.sum() // 4 + np.cumsum(begins) - 1
        num_bytes = max(num_bytes, int(filled.sum() + 4 * begins.sum()))

    def collect(which: NDArray[np.bool_], message: NDArray[np.int64] | int) -> Blocks:
        """Some blocks, each in the message of that index."""
        rows = table.copy()
        rows[:, Column.LEVELS] += message * num_bytes
        rows[:, Column.SCALE] += message * (num_bytes // 4)
        return _collect(rows[which], tensor[which], codec, device)

    return Layout(
        blocks=collect(np.ones(len(table), bool), owner),
        share=collect(place == rank % local_size, machine),
        own=collect(owner == rank, 0),
        num_bytes=num_bytes,
    )


def _begins(tensor: NDArray[np.int64], codec: Codec) -> NDArray[np.bool_]:
    """Which of some blocks are the first of their segment, by the tensor that each is of."""
    if codec == "bucket":
        return np.ones(len(tensor), bool)
    return np.diff(tensor, prepend=-1) > 0


def _collect(
    table: NDArray[np.int64], tensor: NDArray[np.int64], codec: Codec, device: torch.device
) -> Blocks:
    """Blocks on the device, with the segments that their tensors make."""
    segments = None
    if codec == "paper":
        begins = _begins(tensor, codec)
        table[:, Column.SEGMENT] = np.cumsum(begins) - 1
        ends = [*np.flatnonzero(begins), len(table)]
        segments = torch.tensor(ends, dtype=torch.int32, device=device)
    return Blocks(torch.tensor(table, dtype=torch.int32, device=device), segments)


def encode_gradients(
    gradients: Tensor, blocks: Blocks, stream: RandomStream, message: Tensor
) -> None:
    """Writes levels and scales of gradients into messages.

    Args:
        gradients: (n,) float32, contiguous.
        blocks: Which of them, and where they go.
        stream: Of the random bits.
        message: (bytes,) uint8, contiguous, on the same device; written where blocks lie.
    """
    if ops.codec_backend(gradients.device.type) == "compiled":
        ops.encode_gradients(
            gradients, blocks.table, blocks.segments, stream.update, stream.seed, stream.word,
            message,
        )  # fmt: skip
    else:
        encode_gradients_ref(gradients, blocks, stream, message)


def encode_mean(messages: Tensor, blocks: Blocks, stream: RandomStream, message: Tensor) -> None:
    """Decodes one message of each machine, averages them and encodes the mean.

    Args:
        messages: (N, bytes) uint8, contiguous.
        blocks: All that a message holds; its places are those of `message` as well.
        stream: Of the random bits.
        message: (bytes,) uint8, contiguous, on the same device; written where blocks lie.
    """
    if ops.codec_backend(messages.device.type) == "compiled":
        ops.encode_mean(
            messages, blocks.table, blocks.segments, stream.update, stream.seed, stream.word,
            message,
        )  # fmt: skip
    else:
        encode_mean_ref(messages, blocks, stream, message)


def decode_gradients(message: Tensor, blocks: Blocks, gradients: Tensor) -> None:
    """Writes the gradients that messages hold.

    Args:
        message: (bytes,) uint8, contiguous.
        blocks: All blocks of the gradients.
        gradients: (n,) float32, contiguous, on the same device; overwritten.
    """
    if ops.codec_backend(message.device.type) == "compiled":
        ops.decode_gradients(message, blocks.table, gradients)
    else:
        decode_gradients_ref(message, blocks, gradients)


def encode_gradients_ref(
    gradients: Tensor, blocks: Blocks, stream: RandomStream, message: Tensor
) -> None:
    """`encode_gradients` in plain PyTorch."""
    places, is_within = _elements(blocks, Column.OFFSET, len(gradients))
    _encode(gradients[places].where(is_within, 0), blocks, stream, message)


def encode_mean_ref(
    messages: Tensor, blocks: Blocks, stream: RandomStream, message: Tensor
) -> None:
    """`encode_mean` in plain PyTorch."""
    _encode(_decode_mean(messages, blocks), blocks, stream, message)


def decode_gradients_ref(message: Tensor, blocks: Blocks, gradients: Tensor) -> None:
    """`decode_gradients` in plain PyTorch."""
    places, is_within = _elements(blocks, Column.OFFSET, len(gradients))
    gradients[places[is_within]] = _decode_mean(message.unsqueeze(0), blocks)[is_within]


def _encode(values: Tensor, blocks: Blocks, stream: RandomStream, message: Tensor) -> None:
    """Encodes (K, 512) values, 0 where a block has ended."""
    scales = _scales(values, blocks)
    has_levels = (scales > 0).unsqueeze(1)
    units = values.abs() * (UNITS / scales).unsqueeze(1)
    units = units.clamp(max=UNITS).where(has_levels, 0)
    magnitudes = (units.int() + (_random_words(blocks, stream) >> 8).int()) >> 24
    levels = magnitudes.where(values >= 0, -magnitudes).to(torch.int8)
    places, _ = _elements(blocks, Column.LEVELS, len(message))
    is_sent = _positions(blocks) < (blocks.table[:, Column.LENGTH, None] + 3) // 4 * 4
    message.view(torch.int8)[places[is_sent]] = levels[is_sent]
    message.view(torch.float32)[blocks.table[:, Column.SCALE].long()] = scales


def _decode_mean(messages: Tensor, blocks: Blocks) -> Tensor:
    """(K, 512) means over (N, bytes) messages, 0 where a block has ended."""
    places, is_within = _elements(blocks, Column.LEVELS, messages.shape[1])
    total = torch.zeros(places.shape, device=messages.device)
    for message in messages:
        scales = message.view(torch.float32)[blocks.table[:, Column.SCALE].long()]
        total += scales.unsqueeze(1) * message.view(torch.int8)[places]
    factor = float(np.float32(1 / (LEVELS * len(messages))))
    return (total * factor).where(is_within, 0)


def _positions(blocks: Blocks) -> Tensor:
    return torch.arange(BLOCK, device=blocks.table.device)


def _elements(blocks: Blocks, column: Column, end: int) -> tuple[Tensor, Tensor]:
    """(K, 512) places of the blocks' elements, all below `end`, and which of them there are."""
    positions = _positions(blocks)
    places = blocks.table[:, column, None].long() + positions
    return places.clamp(max=end - 1), positions < blocks.table[:, Column.LENGTH, None]


def _scales(values: Tensor, blocks: Blocks) -> Tensor:
    """(K,) the scale of each block's segment, as it is sent."""
    if blocks.segments is None:
        scales = values.abs().amax(1)
    else:
        scales = _segment_norms(values, blocks.segments)[blocks.table[:, Column.SEGMENT].long()]
    rounded_up = ((scales.view(torch.int32) + 0xFF) & ~0xFF).view(torch.float32)
    sent = rounded_up.where(scales < NO_SCALE, torch.nan)
    return sent.where(~(scales < SMALLEST_SCALE), 0)


def _segment_norms(values: Tensor, segments: Tensor) -> Tensor:
    """(T,) L2 norms.

    The order of the sum is one in which a GPU's threads add: in a block, seen as (4, 32, 4)
    elements, over the first, the last and the middle axis; over the blocks of a segment in 256
    running sums, which block k adds to the one k mod 256. Wherever values are added side by side,
    the second half is added to the first until one is left.
    """
    squares = values.double().square().view(-1, 4, 32, 4)
    sums = _sum_in_halves(_sum_in_halves(_sum_in_halves(squares, 1), -1), -1)
    first = segments.tolist()
    norms = []
    for start, end in zip(first[:-1], first[1:], strict=True):
        running = torch.zeros(256, dtype=torch.float64, device=values.device)
        for part in sums[start:end].split(256):
            running[: len(part)] += part
        norms.append(_sum_in_halves(running, 0).sqrt().float())
    return torch.stack(norms) if norms else sums.new_empty(0, dtype=torch.float32)


def _sum_in_halves(terms: Tensor, dim: int) -> Tensor:
    """Sum along an axis of 2^k values."""
    while terms.shape[dim] > 1:
        first, second = terms.chunk(2, dim)
        terms = first + second
    return terms.squeeze(dim)


def _random_words(blocks: Blocks, stream: RandomStream) -> Tensor:
    """(K, 512) random words below 2^32, as int64."""
    groups = torch.arange(BLOCK // 4, device=blocks.table.device)
    first = blocks.table[:, Column.NUMBER, None].long() * (BLOCK // 4) + groups
    update = stream.update.long().view(1, 1)
    counter = (first, update & _LOW, (update >> 32) & _LOW, torch.full_like(update, stream.word))
    return torch.stack(_philox(counter, stream.seed), dim=-1).view(-1, BLOCK)


_LOW = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def _philox(counter: Words, seed: int) -> Words:
    """`shuffle.philox` on int64 tensors of any device; products wrap, their bits are right."""
    c0, c1, c2, c3 = counter
    for turn in range(10):
        k0 = (seed + turn * 0x9E3779B9) & _LOW
        k1 = ((seed >> 32) + turn * 0xBB67AE85) & _LOW
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((product1 >> 32) & _LOW) ^ c1 ^ k0, product1 & _LOW
        c2, c3 = ((product0 >> 32) & _LOW) ^ c3 ^ k1, product0 & _LOW
    return c0, c1, c2, c3
