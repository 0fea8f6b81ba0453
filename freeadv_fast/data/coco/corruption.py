"""One image under one of ImageNet-C's corruptions, as COCO-C makes them (Michaelis et al. 2019).

The functions are those of the package imagecorruptions, in the build that runs with today's numpy,
imagecorruptions-imaug. They draw from numpy's global generator, which is put back here.
"""

from __future__ import annotations

import functools
import zlib
from typing import Any

import numpy as np

from freeadv_fast.data.workers import Pixels
from freeadv_fast.errors import UserError

# The package refuses smaller ones.
SMALLEST_SIDE = 32
# These take a seed of their own: they draw from other generators.
SEEDED = ("impulse_noise", "glass_blur")


def corrupted(pixels: Pixels, key: int, corruption: str, severity: int) -> Pixels:
    """An image (H, W, 3) of bytes, corrupted: a pure function of its arguments.

    Args:
        pixels: As stored, 32 a side at least. key: 64 bits that stand for the image.
        corruption: The package's name of it. severity: 1..5.

    Raises:
        UserError: the package is missing.
    """
    seed = (key % 2**32, key >> 32, zlib.crc32(corruption.encode()), severity)
    extra = {"seed": zlib.crc32(repr(seed).encode())} if corruption in SEEDED else {}
    state = np.random.get_state()  # noqa: NPY002 (the package draws from it)
    try:
        np.random.seed(seed)  # noqa: NPY002
        made: Pixels = _package().corrupt(
            pixels, corruption_name=corruption, severity=severity, **extra
        )
    finally:
        np.random.set_state(state)  # noqa: NPY002
    return made


@functools.cache
def load_corruption(corruption: str) -> None:
    """Imports and compiles what a corruption needs, so that processes forked from here have it.

    Raises:
        UserError: the package is missing or does not know the corruption.
    """
    known = _package().get_corruption_names("all")
    if corruption not in known:
        raise UserError(
            f"--eval-corruptions {corruption}: unknown; use all, or some of {', '.join(known)}"
        )
    corrupted(np.zeros((2 * SMALLEST_SIDE, 2 * SMALLEST_SIDE, 3), np.uint8), 0, corruption, 1)


@functools.cache
def _package() -> Any:
    """The package; one thread an image, for processes share the cores."""
    try:
        import cv2
        import imagecorruptions
    except ImportError as error:
        if "libGL" in str(error):
            raise UserError(
                "--eval-corruptions: OpenCV finds no libGL on this machine; pip install "
                "opencv-python-headless, which needs none"
            ) from None
        raise UserError(
            "--eval-corruptions: the package that makes them is missing (pip install "
            "imagecorruptions-imaug; not imagecorruptions, which has the same name inside)"
        ) from None
    cv2.setNumThreads(0)  # also, a pool of threads would not outlive a fork
    return imagecorruptions
