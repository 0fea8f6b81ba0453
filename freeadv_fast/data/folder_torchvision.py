"""Decoding by PIL in worker processes: what torchvision's ImageFolder does, without DALI."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from freeadv_fast.data.index import ImageIndex
from freeadv_fast.data.pixels import read_rgb
from freeadv_fast.data.plan import Plan
from freeadv_fast.data.preprocessing import BILINEAR
from freeadv_fast.data.stream import Ints
from freeadv_fast.data.verdict import undecodable
from freeadv_fast.data.workers import Pixels, executed
from freeadv_fast.errors import UserError


class TorchvisionDecoder:
    """Executes plans with PIL, one minibatch a worker process at a time."""

    def __init__(
        self,
        index: ImageIndex,
        *,
        image_size: int,
        batch_size: int,
        num_workers: int,
        device: torch.device,
        resampling: Image.Resampling = BILINEAR,
    ) -> None:
        """Decodes the images of `index`.

        Args:
            index: The split.
            image_size: Side of the output in pixels.
            batch_size: Largest number of images in a plan.
            num_workers: Processes that read and decode; 0 for none but this one.
            device: Where the output lives.
            resampling: PIL's filter of every resize.
        """
        self.index = index
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.device = device
        self.resampling = resampling

    def __str__(self) -> str:
        """What the user reads of it."""
        return f"torchvision, {self.num_workers} processes"

    def decode(self, plans: Iterator[Plan]) -> Generator[Tensor, None, None]:
        """Yields one (n, image_size, image_size, 3) uint8 tensor a plan, in order.

        Raises:
            UserError: a file that PIL cannot decode, or a worker's death; the message names it.
        """
        shape = (self.batch_size, self.image_size, self.image_size, 3)
        if self.num_workers:
            minibatches = executed(plans, self._fill, shape, self.num_workers, self.index.path)
        else:
            minibatches = self._executed_here(plans, np.empty(shape, np.uint8))
        with contextlib.closing(minibatches):
            for pixels in minibatches:
                images = torch.from_numpy(pixels)
                # The copy is ours: the next minibatch but one takes the same memory.
                if self.device.type == "cuda":
                    yield images.pin_memory().to(self.device, non_blocking=True)
                else:
                    yield images.clone()

    def _executed_here(
        self, plans: Iterator[Plan], memory: Pixels
    ) -> Generator[Pixels, None, None]:
        """As `workers.executed`, in this process."""
        row = np.zeros(1, np.int64)
        for plan in plans:
            pixels = memory[: len(plan.rows)]
            if error := self._fill(plan, pixels, row):
                raise error
            yield pixels

    def _fill(self, plan: Plan, pixels: Pixels, row: Ints) -> UserError | None:
        """Decodes a plan, in a worker; the error as a value, for it crosses to the trainer."""
        for slot, row[0] in enumerate(plan.rows):
            path = self.index.path(row.item())
            try:
                pixels[slot] = np.asarray(self._square(path, plan, slot))
            except Exception as error:  # whatever it is, it is this file's
                return undecodable(path, error)
        return None

    def _square(self, path: str, plan: Plan, slot: int) -> Image.Image:
        """One image: window, resize, square, mirror."""
        top, left, height, width = plan.windows[slot].tolist()
        y, x = plan.corners[slot].tolist()
        image = read_rgb(path).crop((left, top, left + width, top + height))
        image = image.resize(plan.resized[slot, ::-1].tolist(), self.resampling)
        image = image.crop((x, y, x + self.image_size, y + self.image_size))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if plan.flips[slot] else image
