"""SVHN's cropped digits from the official MATLAB files, whole on the device.

Reading Digits in Natural Images with Unsupervised Feature Learning, Netzer et al. 2011.
"""

from __future__ import annotations

import os
from typing import Literal

import numpy as np
import torch

from freeadv_fast.data.resident import ResidentImages
from freeadv_fast.errors import UserError

FILES = {"train": "train_32x32.mat", "val": "test_32x32.mat"}


def load_svhn(folder: str, split: Literal["train", "val"], device: torch.device) -> ResidentImages:
    """Reads a split to the device.

    Args:
        folder: The folder of the official files.
        split: ``train`` (73,257 images) or ``val`` (26,032).
        device: Where the images go.

    Raises:
        UserError: a file is missing or damaged.
    """
    from scipy.io import loadmat  # a quarter of a second that other data need not spend

    path = os.path.join(folder, FILES[split])
    if not os.path.isfile(path):
        raise UserError(f"--data svhn:{folder}: no {FILES[split]} in this folder")
    try:
        arrays = loadmat(path, variable_names=("X", "y"))
        pixels = torch.from_numpy(arrays["X"]).permute(3, 0, 1, 2)  # (32, 32, 3, N) in the file
        labels = arrays["y"].ravel().astype(np.int64) % 10  # the digit 0 is stored as 10
    except Exception as error:  # scipy's reader raises a dozen unrelated types for a damaged file
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--data svhn:{folder}: {path} is damaged ({words})") from None
    if len(pixels) != len(labels) or pixels.shape[1:] != (32, 32, 3):
        raise UserError(f"--data svhn:{folder}: {path} does not hold 32x32 images and labels")
    images = pixels.to(device).contiguous()
    return ResidentImages(images, labels, [str(digit) for digit in range(10)])
