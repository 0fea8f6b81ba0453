"""ResNets for 32-pixel images, with a 3x3 stem that keeps the size: those of pytorch-cifar.

The networks on which CIFAR's robustness is most often measured: RobustBench, MadryLab's robustness
library and the FastAT Benchmark (models/resnet.py) copy kuangliu/pytorch-cifar. Keys, layers and
their initialisation, torch's own, are those of that code.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """A 1x1 convolution and its batch norm where the shape changes; else nothing."""
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class CifarBlock(nn.Module):
    """Two 3x3 convolutions, batch norm after each; He et al. 2016, figure 5, left."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        """Builds the block.

        Args:
            in_channels: Channels of the input.
            width: Channels of the output.
            stride: Of the first convolution and the shortcut.
        """
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) to (N, width, H/stride, W/stride)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x), inplace=True)


class CifarBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, batch norm after each; He et al. 2016, figure 5, right.

    The 3x3 convolution has the stride, as in torchvision.
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        """Builds the block.

        Args:
            in_channels: Channels of the input.
            width: Channels of the 3x3 convolution; the output has four times as many.
            stride: Of the 3x3 convolution and the shortcut.
        """
        super().__init__()
        out_channels = self.expansion * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) to (N, 4 * width, H/stride, W/stride)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x), inplace=True)


BLOCKS: dict[int, tuple[type[CifarBlock | CifarBottleneck], tuple[int, ...]]] = {
    18: (CifarBlock, (2, 2, 2, 2)),
    50: (CifarBottleneck, (3, 4, 6, 3)),
}


class CifarResNet(nn.Module):
    """Four stages of residual blocks, 64 to 512 wide, behind a 3x3 convolution."""

    def __init__(self, num_classes: int, *, depth: int = 18) -> None:
        """Builds the network.

        Args:
            num_classes: Outputs of the linear layer.
            depth: A key of `BLOCKS`.
        """
        super().__init__()
        block, counts = BLOCKS[depth]
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels, stages = 64, []
        for width, stride, count in zip((64, 128, 256, 512), (1, 2, 2, 2), counts, strict=True):
            blocks = []
            for number in range(count):
                blocks.append(block(channels, width, 1 if number else stride))
                channels = block.expansion * width
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, S, S) to (N, num_classes) logits."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits
