"""Eight common corruptions of images in memory, to try robustness without ImageNet-C's archives.

The formulas and values are those of ImageNet-C and CIFAR-10-C (Hendrycks and Dietterich 2019;
github.com/hendrycks/robustness, corruptions.py and make_cifar_c.py) except for the elastic
transform. ImageNet-C's files went through a resize, a truncation to bytes and a JPEG of quality 85
besides, and its other corruptions need its own textures: numbers measured here are not comparable
with published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional as transforms

from freeadv_fast.data.loader import Batch, Loader
from freeadv_fast.data.stream import random_bits

SEVERITIES = (1, 2, 3, 4, 5)

# Images up to this side take CIFAR-10-C's values: ImageNet-C's would leave little of them.
SMALL_SIDE = 64

# Width of the elastic transform's waves as a fraction of the side. Half of it is where a wave may
# fold the image over itself; the strongest level is that.
ELASTIC_WIDTH = 0.04


class Corruption(NamedTuple):
    """One way to spoil an image, at five levels.

    Attributes:
        group: ImageNet-C's word for the kind.
        apply: Takes a (3, H, W) float32 image in [0, 1], a level and the image's own generator;
            returns the same shape, not necessarily clipped.
        levels: Levels of severities 1 to 5 above `SMALL_SIDE` pixels, as in ImageNet-C.
        small_levels: Levels up to `SMALL_SIDE` pixels, as in CIFAR-10-C.
    """

    group: str
    apply: Callable[[Tensor, float, Generator], Tensor]
    levels: tuple[float, ...]
    small_levels: tuple[float, ...]


def _gaussian_noise(image: Tensor, std: float, generator: Generator) -> Tensor:
    """Adds normal noise of this standard deviation."""
    return image + std * torch.randn(image.shape, generator=generator, device=image.device)


def _shot_noise(image: Tensor, photons: float, generator: Generator) -> Tensor:
    """Counts photons: `photons` of them make white."""
    return torch.poisson(image * photons, generator=generator) / photons


def _gaussian_blur(image: Tensor, sigma: float, generator: Generator | None = None) -> Tensor:
    """Blurs by a Gaussian of this many pixels, cut at four of its sigmas as scikit-image does."""
    blurred: Tensor = transforms.gaussian_blur(image, 2 * max(1, round(4 * sigma)) + 1, sigma)
    return blurred


def _brightness(image: Tensor, gain: float, generator: Generator) -> Tensor:
    """Raises the value of HSV; hue and saturation stay, black becomes grey."""
    value = image.amax(0)
    raised = (value + gain).clamp(max=1)
    return torch.where(value > 0, image * (raised / value), raised)


def _contrast(image: Tensor, share: float, generator: Generator) -> Tensor:
    """Keeps this share of each pixel's distance from its channel's mean."""
    return torch.lerp(image.mean((1, 2), keepdim=True), image, share)


def _elastic_transform(image: Tensor, strength: float, generator: Generator) -> Tensor:
    """Moves pixels along smooth random waves, by `strength` times the side on average (RMS).

    ImageNet-C adds a random affine map, which is nearly all of its severities 1 and 2.
    """
    side = image.shape[-1]
    waves = torch.rand((2, side, side), generator=generator, device=image.device) - 0.5
    waves = _gaussian_blur(waves, ELASTIC_WIDTH * side)
    waves *= strength / waves.square().mean().sqrt()
    straight = torch.eye(2, 3, device=image.device)[None]
    grid = F.affine_grid(straight, [1, 3, side, side], align_corners=False)
    grid = grid + 2 * waves.permute(1, 2, 0)  # the grid's side is 2
    moved = F.grid_sample(image[None], grid, padding_mode="reflection", align_corners=False)
    return moved[0]


def _pixelate(image: Tensor, share: float, generator: Generator) -> Tensor:
    """Averages down to this share of the side and repeats pixels back up, by PIL's box filter."""
    side = image.shape[-1]
    picture = Image.fromarray(_quantized(image).permute(1, 2, 0).cpu().numpy())
    for size in (int(side * share), side):
        picture = picture.resize((size, size), Image.Resampling.BOX)
    return torch.tensor(np.asarray(picture), device=image.device).permute(2, 0, 1) / 255


def _jpeg_compression(image: Tensor, quality: float, generator: Generator) -> Tensor:
    """Compresses by libjpeg on the CPU, on any device: nvJPEG rounds differently."""
    pixels = _quantized(image).cpu()
    decoded: Tensor = transforms.jpeg(pixels, int(quality))
    return decoded.to(image.device).float() / 255


# The order is part of the set: a corruption's random draws hang on its place.
CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(
        "noise", _gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.10)
    ),
    "shot_noise": Corruption("noise", _shot_noise, (60, 25, 12, 5, 3), (500, 250, 100, 75, 50)),
    "gaussian_blur": Corruption("blur", _gaussian_blur, (1, 2, 3, 4, 6), (0.4, 0.6, 0.7, 0.8, 1)),
    "brightness": Corruption(
        "weather", _brightness, (0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3)
    ),
    "contrast": Corruption(
        "digital", _contrast, (0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15)
    ),
    "elastic_transform": Corruption(  # our own values: 1 to 4.5 pixels of 224
        "digital",
        _elastic_transform,
        (0.004, 0.008, 0.012, 0.016, 0.02),
        (0.004, 0.008, 0.012, 0.016, 0.02),
    ),
    "pixelate": Corruption(
        "digital", _pixelate, (0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65)
    ),
    "jpeg_compression": Corruption(
        "digital", _jpeg_compression, (25, 18, 15, 10, 7), (80, 65, 58, 50, 40)
    ),
}


def corrupt(
    images: Tensor, corruption: str, severity: int, *, indices: Tensor, seed: int
) -> Tensor:
    """Corrupts images; each is a function of (seed, corruption, severity, its index) alone.

    Args:
        images: (N, H, H, 3) uint8 on any device, at least 8 pixels a side.
        corruption: A key of `CORRUPTIONS`.
        severity: 1..5.
        indices: (N,) int64 on the CPU, the images' rows in their set.
        seed: Seed of the random draws, which are the same on one kind of device.

    Returns:
        (N, H, H, 3) uint8 on the same device.

    Raises:
        KeyError: no such corruption.
        ValueError: no such severity.
    """
    if severity not in SEVERITIES:
        raise ValueError(f"severity {severity}: must be one of {SEVERITIES}")
    _, apply, levels, small_levels = CORRUPTIONS[corruption]
    level = (small_levels if images.shape[1] <= SMALL_SIDE else levels)[severity - 1]
    place = list(CORRUPTIONS).index(corruption)
    bits = random_bits(seed, severity, indices.numpy(), range(place, place + 1))[:, 0]
    spoilt = torch.empty_like(images)
    for slot, image in enumerate(images):
        generator = Generator(images.device).manual_seed(int(bits[slot]))
        pixels = image.permute(2, 0, 1).float() / 255
        spoilt[slot] = _quantized(apply(pixels, level, generator)).permute(1, 2, 0)
    return spoilt


def _quantized(image: Tensor) -> Tensor:
    """An image in [0, 1] as uint8, values outside clipped."""
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


class CorruptedLoader:
    """A loader whose images are corrupted as they pass, see `data.loader.Loader`."""

    def __init__(self, loader: Loader, corruption: str, severity: int, seed: int) -> None:
        """Corrupts what `loader` yields.

        Args:
            loader: Clean images.
            corruption: A key of `CORRUPTIONS`.
            severity: 1..5.
            seed: Seed of the random draws.
        """
        self.loader, self.corruption = loader, corruption
        self.severity, self.seed = severity, seed
        self.classes = loader.classes
        self.num_images = loader.num_images
        self.num_batches = loader.num_batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields the minibatches of `epoch` from position `start` on."""
        for batch in self.loader.epoch(epoch, start):
            images = corrupt(
                batch.images,
                self.corruption,
                self.severity,
                indices=batch.indices,
                seed=self.seed,
            )
            yield batch._replace(images=images)
