"""What every kind of data hands to the trainer: uint8 NHWC minibatches on the device."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import NamedTuple, Protocol

from torch import Tensor


class Batch(NamedTuple):
    """One rank's share of a global minibatch.

    Attributes:
        images: (n, H, W, 3) uint8 on the training device, contiguous.
        labels: (n,) int64 on the same device. Of unlabelled images the pseudo labels; ~y, below 0,
            where the method treats them apart (dat with --dat-unlabelled kl). Of images with boxes
            (n, 1 + K, 5) float32, packed `step.objects`.
        global_size: Images of this minibatch over all ranks; losses are sums divided by it.
        indices: (n,) int64 on the CPU: row of each image in the split's file list; ~row, below 0,
            of each in the file of --unlabelled.
    """

    images: Tensor
    labels: Tensor
    global_size: int
    indices: Tensor


class Loader(Protocol):
    """A split of a dataset, as the stream of minibatches that one rank sees.

    The stream is a pure function of (seed, epoch, position): an epoch entered at minibatch k
    yields exactly what an uninterrupted epoch yields from its k-th minibatch on.
    """

    classes: list[str]
    """Class names; a label is an index into this list."""
    num_images: int
    """Images of the split, and unlabelled ones that an epoch reads as well, over all ranks."""
    num_batches: int
    """Minibatches of one epoch, the same on every rank."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields the minibatches of `epoch` from position `start` on.

        Abandoning the iterator early is allowed and frees what it held.
        """
        ...


class TrainingLoader(Loader, Protocol):
    """A loader whose epochs may follow each other without a pause."""

    def epochs(self, epoch: int, start: int, last: int) -> Generator[Batch, None, None]:
        """Yields what `epoch(epoch, start)` does, and then the epochs after it up to `last`.

        Minibatches are made ahead across the ends of epochs. Closing the generator frees them and
        what makes them.
        """
        ...
