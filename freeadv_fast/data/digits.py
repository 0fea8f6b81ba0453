"""Scikit-learn's 1,797 real handwritten digits as a JPEG ImageFolder in the user's cache.

The embedded set: no download, and the whole path from JPEG bytes on is the one of ImageNet.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from freeadv_fast.data.cache import embedded_folder
from freeadv_fast.data.split import stratified_rows
from freeadv_fast.errors import UserError

NUM_VAL = 360
IMAGE_SIZE = 32
JPEG_QUALITY = 95
# A new name when the files' content changes.
FOLDER_NAME = "digits-1"


def digits_folder() -> str:
    """The ImageFolder of the digits, written on first use.

    Raises:
        UserError: scikit-learn is not installed, or the cache folder cannot be written.
    """
    return embedded_folder(FOLDER_NAME, "--data digits", _write_digits)


def _write_digits(folder: Path) -> None:
    """Writes train/ (1,437) and val/ (360), stratified, the split fixed for ever."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "--data digits: scikit-learn holds the images (pip install scikit-learn)"
        ) from None
    digits = load_digits()
    labels = digits.target.astype(np.int64)
    is_val = np.isin(np.arange(len(labels)), stratified_rows(labels, NUM_VAL))
    # 17 grey levels, 0..16, on 8 x 8 pixels.
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    for split in ("train", "val"):
        for digit in range(10):
            (folder / split / str(digit)).mkdir(parents=True)
    for row, (grey, label) in enumerate(zip(pixels, labels, strict=True)):
        image = Image.fromarray(grey).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        path = folder / ("val" if is_val[row] else "train") / str(label) / f"{row:04d}.jpg"
        image.convert("RGB").save(path, quality=JPEG_QUALITY, subsampling="4:4:4")
