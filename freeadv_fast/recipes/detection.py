"""Detectors: Fast AdvProp on COCO (Mei et al. 2022, table 7) and its natural twins.

Of table 7 no more is known here than RetinaNet with batch norm that trains, 24 epochs, 20 with Fast
AdvProp, and its numbers. Rate, decay, batch and drops are those of torchvision's reference
(references/detection, retinanet_resnet50_fpn); eps and step those of the paper's classifiers.
torchvision warms up over its first 1,000 updates, which are 0.14 epochs, and its drops count from
the start; ours count from the end of the warm-up.

torchvision's retinanet_resnet50_fpn_v2 has no row: it is trained with AdamW, which is not here.

Backbones start from ImageNet: add ``--init-from FILE`` with a ResNet-50, also one of ours.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.schedule import Schedule
from freeadv_fast.config.threat import Perturbation

COCO = TrainConfig(
    recipe="coco",
    data="coco:data",
    method="natural",
    m=1,
    image_size=800,
    augment="flip",
    holdout_images=0,
    arch="retinanet_resnet50_fpn",
    epochs=24,
    batch_size=16,
    lr=0.01,
    warmup_epochs=0.14,
    schedule=Schedule.parse("at:16,22"),
    weight_decay=1e-4,
    eps=Perturbation.parse("1/255"),
    eval_attacks=("pgd-10",),
)
# Half as long: detectron's and mmdetection's "1x".
ONCE: dict[str, Any] = {"epochs": 12, "schedule": Schedule.parse("at:8,11")}
# 16 clean and 4 attacked images, as the paper adds 64 to 256.
FAST_ADVPROP: dict[str, Any] = {
    "method": "fast-advprop",
    "p_adv": 0.2,
    "batch_size": 20,
    "aux_bn_group": 4,
}


def rows() -> dict[str, TrainConfig]:
    """Table 7, and its like in half the time."""
    return {
        "coco-retinanet50-natural-2x": COCO,
        "coco-retinanet50-natural-1x": replace(COCO, **ONCE),
        "coco-retinanet50-fast-advprop": replace(COCO, **FAST_ADVPROP),
        "coco-retinanet50-fast-advprop-1x": replace(COCO, **FAST_ADVPROP, **ONCE),
    }
