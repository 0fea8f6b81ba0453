"""From a file to RGB pixels by PIL, for everything that is not decoded by DALI."""

from __future__ import annotations

import numpy as np
from PIL import Image


def read_rgb(path: str) -> Image.Image:
    """The image as RGB: what DALI makes of the same file, to a level.

    Grey is repeated; a palette is looked up; alpha and transparent colours are let go, whatever
    lies under them; CMYK becomes (255 - C)(255 - K) / 255 without a colour profile; EXIF
    orientation is not obeyed.

    Args:
        path: A file that `headers.inspect_image` admits.

    Raises:
        Exception: whatever PIL raises at a damaged file.
    """
    with Image.open(path) as image:
        image.info.pop("transparency", None)  # else PIL warns that it lets a palette's alpha go
        # PIL cuts levels of 16-bit grey off at 255: almost everything would be white.
        grey = _eight_bits(image) if image.mode.startswith("I") else image
        return grey.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit grey image with 65,535 as 255, rounded to the nearest level, as DALI does."""
    levels = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))
