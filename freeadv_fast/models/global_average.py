"""Global average pooling as a layer that torchvision's and timm's networks can have for theirs."""

from __future__ import annotations

from torch import Tensor, nn

from freeadv_fast import ops


class GlobalAverage2d(nn.AdaptiveAvgPool2d):
    """`nn.AdaptiveAvgPool2d` to one pixel, by `ops.global_average`."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, 1, 1), or an image's (C, H, W) to (C, 1, 1)."""
        if input.dim() != 4:
            return super().forward(input)
        return ops.global_average(input)[:, :, None, None]
