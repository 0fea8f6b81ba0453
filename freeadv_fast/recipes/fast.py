"""FGSM from a random start: Wong et al. 2020, "Fast is better than free"."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from freeadv_fast.config.phases import Phases
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.schedule import Schedule
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.recipes.free import IMAGENET
from freeadv_fast.recipes.gradalign import GRADALIGN_CIFAR10

# CIFAR-10: cyclic rate, pixels normalised. Their code also swings the momentum between 0.8 and 0.9,
# a default of torch's CyclicLR; we do not.
FAST_CIFAR10 = replace(
    GRADALIGN_CIFAR10,
    method="fgsm-rs",
    arch="preact-resnet18",
    normalization="cifar10",
    lr=0.2,
    schedule=Schedule.parse("linear:0.5"),
    eps=Perturbation.parse("8/255"),
    eval_step=Perturbation.parse("2/255"),
)

# ImageNet: three phases, the image side growing while the batch shrinks; the rate per update; no
# decay on batch norm; evaluated on the central 288 px of images as they are stored. Their text
# gives steps of 1.25 eps, their code the rest (configs_fast_*.yml, main_fast.py). Four GPUs gave
# their batch norm groups of 128, 56 and 32 images; ours are a rank's minibatch. Their copies of 160
# and 352 px (data.resize) make it faster: --phase-data /in160,/in352,/imagenet.
FAST_IMAGENET = replace(
    IMAGENET,
    method="fgsm-rs",
    m=1,
    resize_size=0,
    bn_group=None,
    epochs=15,
    phases=Phases.parse("0-6:128:512,6-12:224:224,12-15:288:128"),
    lr=0.4,
    schedule=Schedule.parse("piecewise:0=0,1=1,6=0.1,12=0.01,15=0.001"),
    decay="no-bn",
    eval_attacks=("pgd-50-10",),
)


def rows() -> dict[str, TrainConfig]:
    """Table 1 on CIFAR-10, and ImageNet at two radii."""
    rows = {
        f"cifar10-preact18-fgsm-rs-{epochs}ep": replace(FAST_CIFAR10, epochs=epochs)
        for epochs in (15, 30)
    }
    for levels in (2, 4):
        rows[f"imagenet-rn50-fgsm-rs-eps{levels}"] = replace(
            FAST_IMAGENET, eps=Perturbation(Fraction(levels))
        )
    return rows
