"""What a config refuses: values that cannot be meant, and flags that do not fit each other."""

from __future__ import annotations

import functools
import itertools
import math
import typing
from typing import Literal

from freeadv_fast.config.attack import Attack
from freeadv_fast.config.fields import RunFields
from freeadv_fast.config.method_fields import NEUTRAL, READERS
from freeadv_fast.config.method_names import ALIGNABLE, METHODS, REPLAYING
from freeadv_fast.config.read import field_types, flag_of
from freeadv_fast.config.task_fields import DETECTING, TASK_NEUTRAL, TASK_READERS, has_boxes
from freeadv_fast.config.written import as_typed
from freeadv_fast.errors import UserError, blaming


def check(config: RunFields) -> None:
    """Checks every field on its own and against the others.

    Raises:
        UserError: names the flag and the fix.
    """
    check_method(config)
    check_choices(config)
    check_values(config)
    check_task(config)
    check_combinations(config)
    if config.is_split and not config.phases:
        check_shares(config)
    check_phases(config)


def check_method(config: RunFields) -> None:
    """Checks the method and its replays.

    Raises:
        UserError: names the flag and the fix.
    """
    if config.method not in METHODS:
        raise UserError(f"--method {config.method}: choose one of {', '.join(METHODS)}")
    if config.m < 1:
        raise UserError(f"--m {config.m}: must be at least 1")
    if config.m > 1 and config.method not in REPLAYING:
        raise UserError(f"--m {config.m}: {config.method} does not replay minibatches; use --m 1")


@functools.cache
def choices() -> dict[str, tuple[str, ...]]:
    """The fields that hold one of some words, with these."""
    return {
        name: typing.get_args(hint)
        for name, hint in field_types().items()
        if typing.get_origin(hint) is Literal
    }


def check_choices(config: RunFields) -> None:
    """A field with choices holds one of them; typed flags always do, a config.yaml may not."""
    for name, words in choices().items():
        value = getattr(config, name)
        if value not in words:
            raise UserError(f"{flag_of(name)} {value}: choose one of {', '.join(words)}")


def check_values(config: RunFields) -> None:
    """Checks sizes, counts, numbers and distances, each on its own.

    Raises:
        UserError: names the flag and the fix.
    """
    if config.batch_size < 2:
        raise UserError(f"--batch-size {config.batch_size}: must be at least 2 for batch norm")
    if config.image_size < 8:
        raise UserError(f"--image-size {config.image_size}: must be at least 8 pixels")
    if config.resize_size and config.resize_size < config.image_size:
        raise UserError(
            f"--resize-size {config.resize_size}: smaller than --image-size {config.image_size}; "
            "the central crop would not fit"
        )
    for flag, optional in (
        ("--steps", config.steps),
        ("--max-passes", config.max_passes),
        ("--bn-group", config.bn_group),
        ("--eval-images", config.eval_images),
        ("--guard-images", config.guard_images),
    ):
        if optional is not None and optional < 1:
            raise UserError(f"{flag} {optional}: must be at least 1")
    for flag, number in (
        ("--lr", config.lr),
        ("--epochs", config.epochs),
        ("--noise-weight", config.noise_weight),
        ("--adv-weight", config.adv_weight),
        ("--mix-alpha", 1.0 if config.mix_alpha is None else config.mix_alpha),
    ):
        if not (math.isfinite(number) and number > 0):
            raise UserError(f"{flag} {number:g}: must be a positive number")
    for flag, number in (
        ("--weight-decay", config.weight_decay),
        ("--checkpoint-every", config.checkpoint_every),
        ("--warmup-epochs", config.warmup_epochs),
        ("--dat-clean-weight", config.dat_clean_weight),
        ("--lalr-min", config.lalr_min),
        ("--lalr-max", config.lalr_max),
    ):
        if not (math.isfinite(number) and number >= 0):
            raise UserError(f"{flag} {number:g}: must be zero or a positive number")
    if config.ema is not None and not 0 < config.ema < 1:
        raise UserError(
            f"--ema {config.ema:g}: must be above 0 and below 1, such as 0.9995, or "
            "None for no average"
        )
    if not 0 <= config.momentum < 1:
        raise UserError(f"--momentum {config.momentum:g}: must be at least 0 and below 1")
    if not 0 <= config.label_smoothing < 1:
        raise UserError(
            f"--label-smoothing {config.label_smoothing:g}: must be at least 0 and below 1, "
            "such as 0.1"
        )
    if not 0 <= config.max_bad_fraction < 1:
        raise UserError(
            f"--max-bad-fraction {config.max_bad_fraction:g}: must be at least 0 and below 1"
        )
    for flag, count in (
        ("--workers", config.workers),
        ("--holdout-images", config.holdout_images or 0),
        ("--resize-size", config.resize_size or 0),
        ("--crop-padding", config.crop_padding),
        ("--guard-every", config.guard_every or 0),
        ("--seed", config.seed),
    ):
        if count < 0:
            raise UserError(f"{flag} {count}: cannot be negative")
    if not 0 <= config.unlabelled_fraction < 1:
        raise UserError(
            f"--unlabelled-fraction {config.unlabelled_fraction:g}: must be at least 0 and below 1"
        )
    if config.lalr_min > config.lalr_max:
        raise UserError(
            f"--lalr-min {config.lalr_min:g}: above --lalr-max {config.lalr_max:g}; swap them"
        )
    if config.seed >= 2**63:
        raise UserError(f"--seed {config.seed}: must be below 2^63")
    if config.workers > 512:
        raise UserError(f"--workers {config.workers}: more than 512 on one rank cannot be meant")
    if config.log_every < 1:
        raise UserError(f"--log-every {config.log_every}: must be at least 1")
    for flag, group in (("--bn-group", config.bn_group), ("--aux-bn-group", config.aux_bn_group)):
        if group is not None and group < 2:
            raise UserError(f"{flag} {group}: statistics need at least 2 images")
    for flag, count in (
        ("--attack-steps", config.attack_steps),
        ("--reg-every", config.reg_every),
        ("--yopo-inner", config.yopo_inner),
        ("--accumulate", config.accumulate),
    ):
        if count < 1:
            raise UserError(f"{flag} {count}: must be at least 1")
    for flag, number in (
        ("--attack-warmup", config.attack_warmup),
        ("--noise-radius", config.noise_radius),
        ("--reg-lambda", config.reg_lambda or 0.0),
        ("--trades-beta", config.trades_beta),
        ("--awp", config.awp),
    ):
        if not (math.isfinite(number) and number >= 0):
            raise UserError(f"{flag} {number:g}: must be zero or a positive number")
    for flag, distance in (("--eps", config.eps), ("--step-size", config.step_size or config.eps)):
        if config.norm == "linf" and distance.levels > 255:
            raise UserError(f"{flag} {distance}: larger than the whole pixel range")


def check_task(config: RunFields) -> None:
    """Checks that data, method and evaluation are of the task that the network is for.

    Raises:
        UserError: names the flag and the fix.
    """
    is_detector = config.task == "detection"
    if has_boxes(config.data) and not is_detector:
        raise UserError(
            f"--data {config.data}: holds boxes, and --arch {config.arch} classifies whole images; "
            "use a detector, such as --arch retinanet_resnet50_fpn"
        )
    for name, task in TASK_READERS.items():
        value = getattr(config, name)
        if task != config.task and value not in TASK_NEUTRAL.get(name, (value,)):
            which = "detector" if task == "classification" else "classifier"
            raise UserError(f"{as_typed(name, value)}: not for a {which}; leave it out")
    if is_detector:
        check_detector(config)


def check_detector(config: RunFields) -> None:
    """Checks what a detector can be trained and evaluated with.

    Raises:
        UserError: names the flag and the fix.
    """
    if not has_boxes(config.data):
        raise UserError(
            f"--data {config.data}: holds no boxes, and --arch {config.arch} detects objects; use "
            "--data coco:FOLDER, or a classifier, such as --arch resnet50"
        )
    if config.method not in DETECTING:
        raise UserError(
            f"--method {config.method}: trains classifiers only; a detector takes one of "
            f"{', '.join(DETECTING)}"
        )
    if config.augment not in ("flip", "none"):
        raise UserError(
            f"--augment {config.augment}: cuts images, and boxes with them; use --augment flip or "
            "none for a detector"
        )
    if config.normalization == "per-image":
        raise UserError(
            "--normalization per-image: padding would be part of the image; use "
            "--normalization imagenet for a detector"
        )
    for name in config.eval_attacks:
        attack = Attack.parse(name)
        if attack.loss != "pgd" or attack.restarts > 1:
            raise UserError(
                f"--eval-attacks {name}: a detector is attacked by pgd-STEPS only, such as pgd-10"
            )


def check_combinations(config: RunFields) -> None:
    """Checks what fits the method, and what does not.

    Raises:
        UserError: names the flag and the fix.
    """
    for name, neutral in NEUTRAL.items():
        value = getattr(config, name)
        if value != neutral and config.method not in READERS[name]:
            raise UserError(f"{as_typed(name, value)}: not for {config.method}; leave it out")
    if config.on_collapse == "gradalign" and (
        config.method not in ALIGNABLE or config.norm != "linf"
    ):
        raise UserError(
            f"--on-collapse gradalign: {config.method} with --norm {config.norm} cannot go on as "
            "GradAlign; use --on-collapse restore or stop"
        )
    if config.on_collapse == "gradalign" and config.unlabelled:
        raise UserError(
            "--on-collapse gradalign: GradAlign takes no --unlabelled images; use --on-collapse "
            "restore or stop"
        )
    if config.fuse == "on" and config.is_second_order:
        raise UserError(
            "--fuse on: GradAlign differentiates twice, fused batch norm only once; use --fuse auto"
        )
    if config.graphs == "on" and not config.is_recordable:
        raise UserError(
            "--graphs on: --mix cannot be recorded, the host draws mixtures; use --graphs auto"
        )
    if config.augment == "flip" and config.task == "classification":
        raise UserError(
            "--augment flip: is a detector's; use --augment pad-crop-flip with --crop-padding 0"
        )
    if config.export == "best" and config.holdout_images == 0:
        raise UserError("--export best: no images are held out to choose them; leave it out")
    for name in config.eval_attacks:  # a misspelt one should not be found after training
        Attack.parse(name)
    if config.eps.levels and config.eval_step.levels == 0:
        raise UserError(
            "--eval-step 0: attacks that stand still; give a step above 0, or leave it out"
        )
    if config.steps is None and config.warmup_epochs >= config.epochs:
        raise UserError(
            f"--warmup-epochs {config.warmup_epochs:g}: leaves nothing of --epochs "
            f"{config.epochs:g} to the schedule; warm up for less"
        )
    if config.method == "dat" and config.dat_attack == "fgsm" and config.dat_unlabelled == "kl":
        raise UserError(
            "--dat-unlabelled kl: compares with clean predictions, which --dat-attack fgsm does "
            "not make; use --dat-attack pgd"
        )
    if config.unlabelled and config.update_size - config.num_unlabelled < 1:
        raise UserError(
            f"--unlabelled-fraction {config.unlabelled_fraction:g}: leaves no labelled image in "
            f"{config.update_size}; use a smaller one, or a larger --batch-size"
        )
    if config.unlabelled and config.phases:
        raise UserError("--unlabelled: has images of one size; leave out --phases")
    if config.unlabelled and config.augment == "random-resized-crop":
        raise UserError(
            "--unlabelled: its images are cropped on the device; use --augment pad-crop-flip, "
            "pad-crop or none"
        )
    if config.method != "natural" and config.threat.eps.levels == 0:
        raise UserError(f"--eps 0: {config.method} needs a radius above 0, such as 4/255")
    if config.method != "natural" and config.threat.step.levels == 0:
        raise UserError(f"--step-size 0: {config.method} needs a step above 0, such as 4/255")


def check_shares(config: RunFields) -> None:
    """Checks the two shares of a minibatch.

    Raises:
        UserError: names the flag and the fix.
    """
    if not 0 < config.p_adv < 1:
        raise UserError(f"--p-adv {config.p_adv:g}: must be above 0 and below 1, such as 0.2")
    num_adv, size = config.num_adversarial, config.batch_size
    if not 2 <= num_adv <= size - 2:
        raise UserError(
            f"--p-adv {config.p_adv:g}: {num_adv} adversarial and {size - num_adv} clean of "
            f"--batch-size {size} images; each share needs at least 2"
        )
    if num_adv < config.aux_bn_group:
        raise UserError(
            f"--aux-bn-group {config.aux_bn_group}: larger than the {num_adv} adversarial images "
            f"of --batch-size {size}; use --aux-bn-group {num_adv} or a larger batch"
        )


def check_phases(config: RunFields) -> None:
    """Checks that the phases fill the run, and each one as a run of its own.

    Raises:
        UserError: names the flag and the fix.
    """
    if config.phase_data and len(config.phase_data) != len(config.phases):
        raise UserError(
            f"--phase-data {','.join(config.phase_data)}: {len(config.phase_data)} folders for "
            f"{len(config.phases)} --phases; name one for each"
        )
    if not config.phases:
        return
    if config.steps is not None:
        raise UserError(
            f"--steps {config.steps}: phases are epochs; add --steps None --epochs "
            f"{config.phases[-1].end:g}, or leave out --phases"
        )
    if config.phases[-1].end != config.epochs:
        raise UserError(
            f"--phases {config.phases}: end at epoch {config.phases[-1].end:g}, the run at "
            f"--epochs {config.epochs:g}; they must be the same"
        )
    spans = itertools.pairwise((0, *config.phase_ends))
    for number, (start, end) in enumerate(spans):
        phase = config.phases[number]
        if start == end:
            raise UserError(
                f"--phases {phase}: pays for no pass over the data, which costs {config.cost:g} "
                "epochs; lengthen it or leave it out"
            )
        with blaming(f"--phases {phase}"):
            config.phase_config(number)
