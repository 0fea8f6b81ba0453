"""Decoding by PIL in worker processes: what torchvision's ImageFolder does, without DALI."""

from __future__ import annotations

import gc
import signal
from collections.abc import Generator, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from freeadv_fast.data.index import ImageIndex
from freeadv_fast.data.plan import Plan
from freeadv_fast.data.verdict import undecodable
from freeadv_fast.errors import UserError


class TorchvisionDecoder:
    """Executes plans with PIL, one minibatch a worker process at a time."""

    def __init__(
        self, index: ImageIndex, *, image_size: int, num_workers: int, device: torch.device
    ) -> None:
        """Decodes the images of `index`.

        Args:
            index: The split.
            image_size: Side of the output in pixels.
            num_workers: Processes that read and decode; 0 for none but this one.
            device: Where the output lives.
        """
        self.files = _PlanFiles(index, image_size)
        self.num_workers = num_workers
        self.device = device

    def __str__(self) -> str:
        """What the user reads of it."""
        return f"torchvision, {self.num_workers} processes"

    def decode(self, plans: Iterator[Plan]) -> Generator[Tensor, None, None]:
        """Yields one (n, image_size, image_size, 3) uint8 tensor a plan, in order.

        Raises:
            UserError: a file that PIL cannot decode; the message names it.
        """
        loader: DataLoader[Tensor | UserError] = DataLoader(
            self.files,
            sampler=_Once(plans),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_obey_parent,
            generator=torch.Generator(),  # else the loader draws from the global one
        )
        # A forked worker has its parent's garbage and none of its threads: it would wait for them
        # for ever if it collected a DALI pipeline. What is frozen at the fork it does not collect.
        gc.freeze()
        try:
            decoded = iter(loader)
        finally:
            gc.unfreeze()
        for images in decoded:
            if isinstance(images, UserError):
                raise images
            yield images.to(self.device, non_blocking=True)


class _PlanFiles(Dataset["Tensor | UserError"]):
    """The split as a dataset whose keys are plans; workers hold a copy."""

    def __init__(self, index: ImageIndex, image_size: int) -> None:
        """Keeps what a worker needs."""
        self.index = index
        self.image_size = image_size

    def __getitem__(self, plan: Plan) -> Tensor | UserError:
        """The decoded plan, or the error as a value: raised in a worker it would lose its line."""
        images = np.empty((len(plan.rows), self.image_size, self.image_size, 3), np.uint8)
        for slot, row in enumerate(plan.rows):
            path = self.index.path(row)
            try:
                images[slot] = np.asarray(self._square(path, plan, slot))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                return undecodable(path, error)
        return torch.from_numpy(images)

    def _square(self, path: str, plan: Plan, slot: int) -> Image.Image:
        """One image: window, resize, square, mirror."""
        top, left, height, width = plan.windows[slot].tolist()
        y, x = plan.corners[slot].tolist()
        with Image.open(path) as file:
            image = file.convert("RGB").crop((left, top, left + width, top + height))
        image = image.resize(plan.resized[slot, ::-1].tolist(), Image.Resampling.BILINEAR)
        image = image.crop((x, y, x + self.image_size, y + self.image_size))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if plan.flips[slot] else image


class _Once:
    """An iterator in the dress of a sampler."""

    def __init__(self, plans: Iterator[Plan]) -> None:
        """Wraps `plans`."""
        self.plans = plans

    def __iter__(self) -> Iterator[Plan]:
        """The plans, once."""
        return self.plans


def _obey_parent(worker: int) -> None:
    """In a worker: Ctrl-C is the parent's business, and SIGTERM ends at once.

    Workers are forked and would otherwise run the trainer's own signal handlers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
