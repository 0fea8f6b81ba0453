"""Random pixels on the device, for benchmarks: a data set that costs nothing to read."""

from __future__ import annotations

from typing import Literal

import torch

from freeadv_fast.data.resident import ResidentImages
from freeadv_fast.data.stream import random_bits
from freeadv_fast.errors import UserError

NUM_IMAGES = {"train": 50_000, "val": 5_000}
# Distinct images; an epoch walks over them again and again.
NUM_DISTINCT = 512
DEFAULT_CLASSES = 1000


def build_synthetic(
    classes: str, image_size: int, split: Literal["train", "val"], device: torch.device
) -> ResidentImages:
    """Draws a split, the same on every rank and in every run.

    Args:
        classes: Number of classes as typed; empty for 1000.
        image_size: Side in pixels.
        split: ``train`` (50,000 rows) or ``val`` (5,000).
        device: Where the images go.

    Raises:
        UserError: `classes` is not a whole number above 1.
    """
    num_classes = int(classes) if classes.isdecimal() else 0 if classes else DEFAULT_CLASSES
    if num_classes < 2:
        raise UserError(f"--data synthetic:{classes}: write synthetic:CLASSES, 2 or more")
    generator = torch.Generator().manual_seed(0 if split == "train" else 1)
    shape = (NUM_DISTINCT, image_size, image_size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    # The label belongs to the picture, so that a network can learn it.
    bits = random_bits(0, 0, torch.arange(NUM_DISTINCT).numpy(), range(1))[:, 0]
    slots = torch.arange(NUM_IMAGES[split]).numpy() % NUM_DISTINCT
    labels = (bits % num_classes).astype("int64")[slots]
    return ResidentImages(images.to(device), labels, [str(k) for k in range(num_classes)])
