"""The order of a dataset and the random draws of each image, as pure functions of position.

Nothing here has a state: a counter-based generator (SplitMix64) hashes (seed, epoch, key, draw
number), so that a run resumed in the middle of an epoch, or read by another backend, sees the same
images under the same crops. An image's key is drawn from its name (`names.keys_of`): a file that
is removed changes neither the crops of the others nor their order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from freeadv_fast.errors import UserError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
# 64 bits that stand for an image in every draw, whatever its row.
Keys = NDArray[np.uint64]

# Draw numbers. One draw each for the order and the flip, two for a window's corner, and then the
# tries of RandomResizedCrop with two draws each.
ORDER_DRAW = 0
FLIP_DRAW = 1
CORNER_DRAWS = range(2, 4)
NUM_TRIES = 10
TRY_DRAWS = range(4, 4 + 2 * NUM_TRIES)

# RandomResizedCrop's defaults in torchvision: share of the area, width over height.
AREA_RANGE = (0.08, 1.0)
ASPECT_RANGE = (3 / 4, 4 / 3)

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014), elementwise."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def random_bits(seed: int, epoch: int, keys: Keys | Ints, draws: range) -> NDArray[np.uint64]:
    """Hashes (seed, epoch, key, draw number): 64 random bits for each image and draw.

    Args:
        seed: The run's seed, >= 0.
        epoch: Data epoch, >= 0.
        keys: (n,) keys of images; their rows where a row's number is its image's name.
        draws: d draw numbers.

    Returns:
        (n, d) uint64.
    """
    state = _mix(np.array([seed % 2**64], np.uint64) + _GAMMA)
    for counter in (np.array([epoch]), keys):
        state = _mix(state + _GAMMA * (counter.astype(np.uint64) + np.uint64(1)))
    offsets = _GAMMA * (np.array(draws, np.uint64) + np.uint64(1))
    return _mix(state[:, None] + offsets)


def random_uniform(seed: int, epoch: int, keys: Keys | Ints, draws: range) -> Floats:
    """As `random_bits`, as (n, d) float64 in [0, 1) with 53 random bits."""
    bits = random_bits(seed, epoch, keys, draws) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def random_flips(seed: int, epoch: int, keys: Keys | Ints) -> NDArray[np.bool_]:
    """Whether each image is mirrored left to right: (n,) bool, probability one half."""
    return random_uniform(seed, epoch, keys, range(FLIP_DRAW, FLIP_DRAW + 1))[:, 0] < 0.5


def random_offsets(seed: int, epoch: int, keys: Keys | Ints, num_offsets: int) -> Ints:
    """The (top, left) corner of each image's pad-and-crop window: (n, 2) in 0..num_offsets-1."""
    uniform = random_uniform(seed, epoch, keys, CORNER_DRAWS)
    return (uniform * num_offsets).astype(np.int64)


def random_resized_windows(seed: int, epoch: int, keys: Keys | Ints, sizes: Ints) -> Ints:
    """Windows with the distribution of torchvision's RandomResizedCrop.

    Args:
        seed: The run's seed.
        epoch: Data epoch.
        keys: (n,) keys of images.
        sizes: (n, 2) height and width of each image in pixels.

    Returns:
        (n, 4) top, left, height, width in pixels of the image.
    """
    height, width = sizes[:, :1], sizes[:, 1:]
    draws = random_uniform(seed, epoch, keys, TRY_DRAWS)
    area = height * width * (AREA_RANGE[0] + np.diff(AREA_RANGE) * draws[:, :NUM_TRIES])
    low, high = np.log(ASPECT_RANGE)
    aspect = np.exp(low + (high - low) * draws[:, NUM_TRIES:])
    try_w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    try_h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (0 < try_w) & (try_w <= width) & (0 < try_h) & (try_h <= height)
    first = fits.argmax(axis=1)[:, None]
    window = np.concatenate(
        [np.take_along_axis(try_h, first, 1), np.take_along_axis(try_w, first, 1)], axis=1
    )
    corner = random_uniform(seed, epoch, keys, CORNER_DRAWS) * (sizes - window + 1)
    fallback = _central_windows(sizes)
    found = fits.any(axis=1)[:, None]
    return np.concatenate(
        [
            np.where(found, corner.astype(np.int64), (sizes - fallback) // 2),
            np.where(found, window, fallback),
        ],
        axis=1,
    )


def _central_windows(sizes: Ints) -> Ints:
    """Largest (height, width), (n, 2), with an allowed aspect: what ten failed tries end in."""
    height, width = sizes[:, 0], sizes[:, 1]
    tallest = np.rint(width / ASPECT_RANGE[0]).astype(np.int64)
    widest = np.rint(height * ASPECT_RANGE[1]).astype(np.int64)
    return np.stack([np.minimum(height, tallest), np.minimum(width, widest)], axis=1)


class Share(NamedTuple):
    """One rank's rows of a global minibatch.

    Attributes:
        rows: (n,) int64 rows of the split's file list.
        keys: (n,) their keys.
        global_size: Images of the minibatch over all ranks.
        groups: Those of its images on all ranks, each once; none where images have no groups.
    """

    rows: Ints
    keys: Keys
    global_size: int
    groups: tuple[int, ...] = ()

    def parts(self, size: int) -> Iterator[Share]:
        """Its rows in consecutive parts of `size`, the last one smaller."""
        for start in range(0, len(self.rows), size):
            part = slice(start, start + size)
            yield Share(self.rows[part], self.keys[part], self.global_size, self.groups)


@dataclasses.dataclass(frozen=True)
class Stream:
    """Which images a rank sees, and when.

    Global minibatch t holds rows [t A B W, (t + 1) A B W) of the epoch's order, and rank r takes
    rows r, r + W, r + 2W, ... of it, those that it sums one gradient over. A training epoch leaves
    out a last global minibatch of fewer than `smallest` images a rank: batch norm cannot train on
    one, and some methods on no fewer than a whole minibatch.

    Where images have groups, such as shapes, a global minibatch is of one group: the epoch's order
    is walked, and each minibatch comes when its last image has come. What is left over of the
    groups, group after group, comes before them in whole minibatches, which may hold neighbours and
    be the largest of all: where memory is short for one, that shows in the first update. The rest
    of it comes last; no image twice, none left out.

    Attributes:
        rows: (N,) int64 rows of the split's file list that this stream walks.
        batch_size: B, images that a rank decodes, and takes through the network, at once.
        rank: r, this process.
        world_size: W, processes.
        seed: Seed of the order; None for evaluation: fixed order, nothing left out.
        smallest: Fewest images of a rank's last minibatch in training.
        names: (N,) keys of the images, aligned with `rows`; None where a row's number is its name.
        accumulate: A, how many times as many a rank's share of a global minibatch has.
        num_unlabelled: U, of these A B images: not of `rows`, but of --unlabelled.
        groups: (N,) int64, aligned with `rows`; None where all images go together.
    """

    rows: Ints
    batch_size: int
    rank: int
    world_size: int
    seed: int | None = None
    smallest: int = 2
    names: Keys | None = None
    accumulate: int = 1
    num_unlabelled: int = 0
    groups: Ints | None = None

    def __post_init__(self) -> None:
        """Raises UserError where a training minibatch is larger than a rank's share."""
        share = len(self.rows) // self.world_size
        if self.seed is not None and self.share_size > share:
            times = f" --accumulate {self.accumulate}" if self.accumulate > 1 else ""
            ranks = f" over {self.world_size} ranks" if self.world_size > 1 else ""
            raise UserError(
                f"--batch-size {self.batch_size}{times}: larger than a rank's share of the "
                f"training images, {share} ({len(self.rows)} images{ranks})"
            )

    @property
    def share_size(self) -> int:
        """Images of `rows` in a rank's share of a whole minibatch."""
        return self.accumulate * self.batch_size - self.num_unlabelled

    @property
    def num_images(self) -> int:
        """Images of the stream over all ranks."""
        return len(self.rows)

    @property
    def num_batches(self) -> int:
        """Global minibatches of one epoch, the same on every rank."""
        full, rest = divmod(len(self.rows), self.share_size * self.world_size)
        fewest = 1 if self.seed is None else self.smallest * self.world_size
        return full + (rest >= fewest)

    @property
    def keys(self) -> Keys:
        """(N,) what stands for each of `rows` in its draws."""
        return self.rows.astype(np.uint64) if self.names is None else self.names

    def order(self, epoch: int) -> Ints:
        """All rows in the order of `epoch`: (N,) int64, a permutation drawn from the seed."""
        return self.rows[self._places(epoch)]

    def _places(self, epoch: int) -> Ints:
        """The order of `epoch` as places in `rows`."""
        order = np.arange(len(self.rows))
        if self.seed is not None:
            draws = random_bits(self.seed, epoch, self.keys, range(ORDER_DRAW, ORDER_DRAW + 1))
            order = np.argsort(draws[:, 0], kind="stable")
        return order if self.groups is None else self._grouped(order, self.groups[order])

    def _grouped(self, order: Ints, groups: Ints) -> Ints:
        """An order in which whole global minibatches are of one group.

        Args:
            order: (N,) places in `rows`. groups: (N,) of each place.
        """
        global_batch = self.share_size * self.world_size
        whole, rest = [], []
        for group in np.unique(groups):
            turns = np.flatnonzero(groups == group)
            cut = len(turns) - len(turns) % global_batch
            whole.append(turns[:cut].reshape(-1, global_batch))
            rest.append(turns[cut:])
        minibatches = np.concatenate(whole)
        minibatches = minibatches[np.argsort(minibatches[:, -1])]
        left = np.concatenate(rest)
        cut = len(left) - len(left) % global_batch
        turns = np.concatenate([left[:cut], minibatches.ravel(), left[cut:]])
        grouped: Ints = order[turns]
        return grouped

    def shares(self, epoch: int, start: int = 0) -> Iterator[Share]:
        """Yields this rank's shares of `epoch` from global minibatch `start` on.

        In an evaluation's last minibatch a rank may have no image; it then yields one share less.
        """
        order, keys = self._places(epoch), self.keys
        global_batch = self.share_size * self.world_size
        for number in range(start, self.num_batches):
            places = order[number * global_batch : (number + 1) * global_batch]
            mine = places[self.rank :: self.world_size]
            groups = () if self.groups is None else np.unique(self.groups[places]).tolist()
            if len(mine) > 0:
                yield Share(self.rows[mine], keys[mine], len(places), tuple(groups))


class HasShares(Protocol):
    """Deals the minibatches of an epoch."""

    def shares(self, epoch: int, start: int = 0) -> Iterator[Share]:
        """Yields this rank's share of each minibatch of `epoch` from position `start` on."""
        ...


def shares_of_epochs(
    stream: HasShares, epoch: int, start: int, last: int
) -> Iterator[tuple[int, int, Share]]:
    """Yields the shares of `epoch` from `start` on, then those of the epochs up to `last`.

    Each with its epoch and its position in it.
    """
    for number in range(epoch, last + 1):
        for position, share in enumerate(stream.shares(number, start), start):
            yield number, position, share
        start = 0
