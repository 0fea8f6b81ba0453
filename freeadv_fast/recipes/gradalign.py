"""GradAlign's figure 1 (Andriushchenko and Flammarion 2020): every method by radius.

On CIFAR-10 and SVHN; N-FGSM (de Jorge et al. 2022) and ELLE on the same network and schedule.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from freeadv_fast.config.presets import preset_lambda
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.schedule import Schedule
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.recipes.free import CIFAR10
from freeadv_fast.recipes.pgd import pgd_fields

# PreActResNet-18 without a final batch norm, pixels in [0, 1]; attacks of step eps / 4 with 10
# restarts. House numbers are not mirrored, and their attack grows over 5 epochs.
GRADALIGN_CIFAR10 = replace(
    CIFAR10,
    method="gradalign",
    m=1,
    reg_every=1,
    arch="preact-resnet18-gradalign",
    normalization="none",
    crop_padding=4,
    steps=None,
    epochs=30,
    lr=0.3,
    schedule=Schedule.parse("linear:0.4"),
    weight_decay=5e-4,
    decay="all",
    eval_attacks=("pgd-50-10",),
)
GRADALIGN_SVHN = replace(
    GRADALIGN_CIFAR10, data="svhn:data", augment="pad-crop", epochs=15, attack_warmup=5
)


@dataclass(frozen=True)
class Figure1:
    """What differs between the figure's methods on one dataset."""

    base: TrainConfig
    lr: float
    gradalign_lr: float
    free_epochs: float
    free_lr: float


CIFAR10_FIGURE_1 = Figure1(
    GRADALIGN_CIFAR10, lr=0.2, gradalign_lr=0.3, free_epochs=96, free_lr=0.04
)
SVHN_FIGURE_1 = Figure1(GRADALIGN_SVHN, lr=0.05, gradalign_lr=0.05, free_epochs=45, free_lr=0.01)


def rows() -> dict[str, TrainConfig]:
    """Each method at each radius from 1/255 to 16/255."""
    rows = {}
    for levels in range(1, 17):
        for label, config in _figure_1(CIFAR10_FIGURE_1, levels).items():
            rows[f"cifar10-preact18-{label}-eps{levels}"] = config
        for label, config in _figure_1(SVHN_FIGURE_1, levels).items():
            lambda_ = preset_lambda("svhn", levels)
            rows[f"svhn-preact18-{label}-eps{levels}"] = (
                replace(config, reg_lambda=lambda_) if label == "gradalign" else config
            )
    rows["svhn-preact18-natural"] = replace(
        GRADALIGN_SVHN, method="natural", lr=0.05, attack_warmup=0
    )
    return rows


def _figure_1(figure: Figure1, levels: int) -> dict[str, TrainConfig]:
    """The figure's methods at a radius in grey levels."""
    eps = Fraction(levels)
    base = replace(
        figure.base, eps=Perturbation(eps), eval_step=Perturbation(eps / 4), lr=figure.lr
    )
    variants: dict[str, dict[str, Any]] = {
        "gradalign": {"lr": figure.gradalign_lr},
        "fgsm": {"method": "fgsm"},
        "fgsm-rs": {"method": "fgsm-rs"},
        "n-fgsm": {"method": "n-fgsm"},
        "elle": {"method": "elle"},
        "pgd2": pgd_fields(2, eps / 2),
        "pgd10": pgd_fields(10, eps / 5),
        "free-m8": {
            "method": "free",
            "m": 8,
            "epochs": figure.free_epochs,
            "lr": figure.free_lr,
            "attack_warmup": 0,
        },
    }
    return {label: replace(base, **changes) for label, changes in variants.items()}
