"""TRADES (Zhang et al. 2019), and TRADES with free training's replay."""

from __future__ import annotations

from dataclasses import replace

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.schedule import Schedule
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.recipes.fast import FAST_CIFAR10

# WRN-34-10, pixels in [0, 1], 0.031 and 0.007 of their range.
TRADES = replace(
    FAST_CIFAR10,
    method="trades",
    attack_steps=10,
    trades_beta=6.0,
    arch="wrn-34-10",
    normalization="none",
    eps=Perturbation.parse("0.031"),
    step_size=Perturbation.parse("0.007"),
    epochs=76,
    lr=0.1,
    schedule=Schedule.parse("at:75"),
    weight_decay=2e-4,
    eval_attacks=("pgd-20",),
    eval_step=Perturbation.parse("0.003"),
)


def rows() -> dict[str, TrainConfig]:
    """CIFAR-10; the paper's, and one with free training's replay, which is in no paper."""
    return {
        "cifar10-wrn34-trades": TRADES,
        "cifar10-wrn34-free-trades-m4": replace(TRADES, method="free-trades", m=4, step_size=None),
    }
