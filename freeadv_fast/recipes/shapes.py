"""The embedded set of synthetic shapes: detection, to be tried without any data, on a CPU."""

from __future__ import annotations

from dataclasses import replace

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.schedule import Schedule
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.recipes.detection import COCO, FAST_ADVPROP
from freeadv_fast.recipes.free_detection import FREE

SHAPES = replace(
    COCO,
    data="shapes",
    image_size=128,
    workers=2,
    arch="retinanet_resnet10_fpn_64",
    epochs=9,
    batch_size=8,
    lr=0.04,
    warmup_epochs=0.0,
    schedule=Schedule.parse("linear:0.2"),
    checkpoint_every=60,
    log_every=10,
    eval_images=200,
    eval_corruptions=(
        "gaussian_noise-3",
        "motion_blur-3",
        "fog-3",
        "contrast-3",
        "jpeg_compression-3",
    ),
)
# The radius of those that seek robustness.
EPS = Perturbation.parse("4/255")


def rows() -> dict[str, TrainConfig]:
    """Natural training and the methods of Fast AdvProp's and free training's families."""
    return {
        "shapes-natural": SHAPES,
        "shapes-fast-advprop": replace(
            SHAPES, **FAST_ADVPROP | {"batch_size": 10, "aux_bn_group": 2}
        ),
        "shapes-free": replace(SHAPES, **FREE),
        "shapes-fgsm-rs": replace(SHAPES, method="fgsm-rs", eps=EPS),
        "shapes-pgd": replace(SHAPES, method="pgd", attack_steps=3, eps=EPS),
    }
