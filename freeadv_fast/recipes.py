"""Recipes: one row of a paper's table each, as a complete config.

Names read data-network-method-m-eps. ``batch_size`` is the paper's global batch: when it is not
typed, the command line divides it among the ranks (`cli.resolve`). Where nothing else is said,
table and figure numbers are those of Shafahi et al. 2019, "Adversarial Training for Free!"; numbers
come from the paper where its text gives them and from the authors' code otherwise.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from freeadv_fast.alignment import preset_lambda
from freeadv_fast.config import METHODS, AttackStart, TrainConfig
from freeadv_fast.errors import UserError
from freeadv_fast.mixing import Mix
from freeadv_fast.phases import Phases
from freeadv_fast.schedule import Schedule
from freeadv_fast.threat import Perturbation

# The embedded set, so that everything can be tried without any data. Real handwritten digits at
# 32 px; at eps 32/255 a naturally trained twin falls.
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

# Tables 1 and 2: WideResNet 32-10, 80,000 updates whatever m, eps 8. The authors' TensorFlow code:
# 2 px of padding, per-image standardisation, decay on convolution and linear kernels only.
CIFAR10 = TrainConfig(
    recipe="cifar10",
    data="cifar10:data",
    image_size=32,
    resize_size=32,
    augment="pad-crop-flip",
    crop_padding=2,
    arch="wrn-32-10",
    normalization="per-image",
    steps=80_000,
    batch_size=128,
    lr=0.1,
    schedule=Schedule.parse("steps:40000,60000"),
    weight_decay=2e-4,
    decay="kernels",
    m=8,
    eps=Perturbation.parse("8/255"),
    eval_attacks=("pgd-20", "pgd-100", "cw-100", "pgd-20-10"),
    eval_step=Perturbation.parse("2/255"),
)
CIFAR100 = replace(CIFAR10, data="cifar100:data", eval_attacks=("pgd-20", "pgd-100"))

# Tables 3 to 5: batch 256 on four GPUs, so 64 images share batch-norm statistics; the rate drops
# by 10 each ceil(30/m) epochs; decay on every parameter; attacks of step 1/255.
IMAGENET = TrainConfig(
    recipe="imagenet",
    data="imagenet",
    image_size=224,
    arch="resnet50",
    bn_group=64,
    epochs=90,
    batch_size=256,
    lr=0.1,
    schedule=Schedule.parse("every:30"),
    weight_decay=1e-4,
    m=4,
    eps=Perturbation.parse("2/255"),
    eval_attacks=("pgd-10", "pgd-50", "pgd-100"),
    eval_step=Perturbation.parse("1/255"),
)

# Fast AdvProp (Mei et al. 2022), tables 1 to 6: 256 clean and 64 adversarial images on 4 GPUs, so
# groups of 64 and 16; 105 epochs of the natural budget; pixels in [-1, 1]; eps 1.
FAST_ADVPROP = replace(
    IMAGENET,
    method="fast-advprop",
    m=1,
    p_adv=0.2,
    batch_size=320,
    aux_bn_group=16,
    normalization="symmetric",
    epochs=105,
    schedule=Schedule.parse("at:30,60,90,100"),
    eps=Perturbation.parse("1/255"),
    eval_attacks=("pgd-10",),
)
FAST_ADVPROP_NATURAL = replace(FAST_ADVPROP, method="natural", batch_size=256)
# The AdvProp rows of its tables: all 256 images clean and attacked, weights 1 and 1.
ADVPROP = replace(
    FAST_ADVPROP,
    method="advprop",
    attack_steps=5,
    batch_size=256,
    aux_bn_group=64,
    adv_weight=1.0,
)

# Not in the paper: the embedded images and CIFAR-10, to try the methods on.
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
CIFAR10_FAST_ADVPROP = replace(
    CIFAR10,
    method="fast-advprop",
    m=1,
    p_adv=0.2,
    arch="preact-resnet18",
    normalization="cifar10",
    crop_padding=4,
    steps=None,
    epochs=30,
    batch_size=160,
    bn_group=64,
    schedule=Schedule.parse("linear:0.4"),
    weight_decay=5e-4,
    decay="all",
    eps=Perturbation.parse("1/255"),
    eval_attacks=("pgd-10",),
    eval_step=Perturbation.parse("1/255"),
)

# GradAlign's figure 1 and tables (Andriushchenko and Flammarion 2020): PreActResNet-18 without a
# final batch norm, pixels in [0, 1]; attacks of step eps / 4 with 10 restarts. House numbers are
# not mirrored, and their attack grows over 5 epochs.
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
    """What differs between the methods of GradAlign's figure 1 on one dataset."""

    base: TrainConfig
    lr: float
    gradalign_lr: float
    free_epochs: float
    free_lr: float


CIFAR10_FIGURE_1 = Figure1(
    GRADALIGN_CIFAR10, lr=0.2, gradalign_lr=0.3, free_epochs=96, free_lr=0.04
)
SVHN_FIGURE_1 = Figure1(GRADALIGN_SVHN, lr=0.05, gradalign_lr=0.05, free_epochs=45, free_lr=0.01)

# "Fast is better than free" (Wong et al. 2020), CIFAR-10: cyclic rate, pixels normalised. Their
# code also swings the momentum between 0.8 and 0.9, a default of torch's CyclicLR; we do not.
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

# Wong et al., ImageNet: three phases, the image side growing while the batch shrinks; the rate per
# update; no decay on batch norm; evaluated on the central 288 px of images as they are stored.
# Their text gives steps of 1.25 eps, their code the rest (configs_fast_*.yml, main_fast.py). Four
# GPUs gave their batch norm groups of 128, 56 and 32 images; ours are a rank's minibatch. Their
# copies of 160 and 352 px (data.resize) make it faster: --phase-data /in160,/in352,/imagenet.
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


def _rows() -> dict[str, TrainConfig]:
    """Every recipe by its name."""
    rows = _free_rows() | _advprop_rows() | _family_rows() | _fast_rows()
    return {name: replace(config, recipe=name) for name, config in rows.items()}


def _free_rows() -> dict[str, TrainConfig]:
    """Free training and its natural twins."""
    rows = {
        "digits-free": DIGITS,
        "digits-natural": replace(DIGITS, method="natural", m=1),
    }
    # Tables 1 and 2, free rows; the natural rows; figure 1, natural training with replay.
    for data, base, free_m in (
        ("cifar10", CIFAR10, (2, 4, 8, 10)),
        ("cifar100", CIFAR100, (2, 4, 6, 8, 10)),
    ):
        for m in free_m:
            rows[f"{data}-wrn32-free-m{m}"] = replace(base, m=m)
        for m in (1, 2, 4, 8, 10):
            name = f"{data}-wrn32-natural" + (f"-replay-m{m}" if m > 1 else "")
            rows[name] = replace(base, method="natural", m=m)
    # Section 4's comparison with YOPO: WRN-34-10, batch 256, m = 10.
    rows["cifar10-wrn34-free-m10"] = replace(CIFAR10, arch="wrn-34-10", batch_size=256, m=10)
    # Table 3: ResNet-50 at eps 2.
    rows["imagenet-rn50-natural"] = replace(IMAGENET, method="natural", m=1)
    for m in (2, 4, 6, 8):
        rows[f"imagenet-rn50-free-m{m}-eps2"] = replace(IMAGENET, m=m)
    # Tables 4 and 5: eps 4, three depths.
    for depth in (50, 101, 152):
        rows[f"imagenet-rn{depth}-free-m4-eps4"] = replace(
            IMAGENET, arch=f"resnet{depth}", eps=Perturbation.parse("4/255")
        )
    return rows


def _advprop_rows() -> dict[str, TrainConfig]:
    """Fast AdvProp, AdvProp and their natural twins: Mei et al. 2022, tables 1 to 6."""
    rows = {
        "digits-fast-advprop": DIGITS_FAST_ADVPROP,
        "digits-advprop": replace(DIGITS_FAST_ADVPROP, method="advprop", batch_size=64),
        "cifar10-preact18-fast-advprop": CIFAR10_FAST_ADVPROP,
        "cifar10-preact18-advprop": replace(
            CIFAR10_FAST_ADVPROP, method="advprop", batch_size=128, aux_bn_group=64, adv_weight=1.0
        ),
    }
    # Tables 1 and 2: three depths, against natural training and AdvProp of the same budget.
    for depth in (50, 101, 152):
        name, arch = f"imagenet-rn{depth}", f"resnet{depth}"
        rows[f"{name}-fast-advprop"] = replace(FAST_ADVPROP, arch=arch)
        rows[f"{name}-natural-105ep"] = replace(FAST_ADVPROP_NATURAL, arch=arch)
        rows[f"{name}-advprop-pgd5-1x"] = replace(ADVPROP, arch=arch)
    # AdvProp at its own cost: 105 data epochs are 7 or 3 times the natural budget.
    for steps, cost in ((5, 7), (1, 3)):
        rows[f"imagenet-rn50-advprop-pgd{steps}"] = stretched(
            replace(ADVPROP, attack_steps=steps), cost
        )
    rows["imagenet-rn50-advprop-pgd1-1x"] = replace(ADVPROP, attack_steps=1)
    # Table 3: disjoint shares, the attack's gradients not reused; 105 data epochs at cost 1.2.
    decoupled = replace(
        FAST_ADVPROP, method="advprop", decoupled=True, attack_steps=1, adv_weight=1.0
    )
    rows["imagenet-rn50-advprop-decoupled"] = stretched(decoupled, 1.2)
    # Table 4: the adversarial share, 256 clean images in every minibatch.
    for label, num_adv in (("0.11", 32), ("0.33", 128), ("0.5", 256)):
        rows[f"imagenet-rn50-fast-advprop-padv{label}"] = replace(
            FAST_ADVPROP,
            p_adv=num_adv / (256 + num_adv),
            batch_size=256 + num_adv,
            aux_bn_group=num_adv // 4,
        )
    # Table 5: without re-balancing noisy and adversarial images, without synchronised speed.
    unbalanced = {"noise_weight": 1.0, "adv_weight": 1.0}
    for label, changes in (
        ("no-rebalance", unbalanced),
        ("no-sync", {"sync_speed": False}),
        ("neither", unbalanced | {"sync_speed": False}),
    ):
        rows[f"imagenet-rn50-fast-advprop-{label}"] = replace(FAST_ADVPROP, **changes)
    # Table 6: mixup and CutMix on the clean share.
    mixes: dict[Mix, tuple[float, str]] = {
        "mixup": (180, "every:60"),
        "cutmix": (210, "at:75,150,180"),
    }
    for mix, (epochs, schedule) in mixes.items():
        for base, method in ((FAST_ADVPROP, "fast-advprop"), (FAST_ADVPROP_NATURAL, "natural")):
            rows[f"imagenet-rn50-{method}-{mix}"] = replace(
                base, mix=mix, epochs=epochs, schedule=Schedule.parse(schedule)
            )
    return rows


def _family_rows() -> dict[str, TrainConfig]:
    """The single-step methods and their rivals on CIFAR-10 and the embedded images."""
    rows = {}
    # Not in a paper: a few epochs each of the embedded images, at a radius from which all of them
    # learn so fast (bench/results/cpu/sweep-digits).
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
    }
    for method, changes in few.items():
        own: dict[str, Any] = {"method": method, "m": 1} | changes
        rows[f"digits-{method}"] = replace(digits, **own)
    # GradAlign's figure 1; N-FGSM (de Jorge et al. 2022) on the same network and schedule.
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
    # Wong et al., table 1; Free AT's own rivals, tables 1, 2 and 5.
    for epochs in (15, 30):
        rows[f"cifar10-preact18-fgsm-rs-{epochs}ep"] = replace(FAST_CIFAR10, epochs=epochs)
    rows["cifar10-wrn32-pgd7"] = replace(CIFAR10, m=1, **_pgd(7, Fraction(2), "uniform"))
    for steps in (2, 7):
        rows[f"cifar100-wrn32-pgd{steps}"] = replace(
            CIFAR100, m=1, **_pgd(steps, Fraction(2), "uniform")
        )
    rows["imagenet-rn50-pgd2-eps4"] = replace(
        IMAGENET, m=1, eps=Perturbation.parse("4/255"), **_pgd(2, Fraction(2), "uniform")
    )
    # YOPO-5-3 (Zhang et al. 2019): 36 epochs, rate 0.1 * 4 / K and 0.1 * 2 / K.
    yopo = replace(
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
    rows["cifar10-wrn34-yopo-5-3"] = replace(yopo, arch="wrn-34-10", lr=0.08)
    rows["cifar10-preact18-yopo-5-3"] = replace(yopo, lr=0.04)
    # TRADES (Zhang et al. 2019): WRN-34-10, pixels in [0, 1], 0.031 and 0.007 of their range.
    trades = replace(
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
    rows["cifar10-wrn34-trades"] = trades
    # Not in the paper: TRADES with free training's replay.
    rows["cifar10-wrn34-free-trades-m4"] = replace(
        trades, method="free-trades", m=4, step_size=None
    )
    return rows


def _fast_rows() -> dict[str, TrainConfig]:
    """Wong et al. 2020 on ImageNet."""
    return {
        f"imagenet-rn50-fgsm-rs-eps{levels}": replace(
            FAST_IMAGENET, eps=Perturbation(Fraction(levels))
        )
        for levels in (2, 4)
    }


def _figure_1(figure: Figure1, levels: int) -> dict[str, TrainConfig]:
    """The methods of GradAlign's figure 1 at a radius in grey levels."""
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
        "pgd2": _pgd(2, eps / 2),
        "pgd10": _pgd(10, eps / 5),
        "free-m8": {
            "method": "free",
            "m": 8,
            "epochs": figure.free_epochs,
            "lr": figure.free_lr,
            "attack_warmup": 0,
        },
    }
    return {label: replace(base, **changes) for label, changes in variants.items()}


def _pgd(steps: int, step_size: Fraction, start: AttackStart = "zero") -> dict[str, Any]:
    """Fields of PGD training, the step in grey levels."""
    return {
        "method": "pgd",
        "attack_steps": steps,
        "step_size": Perturbation(step_size),
        "attack_start": start,
    }


def stretched(config: TrainConfig, factor: float) -> TrainConfig:
    """The same recipe on `factor` times the natural budget, schedule included."""
    milestones = tuple(factor * value for value in config.schedule.values)
    return replace(
        config,
        epochs=factor * config.epochs,
        schedule=Schedule(config.schedule.kind, milestones),
    )


RECIPES = _rows()

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
    },
}


def find_recipe(name: str) -> TrainConfig:
    """The recipe of that name.

    Raises:
        UserError: no such recipe; the message names the nearest ones.
    """
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.3)
    raise UserError(
        f"--recipe {name}: no such recipe"
        + (f"; did you mean {' or '.join(near)}?" if near else "")
        + "; python -m freeadv_fast.recipes lists them"
    )


if __name__ == "__main__":
    print("\n".join(RECIPES))
