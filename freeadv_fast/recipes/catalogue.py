"""Recipes: one row of a paper's table each, as a complete config.

A module a paper; names read data-network-method-m-eps. ``batch_size`` is the paper's global batch:
when it is not typed, the command line divides it among the ranks (`cli.resolve`).
"""

from __future__ import annotations

import difflib

from freeadv_fast.config.method_names import METHODS
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.errors import UserError
from freeadv_fast.recipes import (
    advprop,
    dat,
    detection,
    digits,
    fast,
    fastat,
    free,
    free_detection,
    gradalign,
    pgd,
    shapes,
    speedrun,
    trades,
    yopo,
)

# Each paper's recipes by name.
PAPERS: dict[str, dict[str, TrainConfig]] = {
    title: {name: config.as_recipe(name) for name, config in paper.rows().items()}
    for title, paper in {
        "The embedded digits, in no paper": digits,
        "The embedded shapes, in no paper": shapes,
        "The least time to robustness, in no paper": speedrun,
        "Adversarial Training for Free! (Shafahi et al. 2019)": free,
        "PGD training (Madry et al. 2018), as Shafahi et al. 2019 report it": pgd,
        "Fast AdvProp (Mei et al. 2022)": advprop,
        "Fast AdvProp (Mei et al. 2022), detection": detection,
        "Free training of detectors (after Li et al. 2023)": free_detection,
        "GradAlign (Andriushchenko and Flammarion 2020), figure 1": gradalign,
        "Fast is better than free (Wong et al. 2020)": fast,
        "You Only Propagate Once (Zhang et al. 2019)": yopo,
        "TRADES (Zhang et al. 2019)": trades,
        "Distributed Adversarial Training (Zhang et al. 2022)": dat,
        "FastAT Benchmark (Pan and Yao 2026)": fastat,
    }.items()
}
RECIPES = {name: config for rows in PAPERS.values() for name, config in rows.items()}

# The recipe that --data alone selects, by the dataset of the script and the method.
DEFAULTS: dict[str, dict[str, str]] = {
    "digits": {method: f"digits-{method}" for method in METHODS},
    "cifar": {
        "free": "cifar10-wrn32-free-m8",
        "natural": "cifar10-wrn32-natural",
        "fast-advprop": "cifar10-preact18-fast-advprop",
        "advprop": "cifar10-preact18-advprop",
        "fgsm": "cifar10-preact18-fgsm-eps8",
        "fgsm-rs": "cifar10-preact18-fgsm-rs-30ep",
        "n-fgsm": "cifar10-preact18-n-fgsm-eps8",
        "gradalign": "cifar10-preact18-gradalign-eps8",
        "elle": "cifar10-preact18-elle-eps8",
        "pgd": "cifar10-preact18-pgd10-eps8",
        "trades": "cifar10-wrn34-trades",
        "free-trades": "cifar10-wrn34-free-trades-m4",
        "yopo": "cifar10-preact18-yopo-5-3",
        "dat": "cifar10-preact18-dat-pgd",
    },
    "svhn": {
        "free": "svhn-preact18-free-m8-eps8",
        "natural": "svhn-preact18-natural",
        "fgsm": "svhn-preact18-fgsm-eps8",
        "fgsm-rs": "svhn-preact18-fgsm-rs-eps8",
        "n-fgsm": "svhn-preact18-n-fgsm-eps8",
        "gradalign": "svhn-preact18-gradalign-eps8",
        "elle": "svhn-preact18-elle-eps8",
        "pgd": "svhn-preact18-pgd10-eps8",
    },
    "imagenet": {
        "free": "imagenet-rn50-free-m4-eps4",
        "natural": "imagenet-rn50-natural",
        "fast-advprop": "imagenet-rn50-fast-advprop",
        "advprop": "imagenet-rn50-advprop-pgd5-1x",
        "fgsm-rs": "imagenet-rn50-fgsm-rs-eps4",
        "pgd": "imagenet-rn50-pgd2-eps4",
        "dat": "imagenet-rn50-dat-pgd",
    },
    "coco": {
        "fast-advprop": "coco-retinanet50-fast-advprop",
        "natural": "coco-retinanet50-natural-2x",
        "free": "coco-retinanet50-free-m4-eps4",
    },
    "shapes": {
        method: f"shapes-{method}"
        for method in ("natural", "fast-advprop", "free", "fgsm-rs", "pgd")
    },
}


def find_recipe(name: str, flag: str = "--recipe") -> TrainConfig:
    """The recipe of that name.

    Args:
        name: What the user wrote.
        flag: The flag to name when there is none.

    Raises:
        UserError: no such recipe; the message names the nearest ones.
    """
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.3)
    raise UserError(
        f"{flag} {name}: no such recipe"
        + (f"; did you mean {' or '.join(near)}?" if near else "")
        + "; python -m freeadv_fast.recipes lists them"
    )
