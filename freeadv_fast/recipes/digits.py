"""The embedded set of real handwritten digits: every method, to be tried without any data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.schedule import Schedule
from freeadv_fast.config.threat import Perturbation

# Digits at 32 px; at eps 32/255 a naturally trained twin falls.
DIGITS = TrainConfig(
    recipe="digits",
    data="digits",
    image_size=32,
    resize_size=32,
    augment="none",
    workers=2,
    holdout_images=100,
    arch="resnet18",
    normalization="none",
    epochs=20,
    batch_size=64,
    lr=0.05,
    schedule=Schedule.parse("linear:0.3"),
    weight_decay=5e-4,
    m=4,
    eps=Perturbation.parse("32/255"),
    checkpoint_every=5,
    log_every=10,
    eval_attacks=("pgd-20",),
    eval_step=Perturbation.parse("4/255"),
)

DIGITS_FAST_ADVPROP = replace(
    DIGITS,
    method="fast-advprop",
    m=1,
    p_adv=0.2,
    batch_size=80,
    bn_group=64,
    aux_bn_group=8,
    eps=Perturbation.parse("8/255"),
    eval_step=Perturbation.parse("2/255"),
)


def rows() -> dict[str, TrainConfig]:
    """The embedded images with each method; none of these is in a paper."""
    rows = {
        "digits-free": DIGITS,
        "digits-natural": replace(DIGITS, method="natural", m=1),
        "digits-fast-advprop": DIGITS_FAST_ADVPROP,
        "digits-advprop": replace(DIGITS_FAST_ADVPROP, method="advprop", batch_size=64),
    }
    # A few epochs, at a radius from which all of these learn so fast
    # (bench/results/cpu/sweep-digits).
    digits = replace(
        DIGITS, eps=Perturbation.parse("16/255"), eval_step=Perturbation.parse("2/255")
    )
    few: dict[str, dict[str, Any]] = {
        "fgsm": {"epochs": 8},
        "fgsm-rs": {"epochs": 8},
        "n-fgsm": {"epochs": 8},
        "gradalign": {"epochs": 5},
        "elle": {"epochs": 5},
        "pgd": {"epochs": 4, "attack_steps": 5},
        "trades": {"epochs": 4, "attack_steps": 5},
        "free-trades": {"epochs": 10, "m": 4},
        "yopo": {"epochs": 4, "attack_steps": 3},
        "dat": {"epochs": 4, "attack_steps": 5},
    }
    for method, changes in few.items():
        own: dict[str, Any] = {"method": method, "m": 1} | changes
        rows[f"digits-{method}"] = replace(digits, **own)
    return rows
