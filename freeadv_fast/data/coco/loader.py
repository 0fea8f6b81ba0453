"""A split with boxes as a loader: PIL decodes in worker processes, minibatches have few shapes."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.coco.annotations import Annotations
from freeadv_fast.data.coco.canvas import build_canvases, resized_sizes, smallest_canvases
from freeadv_fast.data.coco.corruption import SMALLEST_SIDE, corrupted, load_corruption
from freeadv_fast.data.loader import Batch
from freeadv_fast.data.pixels import read_rgb
from freeadv_fast.data.prefetch import prefetched
from freeadv_fast.data.stream import Ints, Share, Stream, random_flips, shares_of_epochs
from freeadv_fast.data.verdict import undecodable
from freeadv_fast.data.workers import Pixels, executed
from freeadv_fast.errors import UserError
from freeadv_fast.step.objects import NO_OBJECT, Objects

CHANNELS = 3


class BoxPlan(NamedTuple):
    """Resize images, mirror some, and lay each on the upper left corner of a black canvas.

    Attributes:
        rows: (n,) int64 rows of the split.
        sizes: (n, 2) int64 height and width that the images are resized to.
        flips: (n,) bool, mirror left to right.
        canvas: Height and width of the minibatch's images with their padding.
    """

    rows: Ints
    sizes: Ints
    flips: NDArray[np.bool_]
    canvas: tuple[int, int]


class DetectionLoader:
    """A split with boxes, see `loader.Loader`; `Batch.labels` are packed `step.objects`.

    The resize is PIL's bilinear filter. Enlarging, that is torch's bilinear interpolation to a
    level; reducing, it averages over all pixels, where torchvision's detectors let some go.
    """

    def __init__(
        self,
        annotations: Annotations,
        stream: Stream,
        config: TrainConfig,
        device: torch.device,
        corruption: tuple[str, int] | None = None,
    ) -> None:
        """Reads the rows of `stream`.

        Args:
            annotations: The split.
            stream: Which of its rows, when, in whatever groups. Without a seed: no flips.
            config: Gives sizes, augmentation, seed and workers.
            device: Where the minibatches live.
            corruption: Name and severity of what is done to the stored images; None for nothing.
        """
        self.annotations, self.config, self.device = annotations, config, device
        self.corruption = corruption
        self.sizes = resized_sizes(annotations.sizes, config.image_size, config.longest_side)
        self.canvases = build_canvases(config.image_size, config.longest_side)
        groups = smallest_canvases(self.sizes[stream.rows], self.canvases)
        self.largest_canvas: Ints = self.canvases[np.unique(groups)].max(axis=0)
        self.stream = dataclasses.replace(stream, groups=groups)
        self.flips = stream.seed is not None and config.augment == "flip"
        self.capacity = annotations.capacity
        self.classes = annotations.classes
        self.num_images = self.stream.num_images
        self.num_batches = self.stream.num_batches

    def corrupted(self, corruption: str, severity: int) -> DetectionLoader:
        """The same images, corrupted as they are stored, before the resize.

        Args:
            corruption: A name of the package imagecorruptions. severity: 1..5.

        Raises:
            UserError: the package is missing or does not know the name, or an image is too small.
        """
        load_corruption(corruption)
        self._refuse_small(corruption)
        pair = (corruption, severity)
        return DetectionLoader(self.annotations, self.stream, self.config, self.device, pair)

    def _refuse_small(self, corruption: str) -> None:
        """Raises UserError where one of the images is too small for a corruption."""
        rows = self.stream.rows
        small = rows[self.annotations.sizes[rows].min(axis=1) < SMALLEST_SIDE]
        if len(small):
            height, width = self.annotations.sizes[small[0]]
            raise UserError(
                f"--eval-corruptions {corruption}: {self.annotations.path(small[0])} has {width} x "
                f"{height} pixels, and the corruptions need {SMALLEST_SIDE} a side; leave them out"
            )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields the minibatches of `epoch` from position `start` on, decoded ahead."""
        return self.epochs(epoch, start, epoch)

    def epochs(self, epoch: int, start: int, last: int) -> Generator[Batch, None, None]:
        """As `epoch`, and then the epochs after it up to `last`."""
        return prefetched(self._batches(epoch, start, last), self.device)

    def _batches(self, epoch: int, start: int, last: int) -> Generator[Batch, None, None]:
        """The minibatches on the current stream."""
        dealt: collections.deque[tuple[Share, list[BoxPlan]]] = collections.deque()

        def plans() -> Iterator[BoxPlan]:
            for number, _, share in shares_of_epochs(self.stream, epoch, start, last):
                parts = [self._plan(p, number) for p in share.parts(self.stream.batch_size)]
                dealt.append((share, parts))
                yield from parts

        with contextlib.closing(self._decoded(plans())) as decoded:
            for first in decoded:
                share, parts = dealt.popleft()
                yield Batch(
                    self._joined(parts, itertools.chain([first], decoded)),
                    torch.cat([self._targets(part) for part in parts]).to(self.device),
                    share.global_size,
                    torch.from_numpy(share.rows.copy()),
                )

    def _joined(self, parts: list[BoxPlan], decoded: Iterator[Pixels]) -> Tensor:
        """A share's images on the device: as many parts of what was decoded as it has plans."""
        num_images = sum(len(part.rows) for part in parts)
        images = torch.empty(
            (num_images, *parts[0].canvas, CHANNELS),
            dtype=torch.uint8,
            pin_memory=self.device.type == "cuda",
        )
        rooms = images.split(self.stream.batch_size)
        for part, room in zip(parts, rooms, strict=True):
            room.copy_(torch.from_numpy(_on_canvas(next(decoded), part)))
        return images.to(self.device, non_blocking=True)

    def _plan(self, share: Share, epoch: int) -> BoxPlan:
        """What is done with a share, whose minibatch's canvas holds all of its canvases."""
        flips = np.zeros(len(share.rows), np.bool_)
        if self.flips:
            flips = random_flips(self.config.seed, epoch, share.keys)
        height, width = self.canvases[list(share.groups)].max(axis=0).tolist()
        return BoxPlan(share.rows, self.sizes[share.rows], flips, (height, width))

    def _targets(self, plan: BoxPlan) -> Tensor:
        """The objects of a plan's images where it puts them: packed, (n, 1 + K, 5) float32."""
        boxes = np.zeros((len(plan.rows), self.capacity, 4), np.float32)
        classes = np.full((len(plan.rows), self.capacity), NO_OBJECT)
        for slot, row in enumerate(plan.rows):
            labels, size = self.annotations.labels[row], plan.sizes[slot].astype(np.float32)
            scale = size / self.annotations.sizes[row].astype(np.float32)
            moved = self.annotations.boxes[row] * np.tile(scale[::-1], 2)
            if plan.flips[slot]:
                moved[:, [0, 2]] = size[1] - moved[:, [2, 0]]
            boxes[slot, : len(labels)] = moved
            classes[slot, : len(labels)] = labels
        sizes, *others = map(torch.from_numpy, (plan.sizes, boxes, classes))
        return Objects(sizes, *others).packed()

    def _decoded(self, plans: Iterator[BoxPlan]) -> Generator[Pixels, None, None]:
        """Yields the pixels of each plan, in order; memory that is overwritten after the next.

        Raises:
            UserError: a file that PIL cannot decode, or a worker's death; the message names it.
        """
        num_images = min(self.stream.batch_size, self.num_images)
        shape = (num_images, int(self.largest_canvas.prod()) * CHANNELS)
        if self.config.workers:
            yield from executed(
                plans, self._fill, shape, self.config.workers, self.annotations.path
            )
            return
        memory, row = np.empty(shape, np.uint8), np.zeros(1, np.int64)
        for plan in plans:
            if error := self._fill(plan, memory, row):
                raise error
            yield memory[: len(plan.rows)]

    def _fill(self, plan: BoxPlan, pixels: Pixels, row: Ints) -> UserError | None:
        """Decodes a plan, in a worker; the error as a value, for it crosses to the trainer."""
        room = _on_canvas(pixels, plan)
        for slot, row[0] in enumerate(plan.rows):
            try:
                image = self._image(plan, slot)
            except UserError as error:
                return error
            except Exception as error:  # whatever it is, it is this file's
                return undecodable(self.annotations.path(row.item()), error)
            height, width = plan.sizes[slot]
            room[slot] = 0
            room[slot, :height, :width] = image
        return None

    def _image(self, plan: BoxPlan, slot: int) -> Pixels:
        """One image: decode, corrupt, resize, mirror."""
        row = plan.rows[slot]
        path, size = self.annotations.path(row), tuple(self.annotations.sizes[row, ::-1].tolist())
        image = read_rgb(path)
        if image.size != size:
            raise UserError(
                f"--data: {path} has {image.width} x {image.height} pixels, its annotations are "
                f"for {size[0]} x {size[1]}; get the image that they are for"
            )
        if self.corruption is not None:
            key = int(self.annotations.keys[row])
            image = Image.fromarray(corrupted(np.asarray(image), key, *self.corruption))
        image = image.resize(plan.sizes[slot, ::-1].tolist(), Image.Resampling.BILINEAR)
        if plan.flips[slot]:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image)


def _on_canvas(pixels: Pixels, plan: BoxPlan) -> Pixels:
    """A view of the memory of a plan as (n, H, W, 3)."""
    num_images, (height, width) = len(plan.rows), plan.canvas
    rows = pixels[:num_images, : height * width * CHANNELS]
    return rows.reshape(num_images, height, width, CHANNELS)
