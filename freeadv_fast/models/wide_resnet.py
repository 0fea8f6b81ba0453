"""Wide residual networks for 32-pixel images: the two that the literature calls "WRN-34-10".

`MadryWideResNet` is the network of "Adversarial Training for Free!" (there: WRN-32-10), from
Madry's CIFAR challenge; `WideResNet` is Zagoruyko and Komodakis's, as TRADES trains it. Both have
15 blocks of two convolutions and widths 160, 320, 640; they differ in shortcuts, slopes and the
place of the shared activation.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

LEAKINESS = 0.1


def initialize_convolutions(model: nn.Module) -> None:
    """Draws each convolution's kernel from N(0, 2 / (k * k * out_channels)), in place.

    He et al. 2015, counting outputs. Both papers' code does so.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels
            nn.init.normal_(layer.weight, 0.0, math.sqrt(2 / fan_out))


def same_convolution(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """A 3x3 convolution with TensorFlow's SAME padding and no bias.

    At stride 2 and an even size TensorFlow pads one row below and one column to the right only,
    where a `padding=1` convolution would pad (and read) above and to the left.
    """
    if stride == 1:
        return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return PaddedConv2d(in_channels, out_channels, 3, stride=stride, bias=False)


class PaddedConv2d(nn.Conv2d):
    """A convolution after one row of zeros below and one column to the right."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) with even H and W to (N, out, H/2, W/2) at stride 2."""
        return super().forward(F.pad(input, (0, 1, 0, 1)))


class MadryBlock(nn.Module):
    """Two 3x3 convolutions, batch norm and leaky ReLU before each, and a parameter-free shortcut.

    Where the width changes, the shortcut is averaged over stride x stride pixels and padded with
    as many zero channels below as above.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, *, shares_activation: bool = False
    ) -> None:
        """Builds the block.

        Args:
            in_channels: Channels of the input.
            out_channels: Channels of the output.
            stride: Of the first convolution and the shortcut, 1 or 2.
            shares_activation: Whether the shortcut starts after the first activation.
        """
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels, eps=1e-3)
        self.conv1 = same_convolution(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels, eps=1e-3)
        self.conv2 = same_convolution(out_channels, out_channels, 1)
        self.stride = stride
        self.channel_padding = (out_channels - in_channels) // 2
        self.shares_activation = shares_activation

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) to (N, out, H/stride, W/stride)."""
        activated = F.leaky_relu(self.bn1(x), LEAKINESS, inplace=True)
        shortcut = activated if self.shares_activation else x
        if self.stride > 1:
            shortcut = F.avg_pool2d(shortcut, self.stride)
        if self.channel_padding > 0:
            padding = self.channel_padding
            shortcut = F.pad(shortcut, (0, 0, 0, 0, padding, padding))
        activated = F.leaky_relu(self.bn2(self.conv1(activated)), LEAKINESS, inplace=True)
        residual: Tensor = self.conv2(activated)
        return residual + shortcut


class MadryWideResNet(nn.Module):
    """WRN-32-10 as "Adversarial Training for Free!" trains it on CIFAR.

    A 3x3 convolution to 16 channels; three stages of 5 blocks, 160, 320 and 640 wide, with strides
    1, 2 and 2; batch norm, leaky ReLU, global average, linear layer. Only the first block shares
    its activation with the shortcut. Batch norms have TensorFlow's epsilon, 1e-3.

    The 32 counts the 30 convolutions in blocks and two more layers; Zagoruyko's counting would say
    34. The images' own standardisation, part of that code's graph, is `normalize.py`'s.
    """

    def __init__(self, num_classes: int, *, num_blocks: int = 5, widen_factor: int = 10) -> None:
        """Builds and initialises the network.

        Args:
            num_classes: Outputs of the linear layer.
            num_blocks: Blocks a stage.
            widen_factor: Width of the stages in multiples of 16, 32 and 64 channels.
        """
        super().__init__()
        widths = (16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor)
        self.conv1 = same_convolution(3, widths[0], 1)
        stages = []
        for stage in range(3):
            first = MadryBlock(
                widths[stage],
                widths[stage + 1],
                stride=1 if stage == 0 else 2,
                shares_activation=stage == 0,
            )
            width = widths[stage + 1]
            rest = [MadryBlock(width, width, stride=1) for _ in range(num_blocks - 1)]
            stages.append(nn.Sequential(first, *rest))
        self.block1, self.block2, self.block3 = stages
        self.bn = nn.BatchNorm2d(widths[3], eps=1e-3)
        self.fc = nn.Linear(widths[3], num_classes)
        initialize_convolutions(self)
        # tf.uniform_unit_scaling_initializer(factor=1).
        bound = math.sqrt(3 / widths[3])
        nn.init.uniform_(self.fc.weight, -bound, bound)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, S, S) to (N, num_classes) logits; TensorFlow's needs S to be a multiple of 4."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = F.leaky_relu(self.bn(x), LEAKINESS, inplace=True)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


class WideBlock(nn.Module):
    """Two 3x3 convolutions, batch norm and ReLU before each; Zagoruyko and Komodakis 2016.

    Where the width changes, the shortcut is a 1x1 convolution of the first activation.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        """Builds the block.

        Args:
            in_channels: Channels of the input.
            out_channels: Channels of the output.
            stride: Of the first convolution and the shortcut.
        """
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.convShortcut = (
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            if in_channels != out_channels
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) to (N, out, H/stride, W/stride)."""
        activated = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))
        return residual + shortcut


class WideStage(nn.Module):
    """Blocks of one width, under the key `layer` that published checkpoints use."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, num_blocks: int) -> None:
        """Builds `num_blocks` blocks; the first changes width and size."""
        super().__init__()
        first = WideBlock(in_channels, out_channels, stride)
        rest = [WideBlock(out_channels, out_channels, 1) for _ in range(num_blocks - 1)]
        self.layer = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) to (N, out, H/stride, W/stride)."""
        x = self.layer(x)
        return x


class WideResNet(nn.Module):
    """WRN-depth-widen_factor of Zagoruyko and Komodakis 2016, as TRADES trains it.

    State-dict keys are those of the TRADES code, less its `sub_block1`, which its forward pass
    never uses.
    """

    def __init__(self, num_classes: int, *, depth: int = 34, widen_factor: int = 10) -> None:
        """Builds and initialises the network.

        Args:
            num_classes: Outputs of the linear layer.
            depth: 6 * blocks a stage + 4.
            widen_factor: Width of the stages in multiples of 16, 32 and 64 channels.
        """
        super().__init__()
        num_blocks = (depth - 4) // 6
        widths = (16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor)
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.block1 = WideStage(widths[0], widths[1], 1, num_blocks)
        self.block2 = WideStage(widths[1], widths[2], 2, num_blocks)
        self.block3 = WideStage(widths[2], widths[3], 2, num_blocks)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)
        initialize_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, S, S) to (N, num_classes) logits."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = F.relu(self.bn1(x), inplace=True)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits
