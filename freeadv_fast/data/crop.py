"""Zero-pad, crop and mirror on the device, by one gather."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from freeadv_fast.data.stream import Ints, Keys, random_flips, random_offsets


def pad_images(images: Tensor, padding: int) -> Tensor:
    """Adds `padding` rows and columns of zeros on each side of (N, H, W, 3) uint8 images."""
    return torch.nn.functional.pad(images, (0, 0, padding, padding, padding, padding))


def random_crop_flip(
    padded: Tensor,
    slots: Ints,
    keys: Keys,
    padding: int,
    seed: int,
    epoch: int,
    *,
    flip: bool = True,
) -> Tensor:
    """RandomCrop, and RandomHorizontalFlip if asked for, of images that are padded already.

    Args:
        padded: (N, H + 2p, W + 2p, 3) uint8 images with p pixels of padding.
        slots: (n,) which of them to take.
        keys: (n,) keys of these images; the random draws hang on them.
        padding: p.
        seed: The run's seed.
        epoch: Data epoch.
        flip: Whether to mirror half of the images; house numbers are not mirrored.

    Returns:
        (n, H, W, 3) uint8 on the same device, contiguous.
    """
    corners = random_offsets(seed, epoch, keys, 2 * padding + 1)
    flips = random_flips(seed, epoch, keys) & flip
    packed = np.column_stack([slots, corners, flips])
    slot, top, left, is_mirrored = (
        torch.from_numpy(packed).to(padded.device, non_blocking=True).unbind(1)
    )
    down = torch.arange(padded.shape[1] - 2 * padding, device=padded.device)
    right = torch.arange(padded.shape[2] - 2 * padding, device=padded.device)
    mirrored = torch.where(is_mirrored[:, None] == 1, right.flip(0), right)
    return padded[
        slot[:, None, None], (top[:, None] + down)[:, :, None], (left[:, None] + mirrored)[:, None]
    ]
