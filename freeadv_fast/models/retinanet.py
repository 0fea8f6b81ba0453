"""RetinaNet: torchvision's networks, taken apart into a network, its losses and its predictions.

torchvision's own module resizes, normalises and pads images, computes losses in training mode and
boxes in eval mode, all in one call. A `Detector` is the same network, under the same keys, and
computes what a classifier does: outputs of normalised images. Losses are `step.detection`'s.

Every layer trains, the backbone's batch norms included (torchvision freezes them when it loads
weights): methods that give them a second branch need them so, and Fast AdvProp's paper trains them.

Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017; torchvision's
``retinanet_resnet50_fpn`` and ``retinanet_resnet50_fpn_v2``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from freeadv_fast.errors import UserError

# The feature maps of a ResNet that a pyramid is built on: C3, C4 and C5.
_STAGES = {"layer2": "0", "layer3": "1", "layer4": "2"}


class HeadOutputs(NamedTuple):
    """What a detector says of n images: a row for each of its A anchors, coarser levels last.

    Attributes:
        class_logits: (n, A, C), of a sigmoid each, float32 or wider.
        box_deltas: (n, A, 4), float32 or wider: how a box differs from its anchor, in centre and
            in the logarithm of its sides.
        anchors: (A, 4) float32, x1, y1, x2, y2 in pixels of the padded images.
        level_sizes: How many of the anchors each level of the pyramid has.
    """

    class_logits: Tensor
    box_deltas: Tensor
    anchors: Tensor
    level_sizes: tuple[int, ...]


class Detector(RetinaNet):  # type: ignore[misc]
    """torchvision's RetinaNet as a function of normalised, padded images."""

    def forward(self, x: Tensor) -> HeadOutputs:
        """(n, 3, H, W) network input to what is predicted at each anchor, in either mode."""
        features = list(self.backbone(x).values())
        outputs = self.head(features)
        logits, deltas = (_at_least_float32(outputs[k]) for k in ("cls_logits", "bbox_regression"))
        anchors = self.anchors([level.shape[2:] for level in features], x.shape[2:], x.device)
        return HeadOutputs(logits, deltas, torch.cat(anchors), tuple(map(len, anchors)))

    def anchors(
        self, grids: Sequence[torch.Size], size: torch.Size, device: torch.device
    ) -> list[Tensor]:
        """Anchors of each level, (A of the level, 4) float32, in float32 also under autocast.

        Args:
            grids: Height and width of each level's features.
            size: Height and width of the padded images, in pixels.
            device: Of the anchors.
        """
        strides = [
            [torch.full((), s // cells, device=device) for s, cells in zip(size, grid, strict=True)]
            for grid in grids
        ]
        self.anchor_generator.set_cell_anchors(torch.float32, device)
        anchors: list[Tensor] = self.anchor_generator.grid_anchors(grids, strides)
        return anchors

    @torch.no_grad()
    def predictions(self, outputs: HeadOutputs, sizes: Tensor) -> list[dict[str, Tensor]]:
        """The boxes that are found in each image, by torchvision's thresholds and its NMS.

        Args:
            outputs: Of n images.
            sizes: (n, 2) int64, height and width of each image without its padding.

        Returns:
            For each image ``boxes`` (k, 4), x1, y1, x2, y2 in pixels of the padded image and within
            the image itself, ``scores`` (k,), falling, and ``labels`` (k,) int64.
        """
        levels = outputs.level_sizes
        split = {
            "cls_logits": outputs.class_logits.split(levels, dim=1),
            "bbox_regression": outputs.box_deltas.split(levels, dim=1),
        }
        anchors = [outputs.anchors.split(levels)] * len(sizes)
        found = self.postprocess_detections(split, anchors, sizes.tolist())
        return cast(list[dict[str, Tensor]], found)


def _at_least_float32(x: Tensor) -> Tensor:
    """In float32, or as it is where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def feature_pyramid(
    resnet: nn.Module, num_channels: int, last_channels: int | None = None
) -> BackboneWithFPN:
    """A ResNet with a feature pyramid of five levels, P3 to P7.

    Args:
        resnet: torchvision's.
        num_channels: Of each level.
        last_channels: Of what P6 is computed from: C5's channels, or P5's by default.
    """
    widths = [resnet.inplanes // 4, resnet.inplanes // 2, resnet.inplanes]  # type: ignore[operator]
    extra = LastLevelP6P7(last_channels or num_channels, num_channels)
    return BackboneWithFPN(resnet, _STAGES, widths, num_channels, extra)


def anchor_generator(smallest: int) -> AnchorGenerator:
    """Three sizes and three shapes at each place, as in the paper.

    Args:
        smallest: Side of the smallest anchor, in pixels; each level's are twice the last one's.
    """
    sizes = [smallest * 2**level for level in range(5)]
    scales = [(side, int(side * 2 ** (1 / 3)), int(side * 2 ** (2 / 3))) for side in sizes]
    return AnchorGenerator(tuple(scales), ((0.5, 1.0, 2.0),) * len(scales))


def _retinanet_resnet50_fpn_v2(num_classes: int) -> Detector:
    """torchvision's second version: GroupNorm in the head, GIoU as box loss, P6 from C5."""
    backbone, anchors = feature_pyramid(resnet50(), 256, 2048), anchor_generator(32)
    group_norm = functools.partial(nn.GroupNorm, 32)
    head = RetinaNetHead(256, 9, num_classes, norm_layer=group_norm)
    head.regression_head._loss_type = "giou"
    return Detector(backbone, num_classes, anchor_generator=anchors, head=head)


def _retinanet_resnet10_fpn_64(num_classes: int) -> Detector:
    """For toys on a CPU: blocks of a ResNet-18 halved in number, 64 channels in pyramid and head.

    The smallest anchors, 24 pixels, are three strides wide, so that a square object of 20 to 76
    pixels in an image of some 128 overlaps one by half wherever it lies. With GroupNorm in the
    head, as in torchvision's second version, it learns from scratch in minutes.
    """
    backbone = feature_pyramid(ResNet(BasicBlock, [1, 1, 1, 1]), 64)
    group_norm = functools.partial(nn.GroupNorm, 16)
    head = RetinaNetHead(64, 9, num_classes, norm_layer=group_norm)
    return Detector(backbone, num_classes, anchor_generator=anchor_generator(24), head=head)


DETECTORS: dict[str, Callable[[int], Detector]] = {
    "retinanet_resnet50_fpn": lambda n: Detector(feature_pyramid(resnet50(), 256), n),
    "retinanet_resnet50_fpn_v2": _retinanet_resnet50_fpn_v2,
    "retinanet_resnet18_fpn": lambda n: Detector(feature_pyramid(resnet18(), 256), n),
    "retinanet_resnet10_fpn_64": _retinanet_resnet10_fpn_64,
}


def is_detector(arch: str) -> bool:
    """Whether a network of this name finds objects."""
    return arch in DETECTORS


def build_detector(arch: str, num_classes: int) -> Detector:
    """Builds a detector with fresh weights, drawn from torch's global generator.

    Args:
        arch: A key of `DETECTORS`.
        num_classes: Classes of objects, labelled from 0; there is none for the background.

    Returns:
        On the CPU, in training mode. Names of torchvision have torchvision's keys and initial
        weights.

    Raises:
        UserError: no such detector.
    """
    if not is_detector(arch):
        raise UserError(f"--arch {arch}: no such detector; use one of {', '.join(DETECTORS)}")
    return DETECTORS[arch](num_classes)
