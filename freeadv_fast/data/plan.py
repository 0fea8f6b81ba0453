"""What happens to each image between its file and the minibatch; both decoders execute it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from freeadv_fast.data.stream import Ints, Share, random_flips, random_resized_windows


class Plan(NamedTuple):
    """Cut a window, resize it, cut a square out of the result, mirror it.

    Attributes:
        rows: (n,) int64 rows of the split's file list.
        windows: (n, 4) int64 top, left, height, width in pixels of the stored image.
        resized: (n, 2) int64 height and width that the window is resized to.
        corners: (n, 2) int64 top and left of the output square in the resized window.
        flips: (n,) bool, mirror left to right.
    """

    rows: Ints
    windows: Ints
    resized: Ints
    corners: Ints
    flips: NDArray[np.bool_]


def plan_random_resized_crop(
    share: Share, sizes: Ints, image_size: int, seed: int, epoch: int
) -> Plan:
    """Training: RandomResizedCrop and RandomHorizontalFlip.

    Args:
        share: n rows of the file list; the random draws hang on their keys.
        sizes: (n, 2) height and width of these images in pixels.
        image_size: Side of the output in pixels.
        seed: The run's seed.
        epoch: Data epoch.
    """
    return Plan(
        rows=share.rows,
        windows=random_resized_windows(seed, epoch, share.keys, sizes),
        resized=np.full_like(sizes, image_size),
        corners=np.zeros_like(sizes),
        flips=random_flips(seed, epoch, share.keys),
    )


def plan_evaluation(rows: Ints, sizes: Ints, image_size: int, resize_size: int) -> Plan:
    """Evaluation: Resize(resize_size) and CenterCrop(image_size) with torchvision's rounding.

    Args:
        rows: (n,) rows of the file list.
        sizes: (n, 2) height and width of these images in pixels.
        image_size: Side of the output in pixels.
        resize_size: Shorter side after resizing, at least image_size; 0 for images as they are
            stored. Those that are then too small for the crop are enlarged to it, where
            torchvision's CenterCrop pads them with black.
    """
    # The longer side is cut, the offset rounded half to even, as torchvision does.
    shorter = sizes.min(axis=1, keepdims=True)
    resized = (resize_size or np.maximum(shorter, image_size)) * sizes // shorter
    return Plan(
        rows=rows,
        windows=np.concatenate([np.zeros_like(sizes), sizes], axis=1),
        resized=resized,
        corners=np.rint((resized - image_size) / 2).astype(np.int64),
        flips=np.zeros(len(rows), np.bool_),
    )
