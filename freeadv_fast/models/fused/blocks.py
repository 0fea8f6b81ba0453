"""The forward passes of twins: the original's computation, in its order, in fused calls."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from freeadv_fast import ops
from freeadv_fast.models.fused.carried import shortcut_of
from freeadv_fast.models.fused.norm import FusedBatchNorm2d
from freeadv_fast.models.twins import is_stock


def _block_start(norm: nn.Module, x: Tensor, *, is_raw: bool) -> tuple[Tensor, Tensor]:
    """A block's first norm and ReLU, and what its shortcut reads.

    Args:
        norm: The norm.
        x: (N, C, H, W), the block's input.
        is_raw: Whether the shortcut reads x, and not the activation.
    """
    if isinstance(norm, FusedBatchNorm2d) and is_stock(norm, FusedBatchNorm2d):
        both = norm.with_alias(x, of_input=is_raw)
        if both is not None:
            return both
    activated: Tensor = norm(x)
    return activated, x if is_raw else activated


def _block_end(
    norm: Any, layer: nn.Module, x: Tensor, downsample: nn.Module | None, shortcut: Tensor
) -> Tensor:
    """A block's last convolution, norm, addition and ReLU, and what its shortcut goes through."""
    projection, residual_norm = _projection(downsample), None
    if downsample is not None and projection is None:
        shortcut = downsample(shortcut)
    if type(norm) is FusedBatchNorm2d:
        output = norm.of_product(layer, x, shortcut, projection)
        if output is not None:
            return output
    if projection is not None:
        *layers, residual_norm = projection
        for other in layers:
            shortcut = other(shortcut)
    return norm(layer(x), shortcut, residual_norm)  # type: ignore[no-any-return]


def _block_sum(norm: nn.Module, residual: Tensor, shortcut: Tensor) -> Tensor:
    """The end of a block whose norms come first; `norm` is its last."""
    if type(norm) is FusedBatchNorm2d:
        return norm.block_sum(residual, shortcut)
    return residual + shortcut


def _projection(downsample: nn.Module | None) -> list[nn.Module] | None:
    """A shortcut's layers where the last of them is a fused norm, else None."""
    if not is_stock(downsample, nn.Sequential):
        return None
    layers = [layer for layer in downsample._modules.values() if layer is not None]  # type: ignore[union-attr]
    return layers if layers and type(layers[-1]) is FusedBatchNorm2d else None


def torchvision_basic_block(self: Any, x: Tensor) -> Tensor:
    """3x3 and 3x3 convolution."""
    out = self.bn1(self.conv1(x))
    return _block_end(self.bn2, self.conv2, out, self.downsample, shortcut_of(x))


def torchvision_bottleneck(self: Any, x: Tensor) -> Tensor:
    """1x1, 3x3 and 1x1 convolution."""
    out = self.bn1(self.conv1(x))
    out = self.bn2(self.conv2(out))
    return _block_end(self.bn3, self.conv3, out, self.downsample, shortcut_of(x))


def timm_basic_block(self: Any, x: Tensor) -> Tensor:
    """torchvision's, with room for anti-aliasing."""
    out = self.aa(self.bn1(self.conv1(x)))
    return _block_end(self.bn2, self.conv2, out, self.downsample, shortcut_of(x))


def timm_bottleneck(self: Any, x: Tensor) -> Tensor:
    """torchvision's, with room for anti-aliasing."""
    out = self.bn1(self.conv1(x))
    out = self.aa(self.bn2(self.conv2(out)))
    return _block_end(self.bn3, self.conv3, out, self.downsample, shortcut_of(x))


def cifar_block(self: Any, x: Tensor) -> Tensor:
    """torchvision's under other names."""
    out = self.bn1(self.conv1(x))
    return _block_end(self.bn2, self.conv2, out, self.shortcut, shortcut_of(x))


def cifar_bottleneck(self: Any, x: Tensor) -> Tensor:
    """torchvision's under other names."""
    out = self.bn2(self.conv2(self.bn1(self.conv1(x))))
    return _block_end(self.bn3, self.conv3, out, self.shortcut, shortcut_of(x))


def cifar_resnet(self: Any, x: Tensor) -> Tensor:
    """A stem without pooling, stages, global average."""
    x = self.layer4(self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x))))))
    return self.linear(ops.global_average(x))  # type: ignore[no-any-return]


def preact_block(self: Any, x: Tensor) -> Tensor:
    """Batch norm and ReLU before each convolution."""
    is_raw = self.shortcut is None or self.raw_shortcut
    activated, shortcut = _block_start(self.bn1, x, is_raw=is_raw)
    if self.shortcut is not None:
        shortcut = self.shortcut(shortcut)
    return _block_sum(self.bn2, self.conv2(self.bn2(self.conv1(activated))), shortcut)


def preact_resnet18(self: Any, x: Tensor) -> Tensor:
    """The variant with a last batch norm; the other has no ReLU of its own."""
    x = self.bn(self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x))))))
    return self.linear(ops.global_average(x))  # type: ignore[no-any-return]


def wide_block(self: Any, x: Tensor) -> Tensor:
    """Batch norm and ReLU before each convolution."""
    activated, shortcut = _block_start(self.bn1, x, is_raw=self.convShortcut is None)
    if self.convShortcut is not None:
        shortcut = self.convShortcut(shortcut)
    return _block_sum(self.bn2, self.conv2(self.bn2(self.conv1(activated))), shortcut)


def wide_resnet(self: Any, x: Tensor) -> Tensor:
    """Stages, batch norm with ReLU, global average."""
    x = self.bn1(self.block3(self.block2(self.block1(self.conv1(x)))))
    return self.fc(ops.global_average(x))  # type: ignore[no-any-return]


def madry_block(self: Any, x: Tensor) -> Tensor:
    """Batch norm and leaky ReLU before each convolution; a shortcut without parameters."""
    activated, shortcut = _block_start(self.bn1, x, is_raw=not self.shares_activation)
    if self.stride > 1:
        shortcut = F.avg_pool2d(shortcut, self.stride)
    if self.channel_padding > 0:
        padding = self.channel_padding
        shortcut = F.pad(shortcut, (0, 0, 0, 0, padding, padding))
    return _block_sum(self.bn2, self.conv2(self.bn2(self.conv1(activated))), shortcut)


def madry_wide_resnet(self: Any, x: Tensor) -> Tensor:
    """Stages, batch norm with leaky ReLU, global average."""
    x = self.bn(self.block3(self.block2(self.block1(self.conv1(x)))))
    return self.fc(ops.global_average(x))  # type: ignore[no-any-return]
