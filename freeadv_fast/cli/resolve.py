"""What was not typed: steps that follow the radius, a batch over the ranks, a CPU's limits."""

from __future__ import annotations

import dataclasses
import math
import os

import torch

from freeadv_fast.config.attack import passes
from freeadv_fast.config.presets import CPU_EVAL_ATTACKS, CPU_EVAL_IMAGES
from freeadv_fast.config.read import flag_of
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.recipes.catalogue import RECIPES


def resolve(config: TrainConfig, typed: set[str]) -> tuple[TrainConfig, list[str]]:
    """Settles what depends on the machine and was not typed.

    Args:
        config: Recipe and flags.
        typed: Fields that the user typed; they stay.

    Returns:
        The config to train with, and a remark a line about what was settled.
    """
    remarks = followed_steps(config, typed)
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if config.phases and num_ranks > 1 and "phases" not in typed:
        config = dataclasses.replace(config, phases=config.phases.divided(num_ranks))
        remarks.append(
            f"recipe batches over {num_ranks} ranks: {config.phases} (--phases sets them per rank)"
        )
    elif not config.phases and config.accumulate * num_ranks > 1 and "batch_size" not in typed:
        share = max(2, config.batch_size // (config.accumulate * num_ranks))
        remarks.append(divided_batch(config, num_ranks, share))
        config = with_batch_size(config, share, typed)
    if not torch.cuda.is_available():
        config, limits = cheaper_evaluation(config, typed)
        remarks += limits
    return config, remarks + exceeded_budget(config)


def cheaper_evaluation(config: TrainConfig, typed: set[str]) -> tuple[TrainConfig, list[str]]:
    """The config with what a CPU can evaluate, and a remark a line about what was left out.

    Args:
        config: Recipe and flags.
        typed: Fields that the user typed; they stay.
    """
    remarks = []
    is_attacked, is_detector = config.eps.levels > 0, config.task == "detection"
    is_dear = passes(config.eval_attacks) > passes(CPU_EVAL_ATTACKS)
    if "eval_attacks" not in typed and is_attacked and is_dear:
        full = ",".join(config.eval_attacks)
        config = dataclasses.replace(config, eval_attacks=CPU_EVAL_ATTACKS)
        remarks.append(f"no GPU: evaluating with pgd-20 only; all: --eval-attacks {full}")
    # A detector's clean images are many times as dear as a classifier's.
    is_limited = is_attacked or is_detector
    has_few = (config.eval_images or math.inf) <= CPU_EVAL_IMAGES
    if "eval_images" not in typed and is_limited and not has_few:
        config = dataclasses.replace(config, eval_images=CPU_EVAL_IMAGES)
        remarks.append(
            f"no GPU: {'evaluating' if is_detector else 'attacking'} at most {CPU_EVAL_IMAGES} "
            "validation images; more: --eval-images N, or launch/evaluate.py afterwards"
        )
    return config, remarks


def divided_batch(config: TrainConfig, num_ranks: int, share: int) -> str:
    """A remark on the minibatch that a recipe's global batch leaves to each rank."""
    parts = [f"{num_ranks} ranks"] * (num_ranks > 1)
    parts += [f"{config.accumulate} minibatches"] * (config.accumulate > 1)
    total = share * config.accumulate * num_ranks
    rest = f", {total:,} in all" if total != config.batch_size else ""
    return (
        f"recipe batch {config.batch_size} over {' and '.join(parts)}: {share} per "
        f"{'rank' if config.accumulate == 1 else 'minibatch'}{rest} (--batch-size sets it per rank)"
    )


def exceeded_budget(config: TrainConfig) -> list[str]:
    """A line where one pass over the data, which no run can make less of, costs far more.

    From a quarter on: rounding up to whole passes is in the papers' own numbers, ceil(90 / 4) = 23
    passes at m 4 being 92 epochs, and a short run of a large m still makes its last one whole.
    """
    spent = config.data_epochs * config.cost
    if config.steps is not None or spent < 1.25 * config.epochs:
        return []
    over = "one pass over the data costs"
    if config.data_epochs > 1:
        over = f"{config.data_epochs} passes over the data cost"
    return [
        f"--epochs {config.epochs:g}: {over} {spent:g}, {spent / config.epochs:.2g} times as "
        f"many; --epochs {spent:g} says so"
    ]


def followed_steps(config: TrainConfig, typed: set[str]) -> list[str]:
    """A remark on the steps that followed a typed --eps or --norm; a recipe's fit its own."""
    recipe = RECIPES.get(config.recipe)
    if recipe is None or not {"eps", "norm"} & typed:
        return []
    said = [
        f"{flag_of(name)} {getattr(config, name) or config.threat.step}"
        for name in ("step_size", "eval_step")
        if name not in typed and getattr(config, name) != getattr(recipe, name)
    ]
    return [f"for --eps {config.eps}: {', '.join(said)}"] if said else []


def with_batch_size(config: TrainConfig, size: int, typed: set[str]) -> TrainConfig:
    """The config with another batch; a group that was not typed shrinks with it."""
    group = config.aux_bn_group
    if "aux_bn_group" not in typed and config.is_split:
        group = max(2, min(group, round(config.p_adv * size)))
    return dataclasses.replace(config, batch_size=size, aux_bn_group=group)
