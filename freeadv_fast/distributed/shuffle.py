"""Moves adversarial images between ranks, so that they meet other images' batch statistics.

Rank r of W holds n_r rows (images and labels). One exchange is

    message[place(i)] = row[i]        local permutation, "before"
    all-to-all                        consecutive rows of the message to rank 0, 1, ...
    row[place(j)] = received[j]       local permutation, "after"

and every rank ends with as many rows as it began with. All of it is a pure function of (seed,
step, counts), known to every rank without a word:

- place(i) is the position of (key(i), i) among all of the rank's, where key(i) is the first 64
  bits of Philox4x32-10 with counter (i, step mod 2^32, step div 2^32, 2 * rank + side) and key
  (seed mod 2^32, seed div 2^32); side is 0 before and 1 after.
- With m = min(counts), rank r sends rank s  m // W + [(s - r) mod W < m mod W] rows, and keeps the
  n_r - m that it has beyond m. Row and column sums are m each, so any counts work; with equal
  counts that W divides, all blocks are equal.

Images and their labels are one message: a row is the image's bytes, then the label's 8. What
leaves a rank is at most (W-1)/W of its images and labels (gathering everything, as MoCo does,
moves W times as much, and in float32). The targets of a detector, many numbers an image, take the
label's place.

This file is the specification, and runs where `freeadv_fast._C` was not built; csrc/ does the same
in C++ and CUDA, bit for bit, for images with labels. `exchange` picks.

Sources: He et al., "Momentum Contrast", 2020, section 3.3 (shuffling BN); Mei et al., "Fast
AdvProp", 2022, section 4.2. Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import enum
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from freeadv_fast import ops
from freeadv_fast.distributed.heartbeat import PeerLost


class Side(enum.IntEnum):
    """The two local permutations of an exchange."""

    BEFORE = 0
    AFTER = 1


Rows = tuple[Tensor, Tensor]

DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)

# After so long a silence a peer is gone: the ranks come from the same point of their loops, and a
# step takes seconds at most.
PEER_PATIENCE = datetime.timedelta(minutes=5)

# Buffers of exchanges that failed. Gloo's thread must not be the last to let go of a tensor that
# Python knows: it would wait for Python's lock, and if the process leaves meanwhile, abort it.
_ABANDONED: list[Tensor] = []


@dataclasses.dataclass(frozen=True)
class Route:
    """Where the rows of one exchange go, seen from one rank.

    Attributes:
        rank: This rank.
        counts: Rows of every rank; the same on all of them.
        seed: 0..2^63-1, the same on all ranks.
        step: 0..2^63-1, likewise; another step is another permutation.
        is_inverse: Whether the rows travel back: undoes the exchange of the same seed and step.

    Raises:
        ValueError: a number is out of its range.
    """

    rank: int
    counts: tuple[int, ...]
    seed: int
    step: int
    is_inverse: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rank < len(self.counts):
            raise ValueError(f"rank {self.rank}: not one of {len(self.counts)} ranks")
        if not all(0 <= count < 2**32 for count in self.counts):
            raise ValueError(f"counts {self.counts}: expected every rank's number of rows")
        for name, value in (("seed", self.seed), ("step", self.step)):
            if not 0 <= value < 2**63:
                raise ValueError(f"{name} {value}: expected a whole number from 0 to 2^63-1")

    @property
    def send(self) -> list[int]:
        """Rows that this rank sends to each."""
        return self._rows_from_each() if self.is_inverse else self._rows_to_each()

    @property
    def receive(self) -> list[int]:
        """Rows that this rank receives from each."""
        return self._rows_to_each() if self.is_inverse else self._rows_from_each()

    def _rows_to_each(self) -> list[int]:
        return [rows_sent(self.counts, self.rank, peer) for peer in range(len(self.counts))]

    def _rows_from_each(self) -> list[int]:
        return [rows_sent(self.counts, peer, self.rank) for peer in range(len(self.counts))]

    @property
    def num_leaving(self) -> int:
        """Rows that this rank sends to others. Either none of the ranks sends any, or all do."""
        return sum(self.send) - self.send[self.rank]

    def places(self, side: Side) -> NDArray[np.int64]:
        """`places` of this rank's rows."""
        count = self.counts[self.rank]
        return places(count, seed=self.seed, step=self.step, rank=self.rank, side=side)

    def order(self) -> Tensor:
        """Both local permutations, for `exchange_in_order`: (2, n) int64 sources on the CPU."""
        first, last = (Side.AFTER, Side.BEFORE) if self.is_inverse else (Side.BEFORE, Side.AFTER)
        return torch.stack([_sources(self, first), _sources(self, last)])

    def inverted(self) -> Route:
        """The way back."""
        return dataclasses.replace(self, is_inverse=not self.is_inverse)


def philox(counters: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Philox4x32-10.

    Args:
        counters: (n, 4), each below 2^32.
        seed: The 64-bit key, its low half first.

    Returns:
        (n, 4) random numbers below 2^32.
    """
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    c0, c1, c2, c3 = counters.T
    for turn in range(10):
        k0 = np.uint64((seed + turn * 0x9E3779B9) & 0xFFFFFFFF)
        k1 = np.uint64(((seed >> 32) + turn * 0xBB67AE85) & 0xFFFFFFFF)
        product0 = np.uint64(0xD2511F53) * c0
        product1 = np.uint64(0xCD9E8D57) * c2
        c0, c1 = (product1 >> half) ^ c1 ^ k0, product1 & low
        c2, c3 = (product0 >> half) ^ c3 ^ k1, product0 & low
    return np.stack([c0, c1, c2, c3], axis=1)


def places(count: int, *, seed: int, step: int, rank: int, side: Side) -> NDArray[np.int64]:
    """A rank's local permutation: row i goes to place [i].

    Args:
        count: Rows of the rank.
        seed: Of the run.
        step: Of the exchange.
        rank: Whose rows.
        side: Before or after the rows travel.

    Returns:
        (count,) a permutation of 0..count-1.
    """
    counters = np.zeros((count, 4), np.uint64)
    counters[:, 0] = np.arange(count)
    counters[:, 1:] = (step & 0xFFFFFFFF, step >> 32, 2 * rank + side)
    numbers = philox(counters, seed)
    keys = numbers[:, 0] | numbers[:, 1] << np.uint64(32)
    found = np.empty(count, np.int64)
    found[np.argsort(keys, kind="stable")] = np.arange(count)
    return found


def rows_sent(counts: Sequence[int], sender: int, receiver: int) -> int:
    """How many rows one rank sends to another, or keeps.

    Args:
        counts: Rows of every rank.
        sender: A rank.
        receiver: A rank.
    """
    size, least = len(counts), min(counts)
    share = least // size + ((receiver - sender) % size < least % size)
    return share + (counts[sender] - least if sender == receiver else 0)


def global_permutation(counts: Sequence[int], *, seed: int, step: int) -> NDArray[np.int64]:
    """Where every row of an exchange comes from, all ranks' rows laid end to end.

    Args:
        counts: Rows of every rank.
        seed: Of the run.
        step: Of the exchange.

    Returns:
        (sum(counts),) sources: row g after the exchange is row sources[g] before it.
    """
    routes = [Route(rank, tuple(counts), seed, step) for rank in range(len(counts))]
    starts = np.cumsum([0, *counts])
    messages = []  # each rank's sources, split by receiver
    for route in routes:
        message = starts[route.rank] + np.argsort(route.places(Side.BEFORE))
        messages.append(np.split(message, np.cumsum(route.send)[:-1]))
    arrived = []
    for route in routes:
        received = np.concatenate([message[route.rank] for message in messages])
        arrived.append(received[np.argsort(route.places(Side.AFTER))])
    return np.concatenate(arrived)


Start = Callable[
    [Tensor, Tensor, Route, dist.ProcessGroup | None, datetime.timedelta], Callable[[], Rows]
]


@dataclasses.dataclass(frozen=True)
class Transport:
    """What carries the rows of an exchange.

    Attributes:
        start: `start_eagerly`, or the compiled op behind the same signature.
        group: The ranks; may be None where nothing leaves any of them.
        timeout: How long to wait for the others.
    """

    start: Start
    group: dist.ProcessGroup | None
    timeout: datetime.timedelta


class Exchange:
    """Images and labels on their way; made by `World.shuffle` and `World.unshuffle`.

    Attributes:
        bytes_sent: Bytes of images and labels that leave this rank.
    """

    def __init__(self, images: Tensor, labels: Tensor, route: Route, transport: Transport) -> None:
        _check(images, labels, route, transport.group)
        self._images = images
        self._route = route
        self._transport = transport
        self._rows: Rows | None = None
        self.bytes_sent = route.num_leaving * sum(map(row_bytes, (images, labels)))
        with self._naming_a_lost_peer():
            self._arrive = transport.start(
                images.detach(), labels, route, transport.group, transport.timeout
            )

    def wait(self) -> Rows:
        """The rows that arrived.

        On a GPU the current stream waits for them, the host does not; over gloo the host waits.

        Returns:
            Images and labels with the shapes, dtypes and device of those that were handed in. If
            those images require a gradient, so do these: their backward is the way back, on which
            all ranks must meet again.

        Raises:
            PeerLost: a rank died, or sent nothing for the time-out; only over gloo. NCCL's own
                watchdog ends the process when the group's time-out has passed.
        """
        if self._rows is None:
            if self._images.requires_grad:
                self._rows = _Arrival.apply(self._images, self)  # type: ignore[no-untyped-call]
            else:
                self._rows = self._receive()
        return self._rows

    def _receive(self) -> Rows:
        with self._naming_a_lost_peer():
            return self._arrive()

    @contextlib.contextmanager
    def _naming_a_lost_peer(self) -> Iterator[None]:
        """Turns a failure of the process group into one line that says who waited, and where."""
        try:
            yield
        except dist.DistBackendError as error:
            reason = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0])
            patience = self._transport.timeout.total_seconds()
            raise PeerLost(
                f"rank {self._route.rank}, step {self._route.step}: a peer's adversarial images "
                f"did not arrive within {patience:g} s ({reason}); the rank that does not say so "
                "died or hangs; restart all ranks with --resume"
            ) from error


class _Arrival(torch.autograd.Function):
    """Where rows arrive with a gradient: it travels back to where they came from."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, exchange: Exchange) -> Rows:
        """Waits for the rows; `images` only ties them to their origin."""
        arrived, labels = exchange._receive()
        ctx.save_for_backward(labels)
        ctx.back = (exchange._route.inverted(), exchange._transport)
        ctx.mark_non_differentiable(labels)
        return arrived, labels

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor, None]:
        """The inverse exchange, itself differentiable."""
        (labels,) = ctx.saved_tensors
        return Exchange(gradient.contiguous(), labels, *ctx.back).wait()[0], None


def exchange(
    images: Tensor,
    labels: Tensor,
    route: Route,
    group: dist.ProcessGroup | None,
    timeout: datetime.timedelta,
) -> Exchange:
    """Sends images and their labels to other ranks in random order; returns at once.

    `World.shuffle` is its public face.

    Args:
        images: (n, ...) uint8, float16, bfloat16, float32 or float64, contiguous.
        labels: (n,) int64, or targets (n, ...) float32; on the same device.
        route: Where the rows go; n is its count of this rank.
        group: The ranks that take part; may be None where nothing leaves any of them.
        timeout: How long to wait for the others, over gloo.

    Returns:
        The exchange under way. On a GPU it runs on a stream of its own.

    Raises:
        ValueError: shapes, dtypes, layouts or counts disagree.
        PeerLost: the process group has already failed.
    """
    is_compiled = ops.exchange_backend(images.device.type) == "compiled"
    start = start_compiled if is_compiled and has_labels(labels) else start_eagerly
    return Exchange(images, labels, route, Transport(start, group, timeout))


def exchange_in_order(
    images: Tensor, labels: Tensor, route: Route, order: Tensor, group: dist.ProcessGroup | None
) -> Exchange:
    """The exchange of `order` in place of the one of the route's seed and step.

    For CUDA graphs, over NCCL: a recording repeats the numbers that it was made with, and reads
    tensors anew. How many rows travel where is the same in every step.

    Args:
        images: (n, ...) as `exchange` takes them.
        labels: Likewise.
        route: Where the rows go, of any seed and step.
        order: (2, n) int64 of `Route.order`, on the images' device.
        group: The ranks that take part; may be None where nothing leaves any of them.
    """
    start = functools.partial(start_eagerly, order=order)
    return Exchange(images, labels, route, Transport(start, group, PEER_PATIENCE))


def start_compiled(
    images: Tensor,
    labels: Tensor,
    route: Route,
    group: dist.ProcessGroup | None,
    timeout: datetime.timedelta,
) -> Callable[[], Rows]:
    """`start_eagerly` in C++; without a message on any rank, no group is named."""
    return ops.start_exchange(
        images,
        labels,
        group if route.num_leaving else None,
        send=route.send,
        receive=route.receive,
        rank=route.rank,
        seed=route.seed,
        step=route.step,
        is_inverse=route.is_inverse,
        timeout=timeout,
    )


def start_eagerly(
    images: Tensor,
    labels: Tensor,
    route: Route,
    group: dist.ProcessGroup | None,
    timeout: datetime.timedelta,
    order: Tensor | None = None,
) -> Callable[[], Rows]:
    """The exchange in plain PyTorch: for targets, and where `freeadv_fast._C` was not built.

    Args:
        images: (n, ...) contiguous.
        labels: (n,) int64 or (n, ...) float32, contiguous.
        route: Where the rows go.
        group: The ranks; may be None where nothing leaves any of them.
        timeout: How long to wait for the others.
        order: (2, n) int64 of `Route.order` in place of the route's own.

    Returns:
        A function that waits for the rows that arrive and returns them.
    """
    if order is None:
        order = route.order().to(images.device, non_blocking=True)
    parts = [part.view(len(part), math.prod(part.shape[1:])) for part in (images, labels)]
    message = torch.cat([part.view(torch.uint8) for part in parts], dim=1)[order[0]]
    received, work = message, None
    if group is not None and route.num_leaving:
        received = torch.empty_like(message)
        options = dist.AllToAllOptions()
        options.timeout = timeout
        work = group.alltoall_base(received, message, route.receive, route.send, options)

    def arrive() -> Rows:
        if work is not None:
            try:
                _await(work, group, timeout)
            except dist.DistBackendError:
                _ABANDONED.extend((message, received))
                raise
        rows = received[order[1]].split([row_bytes(images), row_bytes(labels)], dim=1)
        # Copies, for in the message a row's values need not be aligned to their type.
        pixels, numbers = (part.clone(memory_format=torch.contiguous_format) for part in rows)
        return pixels.view(images.dtype).view_as(images), numbers.view(labels.dtype).view_as(labels)

    return arrive


def has_labels(labels: Tensor) -> bool:
    """Whether it is a classifier's (n,) int64, and not a detector's targets."""
    return labels.ndim == 1 and labels.dtype is torch.int64


def row_bytes(rows: Tensor) -> int:
    """Bytes of an image, of a label or of an image's targets."""
    return math.prod(rows.shape[1:]) * rows.element_size()


def _sources(route: Route, side: Side) -> Tensor:
    """Row i of the permuted rows is row [i] of those before."""
    places = route.places(side)
    return torch.from_numpy(places if route.is_inverse else np.argsort(places))


def _await(work: dist.Work, group: dist.ProcessGroup | None, timeout: datetime.timedelta) -> None:
    """Waits for a message: with NCCL the current stream does, with gloo the host.

    Raises:
        DistBackendError: a peer is gone.
    """
    if dist.get_backend(group) == "nccl":
        work.wait()  # given a time-out, it would block the host
        return
    try:
        work.wait(timeout)
    except RuntimeError as error:
        raise dist.DistBackendError(str(error)) from error


def _check(images: Tensor, labels: Tensor, route: Route, group: dist.ProcessGroup | None) -> None:
    """Refuses rows that the exchange is not defined for.

    Raises:
        ValueError: shows what disagrees.
    """
    if images.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(
            f"images: expected (N, ...) of {names}, got {images.dtype} {tuple(images.shape)}"
        )
    if not images.is_contiguous():
        raise ValueError(
            f"images: expected contiguous rows, got {tuple(images.shape)} with strides "
            f"{images.stride()}; channels_last images are exchanged as NHWC, or copied"
        )
    are_targets = labels.ndim > 1 and labels.dtype is torch.float32
    if labels.shape[:1] != images.shape[:1] or not (has_labels(labels) or are_targets):
        raise ValueError(
            f"labels: expected int64 ({len(images)},) or float32 ({len(images)}, ...) for images "
            f"{tuple(images.shape)}, got {labels.dtype} {tuple(labels.shape)}"
        )
    if not labels.is_contiguous() or labels.device != images.device:
        raise ValueError(f"labels: expected contiguous on {images.device}, got {labels.device} "
                         f"with stride {labels.stride()}")  # fmt: skip
    if route.counts[route.rank] != len(images):
        raise ValueError(f"counts {list(route.counts)}: rank {route.rank} has {len(images)} rows")
    if route.num_leaving and group is None:
        raise ValueError(f"{len(route.counts)} ranks exchange rows over a process group; got none")
