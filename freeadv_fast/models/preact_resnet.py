"""PreActResNet-18 for 32-pixel images, in the two forms of the fast adversarial training papers."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from freeadv_fast.models.wide_resnet import initialize_convolutions


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, batch norm and ReLU before each; He et al. 2016.

    Where the size changes, the shortcut is a 1x1 convolution: of the first activation, or of the
    block's raw input.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, *, raw_shortcut: bool
    ) -> None:
        """Builds the block.

        Args:
            in_channels: Channels of the input.
            out_channels: Channels of the output.
            stride: Of the first convolution and the shortcut.
            raw_shortcut: Whether a convolved shortcut starts before the first batch norm.
        """
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
            if stride != 1 or in_channels != out_channels
            else None
        )
        self.raw_shortcut = raw_shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) to (N, out, H/stride, W/stride)."""
        activated = F.relu(self.bn1(x), inplace=True)
        shortcut = x
        if self.shortcut is not None:
            shortcut = self.shortcut(x if self.raw_shortcut else activated)
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))
        return residual + shortcut


class PreActResNet18(nn.Module):
    """Pre-activation ResNet-18: four stages of two blocks, 64 to 512 wide.

    `variant="fast"` is that of "Fast is better than free": a final batch norm and ReLU, shortcuts
    from the activation, torch's initialisation. `variant="gradalign"` is that of GradAlign
    (Andriushchenko and Flammarion 2020): neither final batch norm nor ReLU, shortcuts from the raw
    input, He's initialisation. The keys are the same but for `bn`.
    """

    def __init__(self, num_classes: int, *, variant: str = "fast") -> None:
        """Builds and initialises the network.

        Args:
            num_classes: Outputs of the linear layer.
            variant: ``fast`` or ``gradalign``.
        """
        super().__init__()
        is_gradalign = variant == "gradalign"
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        in_channels = 64
        stages = []
        for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            stages.append(
                nn.Sequential(
                    PreActBlock(in_channels, width, stride, raw_shortcut=is_gradalign),
                    PreActBlock(width, width, 1, raw_shortcut=is_gradalign),
                )
            )
            in_channels = width
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.bn = None if is_gradalign else nn.BatchNorm2d(512)
        self.linear = nn.Linear(512, num_classes)
        if is_gradalign:
            initialize_convolutions(self)
            nn.init.normal_(self.linear.weight, 0.0, math.sqrt(2 / 512))
            nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, S, S) to (N, num_classes) logits."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        if self.bn is not None:
            x = F.relu(self.bn(x), inplace=True)
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits
