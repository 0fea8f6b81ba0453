"""Recipes: one row of a paper's table each, as a complete config.

Names read data-network-method-m-eps. ``batch_size`` is the paper's global batch: when it is not
typed, the command line divides it among the ranks (`cli.resolve`). Where nothing else is said,
table and figure numbers are those of Shafahi et al. 2019, "Adversarial Training for Free!"; numbers
come from the paper where its text gives them and from the authors' code otherwise.
"""

from __future__ import annotations

import difflib
from dataclasses import replace

from freeadv_fast.config import TrainConfig
from freeadv_fast.errors import UserError
from freeadv_fast.mixing import Mix
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


def _rows() -> dict[str, TrainConfig]:
    """Every recipe by its name."""
    rows = _free_rows() | _advprop_rows()
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
    "digits": {
        "free": "digits-free",
        "natural": "digits-natural",
        "fast-advprop": "digits-fast-advprop",
        "advprop": "digits-advprop",
    },
    "cifar": {
        "free": "cifar10-wrn32-free-m8",
        "natural": "cifar10-wrn32-natural",
        "fast-advprop": "cifar10-preact18-fast-advprop",
        "advprop": "cifar10-preact18-advprop",
    },
    "imagenet": {
        "free": "imagenet-rn50-free-m4-eps4",
        "natural": "imagenet-rn50-natural",
        "fast-advprop": "imagenet-rn50-fast-advprop",
        "advprop": "imagenet-rn50-advprop-pgd5-1x",
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
        + f"; all of them: {', '.join(RECIPES)}"
    )
