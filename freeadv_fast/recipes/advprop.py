"""Fast AdvProp, AdvProp and their natural twins: Mei et al. 2022."""

from __future__ import annotations

from dataclasses import replace

from freeadv_fast.config.choices import Mix
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.schedule import Schedule
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.recipes.free import CIFAR10, IMAGENET

# Tables 1 to 6: 256 clean and 64 adversarial images on 4 GPUs, so groups of 64 and 16; 105 epochs
# of the natural budget; pixels in [-1, 1]; eps 1.
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
# Their AdvProp rows: all 256 images clean and attacked, weights 1 and 1.
ADVPROP = replace(
    FAST_ADVPROP,
    method="advprop",
    attack_steps=5,
    batch_size=256,
    aux_bn_group=64,
    adv_weight=1.0,
)

# Not in the paper: CIFAR-10, to try the methods on.
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


def rows() -> dict[str, TrainConfig]:
    """Tables 1 to 6, and CIFAR-10."""
    rows = {
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
