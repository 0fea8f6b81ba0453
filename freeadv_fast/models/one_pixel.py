"""Convolutions whose output is one pixel, as the linear layers that they are.

So end ResNets at 32 px. On a CPU the gradient of such a kernel is the dear one: oneDNN adds each
image's to the whole of it in memory. 64 images, 3x3, 512 channels to 512: 180 ms on one core, 13 as
one product over all images; forward and the input's gradient are 5 each (AVX2, torch 2.11).
"""

from __future__ import annotations

from typing import TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn

from freeadv_fast.models.twins import is_stock, twin_of


class OnePixelConv2d(nn.Conv2d):
    """A convolution that is a matrix product where its window stands at one place."""

    padding: tuple[int, ...]  # no word: `_is_plain`

    def forward(self, input: Tensor) -> Tensor:
        """(N, in, H, W) to (N, out, H', W')."""
        steps = (
            (size + 2 * padding - taps) // stride
            for size, padding, taps, stride in zip(
                input.shape[2:], self.padding, self.kernel_size, self.stride, strict=True
            )
        )
        if any(steps):
            return super().forward(input)
        (height, width), (top, left) = self.kernel_size, self.padding
        window = F.pad(input, (left, left, top, top))[:, :, :height, :width]
        # In the order of a kernel in channels_last.
        rows, kernel = (t.permute(0, 2, 3, 1).flatten(1) for t in (window, self.weight))
        return F.linear(rows, kernel, self.bias)[:, :, None, None]


def use_products_for_one_pixel(model: nn.Module) -> None:
    """Lets plain convolutions of more than one tap be products where they can, in place.

    Args:
        model: Its parameters stay the same objects.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if _is_plain(child):
                module._modules[name] = twin_of(child, OnePixelConv2d)


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    return (
        isinstance(layer, nn.Conv2d)
        and is_stock(layer, nn.Conv2d)
        and layer.kernel_size != (1, 1)
        and (layer.dilation, layer.groups, layer.padding_mode) == ((1, 1), 1, "zeros")
        and not isinstance(layer.padding, str)
    )
