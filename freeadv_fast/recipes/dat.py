"""DAT: Zhang et al. 2022, "Distributed Adversarial Training to Robustify Deep Neural Networks".

Known from the authors' code (github.com/dat-2022/dat, main.py and README): networks, attacks,
optimizers and their decay, the rate of 0.01, five warm-up epochs on top, milestones, ImageNet's 30
epochs. Its pixels are in [0, 1], its batches are those of a machine, and each GPU's share of one
has batch statistics of its own.

Not known, for the paper's body and its tables were not to be had:
- how many machines a row had. Here six, the "6 x 6" and 512 images a machine that the paper is
  remembered for; with 500,000 unlabelled images twelve, as a reproduction of TU Delft tells.
- CIFAR-10's epochs: 100 after the warm-up, where its milestones end; the code's default is 200.
- SGD's rate without layer-wise rates: the code's default, that of the others.
- which rows were compressed, and DAT-FGSM's share of unlabelled images.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.schedule import Schedule
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.recipes.fast import FAST_CIFAR10
from freeadv_fast.recipes.free import IMAGENET

# Six machines of one GPU, 2,048 images each.
DAT_CIFAR10 = replace(
    FAST_CIFAR10,
    method="dat",
    normalization="none",
    attack_steps=10,
    step_size=Perturbation.parse("2/255"),
    optimizer="lalr",
    lr=0.01,
    weight_decay=1e-4,
    epochs=105,
    warmup_epochs=5,
    schedule=Schedule.parse("at:75,90,95"),
    batch_size=6 * 2048,
    bn_group=2048,
    eval_attacks=("pgd-10", "pgd-50"),
)

# Six machines of six GPUs, 512 images each. The code's older revision drops at 20, 30 and 40.
DAT_IMAGENET = replace(
    IMAGENET,
    method="dat",
    m=1,
    normalization="none",
    attack_steps=4,
    step_size=Perturbation.parse("2/255"),
    optimizer="lalr",
    lr=0.01,
    epochs=35,
    warmup_epochs=5,
    schedule=Schedule.parse("at:20,25,28"),
    batch_size=6 * 512,
    bn_group=86,
    eval_attacks=("pgd-4", "pgd-50"),
    eval_step=Perturbation.parse("2/255"),
)

# With the 500,000 images of Carmon et al. 2019 and their pseudo labels: one of eleven images of a
# minibatch is CIFAR-10's, as where the code draws from all 550,000 alike.
CIFAR10_500K: dict[str, Any] = {
    "unlabelled": "data/ti_500K_pseudo_labeled.pickle",
    "unlabelled_fraction": 10 / 11,
    "batch_size": 12 * 2048,
    # An epoch is a pass over the 50,000 here and over the 550,000 there: eleven of ours.
    "epochs": 11 * 105,
    "warmup_epochs": 11 * 5,
    "schedule": Schedule.parse("at:825,990,1045"),
}


def rows() -> dict[str, TrainConfig]:
    """Both attacks with layer-wise rates, with them and compression, and with SGD instead."""
    rows: dict[str, TrainConfig] = {}
    for name, base, sgd_decay in (
        ("cifar10-preact18", DAT_CIFAR10, 5e-4),
        ("cifar10-500k-preact18", replace(DAT_CIFAR10, **CIFAR10_500K), 5e-4),
        ("imagenet-rn50", DAT_IMAGENET, 1e-4),
    ):
        fgsm = replace(base, dat_attack="fgsm", attack_steps=1, step_size=None)
        for attack, config in (("pgd", base), ("fgsm", fgsm)):
            row = f"{name}-dat-{attack}"
            rows[row] = config
            rows[f"{row}-compressed"] = replace(config, compress="paper")
            rows[f"{row}-sgd"] = replace(config, optimizer="sgd", weight_decay=sgd_decay)
    return rows
