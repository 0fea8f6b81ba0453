"""A small dataset that lives on the device whole: minibatches are cut out of it by a gather."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Generator, Iterator

import numpy as np
import torch
from torch import Tensor

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.crop import pad_images, random_crop_flip
from freeadv_fast.data.loader import Batch
from freeadv_fast.data.roll import Roll
from freeadv_fast.data.stream import Ints, Share, Stream, shares_of_epochs


@dataclasses.dataclass(frozen=True, eq=False)
class ResidentImages:
    """A split on the device.

    Attributes:
        images: (P, H, W, 3) uint8; row r of the split shows image r modulo P.
        labels: (N,) int64 on the CPU.
        classes: Class names.
    """

    images: Tensor
    labels: Ints
    classes: list[str]

    @property
    def roll(self) -> Roll:
        """What the split holds; a row's number is its image's name.

        Checksums of CIFAR's 50,000 training images take 0.1 s.
        """
        pixels = [zlib.crc32(image) for image in self.images.cpu().numpy()]
        shown = np.arange(len(self.labels)) % len(self.images)
        stamps = np.array(pixels, np.uint32)[shown] ^ self.labels.astype(np.uint32)
        names = [f"image {row}" for row in range(len(self.labels))]
        return Roll(self.classes, names, stamps, "checksum", bad={})


class ResidentLoader:
    """The minibatches of a resident split, see `loader.Loader`."""

    def __init__(self, split: ResidentImages, stream: Stream, config: TrainConfig) -> None:
        """Reads the rows of `stream`.

        Args:
            split: The images.
            stream: Which of them, when. Without a seed: no augmentation.
            config: Gives augmentation, padding and seed.
        """
        self.stream = stream
        self.labels = torch.from_numpy(split.labels)
        self.classes = split.classes
        self.num_images = stream.num_images
        self.num_batches = stream.num_batches
        self.seed = config.seed
        self.crops = stream.seed is not None and config.augment in ("pad-crop-flip", "pad-crop")
        self.flips = config.augment == "pad-crop-flip"
        self.padding = config.crop_padding if self.crops else 0
        self.images = pad_images(split.images, self.padding) if self.crops else split.images

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields the minibatches of `epoch` from position `start` on."""
        return self.epochs(epoch, start, epoch)

    def epochs(self, epoch: int, start: int, last: int) -> Generator[Batch, None, None]:
        """As `epoch`, and then the epochs after it up to `last`."""
        device = self.images.device
        for number, _, share in shares_of_epochs(self.stream, epoch, start, last):
            rows = torch.from_numpy(share.rows.copy())
            labels = self.labels[rows].to(device, non_blocking=True)
            yield Batch(self._pixels(share, number), labels, share.global_size, rows)

    def _pixels(self, share: Share, epoch: int) -> Tensor:
        """The images of a share."""
        slots = share.rows % len(self.images)
        if self.crops:
            return random_crop_flip(
                self.images, slots, share.keys, self.padding, self.seed, epoch, flip=self.flips
            )
        return self.images[torch.from_numpy(slots).to(self.images.device, non_blocking=True)]
