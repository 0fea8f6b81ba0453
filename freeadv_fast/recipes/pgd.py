"""PGD training as the rival of free training: Shafahi et al. 2019, tables 1, 2 and 5."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

from freeadv_fast.config.choices import AttackStart
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.recipes.free import CIFAR10, CIFAR100, IMAGENET


def rows() -> dict[str, TrainConfig]:
    """WideResNet 32-10 on CIFAR and ResNet-50 on ImageNet."""
    rows = {"cifar10-wrn32-pgd7": replace(CIFAR10, m=1, **pgd_fields(7, Fraction(2), "uniform"))}
    for steps in (2, 7):
        rows[f"cifar100-wrn32-pgd{steps}"] = replace(
            CIFAR100, m=1, **pgd_fields(steps, Fraction(2), "uniform")
        )
    rows["imagenet-rn50-pgd2-eps4"] = replace(
        IMAGENET, m=1, eps=Perturbation.parse("4/255"), **pgd_fields(2, Fraction(2), "uniform")
    )
    return rows


def pgd_fields(steps: int, step_size: Fraction, start: AttackStart = "zero") -> dict[str, Any]:
    """Fields of PGD training, the step in grey levels."""
    return {
        "method": "pgd",
        "attack_steps": steps,
        "step_size": Perturbation(step_size),
        "attack_start": start,
    }
