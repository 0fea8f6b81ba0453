"""The 7x7 stride-2 stem of a ResNet as a 4x4 stride-1 convolution of 2x2 blocks of pixels.

Free training asks for the stem's input gradient. Its three channels may fill a fraction of a tensor
core's tile: 256 images cost 0.1 ms in a product that is 4 wide and 3.3 ms in one 128 wide (computed
for an H200: notes, performance.md section 3). With each block of 2x2 pixels as one position of 12
channels, padded to 16, that gradient is a convolution with aligned channels and no stride.

The outputs are the same. With one row of zeros before its first and one column likewise, the 7x7
kernel is an 8x8 kernel whose tap k reads pixel 2 y + k - 4 for output row y: at k = 2 i + dy, row
dy of block y + i - 2. Blocks y - 2 to y + 1 meet 4 taps, and two blocks of zeros above and one
below stand for the padding of 3. An output takes 4 * 4 * 12 products instead of 7 * 7 * 3: 0.308
instead of 0.236 GFLOP for one 224-pixel image and 64 channels.

The parameter stays the 7x7 kernel: keys, initialisation and weight decay are the plain network's,
and the zeros of the 8x8 kernel never train.

Source: the space-to-depth stem of Google's ResNet for TPUs in MLPerf Training
(`conv0_space_to_depth`).
"""

from __future__ import annotations

from typing import TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn

from freeadv_fast import ops
from freeadv_fast.models.twins import class_path, twin_of

KERNEL = 7
PACKED_CHANNELS = 16


class SpaceToDepthConv2d(nn.Conv2d):
    """A 7x7 convolution, stride 2 and padding 3, that takes images as they are or packed.

    Packed images are (N, 16, ceil(H/2) + 3, ceil(W/2) + 3): colour c of pixel (2 h + dy, 2 w + dx)
    stands in channel dy * 8 + dx * 3 + c of row h + 2, column w + 2, and everything else is zero:
    channels 6, 7, 14 and 15, two rows above and one below, two columns left and one right, and the
    pixels that an odd H or W lacks. The gradient at what is always zero means nothing.
    """

    def __init__(self, out_channels: int, **options: object) -> None:
        """Builds the convolution of three colours.

        Args:
            out_channels: Channels of the output.
            **options: bias, device, dtype.
        """
        super().__init__(3, out_channels, KERNEL, stride=2, padding=3, **options)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        """(N, 3, H, W), or packed, to (N, out, ceil(H/2), ceil(W/2))."""
        if input.size(1) == PACKED_CHANNELS:
            return ops.stem_convolution(input, self.packed_weight(), self.bias)
        return super().forward(input)

    def packed_weight(self) -> Tensor:
        """The kernel over blocks, (out, 16, 4, 4), channels_last, in the parameter's dtype.

        Differentiable. It is rounded once, in the convolution that it is made for.
        """
        weight = F.pad(self.weight, (1, 0, 1, 0))
        # (out, colour, i, dy, j, dx) to (out, i, j, dy, dx, colour).
        blocks = weight.unflatten(3, (4, 2)).unflatten(2, (4, 2)).permute(0, 2, 4, 3, 5, 1)
        runs = blocks.flatten(4)
        runs = F.pad(runs, (0, PACKED_CHANNELS // 2 - runs.size(4)))
        return runs.flatten(3).permute(0, 3, 1, 2)


def use_space_to_depth(model: nn.Module) -> bool:
    """Lets a ResNet's stem take packed images, in place; call it before anything builds trees.

    Args:
        model: torchvision's or timm's ResNet; its parameters stay the same objects.

    Returns:
        Whether it does so now. False, and nothing has changed, where the network is of another
        class, stands behind another layer, or has another stem (timm's deep ones).
    """
    stem = model._modules.get("conv1")
    if class_path(model) not in _RESNETS or not _is_stem(stem):
        return False
    model._modules["conv1"] = twin_of(stem, SpaceToDepthConv2d)
    return True


# Both apply their `conv1` to the input, and nothing before it.
_RESNETS = ("torchvision.models.resnet.ResNet", "timm.models.resnet.ResNet")


def _is_stem(layer: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Whether it is the convolution that `SpaceToDepthConv2d` computes."""
    return (
        isinstance(layer, nn.Conv2d)
        and type(layer) in (nn.Conv2d, SpaceToDepthConv2d)
        and (
            layer.in_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            layer.padding_mode,
        )
        == (3, (KERNEL, KERNEL), (2, 2), (3, 3), (1, 1), 1, "zeros")
    )
