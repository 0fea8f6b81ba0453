"""YOPO: Zhang et al. 2019, "You Only Propagate Once"."""

from __future__ import annotations

from dataclasses import replace

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.schedule import Schedule
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.recipes.fast import FAST_CIFAR10

# YOPO-5-3: 36 epochs, rate 0.1 * 4 / K and 0.1 * 2 / K.
YOPO_5_3 = replace(
    FAST_CIFAR10,
    method="yopo",
    attack_steps=5,
    yopo_inner=3,
    step_size=Perturbation.parse("2/255"),
    epochs=36,
    batch_size=256,
    schedule=Schedule.parse("at:30,34"),
    eval_attacks=("pgd-20",),
)


def rows() -> dict[str, TrainConfig]:
    """YOPO-5-3 on CIFAR-10 with two networks."""
    return {
        "cifar10-wrn34-yopo-5-3": replace(YOPO_5_3, arch="wrn-34-10", lr=0.08),
        "cifar10-preact18-yopo-5-3": replace(YOPO_5_3, lr=0.04),
    }
