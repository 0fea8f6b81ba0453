"""The way from 8-bit pixels to a network's input, as layers that travel with the network."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

GREY_LEVEL = 1 / 255


def unit_images(images_u8: Tensor) -> Tensor:
    """Turns a loader's images into what attacks and exported networks take.

    Args:
        images_u8: (N, H, W, 3) uint8.

    Returns:
        (N, 3, H, W) float32 pixels in [0, 1], channels_last in memory.
    """
    return images_u8.permute(0, 3, 1, 2).float().div_(255)


class InputNormalizer(nn.Module):
    """Subtracts a per-channel mean and divides by a per-channel standard deviation.

    Attributes:
        mean: (1, 3, 1, 1) float32 buffer, in units of the pixel range; so saved by RobustBench.
        std: (1, 3, 1, 1) float32 buffer, likewise, above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Keeps the statistics as buffers.

        Args:
            mean: Three numbers in [0, 1].
            std: Three numbers above 0.
        """
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) pixels in [0, 1] to the network's input of the same shape."""
        return (images - self.mean) / self.std


class PerImageStandardizer(nn.Module):
    """Gives each image mean 0 and standard deviation 1 over all its pixels and channels.

    The layer belongs to the network: gradients pass through the image's own statistics, as in the
    CIFAR code of "Adversarial Training for Free!" (`tf.image.per_image_standardization` inside the
    graph, on the perturbed image). Its floor on the standard deviation, 1/sqrt(number of values),
    counts grey levels, because that code feeds pixels in 0..255; here they are in [0, 1].
    """

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) pixels in [0, 1] to the same shape, in float32 or float64."""
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        variance, mean = torch.var_mean(images, dim=(1, 2, 3), correction=0, keepdim=True)
        floor = GREY_LEVEL**2 / images[0].numel()
        # The floor is applied before the root: the root's slope at 0 would be infinite.
        return (images - mean) * variance.clamp_min(floor).rsqrt()


class StandardizedNetwork(nn.Sequential):
    """A network behind a `PerImageStandardizer`; children `standardize` and `model`."""

    def __init__(self, model: nn.Module) -> None:
        """Puts the standardiser before `model`."""
        super().__init__(OrderedDict(standardize=PerImageStandardizer(), model=model))


def plain_network(model: nn.Module) -> nn.Module:
    """The network whose state dict has torchvision's or timm's own keys.

    Args:
        model: What `zoo.build_model` returned.

    Returns:
        `model` itself, or the network inside its per-image standardiser.
    """
    if not isinstance(model, StandardizedNetwork):
        return model
    return model.get_submodule("model")


def with_normalizer(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
    """Wraps a network so that it takes pixels in [0, 1].

    Args:
        model: Network of normalised images; shared, not copied.
        mean: Per-channel mean in [0, 1].
        std: Per-channel standard deviation, above 0.

    Returns:
        A module with children `normalize` and `model`, the layout of RobustBench. Its new buffers
        are on the CPU unless `model` has parameters elsewhere.
    """
    normalizer = InputNormalizer(mean, std)
    first = next(model.parameters(), None)
    if first is not None:
        normalizer.to(first.device)
    return nn.Sequential(OrderedDict(normalize=normalizer, model=model))
