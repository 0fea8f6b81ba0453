"""RobustBench's ways from a stored image to a network's square, by their names there."""

from __future__ import annotations

import difflib
from typing import NamedTuple

import numpy as np
from PIL import Image

from freeadv_fast.data.plan import Plan
from freeadv_fast.data.stream import Ints
from freeadv_fast.errors import UserError

BILINEAR = Image.Resampling.BILINEAR


class Preprocessing(NamedTuple):
    """What torchvision's Resize and CenterCrop do to an image before ToTensor.

    Attributes:
        image_size: Side of the result in pixels; None where images stay as they are stored, all of
            one size.
        resize_size: Shorter side after resizing; 0 for none.
        keeps_ratio: Whether the longer side follows the shorter one; else both are `resize_size`.
        resampling: PIL's filter.
    """

    image_size: int | None
    resize_size: int
    keeps_ratio: bool = True
    resampling: Image.Resampling = BILINEAR

    def plan(self, rows: Ints, sizes: Ints, image_size: int) -> Plan:
        """What the decoder does with some images, with torchvision's rounding.

        Args:
            rows: (n,) rows of the file list.
            sizes: (n, 2) height and width of these images in pixels.
            image_size: Side of the output in pixels.
        """
        shorter = sizes.min(axis=1, keepdims=True)
        if not self.resize_size:
            resized = sizes
        elif self.keeps_ratio:
            resized = self.resize_size * sizes // shorter
        else:
            resized = np.full_like(sizes, self.resize_size)
        spare = resized - image_size
        # A side that is too short for the crop is padded with black: less before than behind.
        corners = np.where(spare < 0, -(-spare // 2), np.rint(spare / 2)).astype(np.int64)
        return Plan(
            rows=rows,
            windows=np.concatenate([np.zeros_like(sizes), sizes], axis=1),
            resized=resized,
            corners=corners,
            flips=np.zeros(len(rows), np.bool_),
        )


# robustbench/data.py at 78fcc9e; there `none` is None, what CIFAR's networks get.
PREPROCESSINGS = {
    "Res256Crop224": Preprocessing(224, 256),
    "BicubicRes256Crop224": Preprocessing(224, 256, resampling=Image.Resampling.BICUBIC),
    "Crop288": Preprocessing(288, 0),
    "Res224": Preprocessing(224, 224, keeps_ratio=False),
    "none": Preprocessing(None, 0),
}


def find_preprocessing(name: str) -> Preprocessing:
    """The preprocessing of a name.

    Raises:
        UserError: there is none; the message names the nearest.
    """
    if name in PREPROCESSINGS:
        return PREPROCESSINGS[name]
    lowered = {known.lower(): known for known in PREPROCESSINGS}
    near = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
    hint = f"did you mean {lowered[near[0]]}?" if near else ", ".join(PREPROCESSINGS)
    raise UserError(f"--preprocessing {name}: no such preprocessing; {hint}")
