"""What a run says at its start: what runs on what with which numbers, what it costs, where it goes.

Only what differs from the recipe is listed; the whole config is in the run's folder.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Any

from freeadv_fast.config.attack import doubt_about_steps, parsed
from freeadv_fast.config.budget import Budget
from freeadv_fast.config.method_fields import reads
from freeadv_fast.config.presets import CPU_EVAL_ATTACKS, CPU_EVAL_IMAGES
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.written import as_typed
from freeadv_fast.data.build import Loaders
from freeadv_fast.distributed.compress import GradientCompression
from freeadv_fast.distributed.world import World
from freeadv_fast.evaluation.detection.corruptions import parse_corruptions
from freeadv_fast.models.own import is_own
from freeadv_fast.recipes.catalogue import RECIPES
from freeadv_fast.runs.log import LABEL_WIDTH, labelled
from freeadv_fast.session.cost import Cost, costs_of, until
from freeadv_fast.session.network import has_fused_norms, resolve_precision
from freeadv_fast.step.learner import Learner
from freeadv_fast.step.mixing import DEFAULT_ALPHA

TEXT_WIDTH = 100 - LABEL_WIDTH
NO_BREAK = "\N{NO-BREAK SPACE}"

# Fields that other lines name, or that do not describe the training.
NOT_CHANGES = {"recipe", "data", "phase_data", "output_dir", "resume"}


def start_lines(
    config: TrainConfig,
    world: World,
    phase_loaders: tuple[Loaders, ...],
    budget: Budget,
    learner: Learner,
    machine: dict[str, Any],
) -> list[str]:
    """The start of a run, about ten lines in two columns.

    Args:
        config: The run.
        world: This process among the others.
        phase_loaders: The data of each phase.
        budget: Epochs and updates on these data.
        learner: The network in training.
        machine: What env.json holds.
    """
    counts, *remarks = describe_data(phase_loaders)
    table = {
        "method": [method_text(config)],
        "changed": changed_flags(config, world),
        "data": [f"{config.data}: {counts.removeprefix('data: ')}", *remarks],
        "network": [network_text(config, world, learner)],
        "device": [device_text(world, machine)],
        "batch": [batch_text(config, world.size)],
        "gradients": gradient_lines(config, learner.compression),
        "cost": cost_lines(config, costs_of(config, budget, phase_loaders, world.size)),
        "evaluation": [
            evaluation_text(config, phase_loaders[-1].val.num_images),
            *doubt_about_steps(parsed(config.eval_attacks), config.evaluation_threat),
        ],
        "output": [f"{config.run_folder} (config.yaml holds every field)"],
    }
    return [line for label, lines in table.items() for line in labelled(label, lines)]


def resolved(config: TrainConfig, loaders: Loaders) -> TrainConfig:
    """The config with what its unset fields come to on these data; what stays unset means none."""
    settled: dict[str, Any] = {
        "step_size": config.threat.step,
        "resize_size": config.evaluation_resize,
        "holdout_images": len(loaders.held_out),
        "guard_images": loaders.guard.num_images if loaders.guard else None,
        "eval_images": loaders.val.num_images,
        "reg_lambda": config.term_weight if reads(config.method, "reg_lambda") else None,
        "mix_alpha": DEFAULT_ALPHA.get(config.mix),
    }
    unset = {name: value for name, value in settled.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **unset)


def describe_data(phase_loaders: tuple[Loaders, ...]) -> list[str]:
    """Lines for the user about the data of all phases, none twice."""
    return list(dict.fromkeys(line for loaders in phase_loaders for line in loaders.describe()))


def method_text(config: TrainConfig) -> str:
    """The method with the numbers that it goes by, and the recipe that they come from."""
    words: list[str] = [config.method]
    if config.m > 1 or config.method in ("free", "free-trades"):
        words.append(f"m {config.m}")
    if reads(config.method, "attack_steps"):
        words.append(f"K {config.attack_steps}")
    if config.is_split:
        words.append(f"p_adv {config.p_adv:g}")
    if reads(config.method, "step_size"):
        ball = " in L2" if config.norm == "l2" else ""
        words += [f"eps {config.eps}{ball}", f"step {config.threat.step}"]
    origin = f" (recipe {config.recipe})" if config.recipe in RECIPES else ""
    return ", ".join(words) + origin


def changed_flags(config: TrainConfig, world: World) -> list[str]:
    """The flags that make this run of its recipe, in lines; no line where there are none."""
    if config.recipe not in RECIPES:
        return []
    recipe = RECIPES[config.recipe]
    usual: dict[str, tuple[object, ...]] = {k: (value,) for k, value in vars(recipe).items()}
    usual |= settled_by_machine(recipe, world, config.accumulate)
    if is_own(config.arch):  # no flag asked for it
        usual["arch"] = (config.arch,)
    if config.phases:  # they say both
        usual |= {"image_size": (config.image_size,), "batch_size": (config.batch_size,)}
    flags = [
        as_typed(name, value)
        for name, value in vars(config).items()
        if name not in NOT_CHANGES and value not in usual[name]
    ]
    # No line breaks between a flag and its value.
    text = "  ".join(flag.replace(" ", NO_BREAK) for flag in flags)
    lines = textwrap.wrap(text, TEXT_WIDTH, break_long_words=False, break_on_hyphens=False)
    return [line.replace(NO_BREAK, " ") for line in lines]


def settled_by_machine(
    recipe: TrainConfig, world: World, accumulate: int
) -> dict[str, tuple[object, ...]]:
    """Values that a recipe's fields take here although nobody has typed them."""
    batch_size = max(2, recipe.batch_size // (accumulate * world.size))
    settled: dict[str, tuple[object, ...]] = {
        "precision": (resolve_precision(recipe.precision, world.device),),
        "batch_size": (batch_size,),
        "phases": (recipe.phases.divided(world.size),),
    }
    if recipe.is_split:
        share = max(2, round(recipe.p_adv * batch_size))
        settled["aux_bn_group"] = (min(recipe.aux_bn_group, share),)
    if world.device.type != "cuda":
        settled["eval_attacks"] = (recipe.eval_attacks, CPU_EVAL_ATTACKS)
        settled["eval_images"] = (recipe.eval_images, CPU_EVAL_IMAGES)
    return settled


def network_text(config: TrainConfig, world: World, learner: Learner) -> str:
    """The network, its size, and the ways in which it is made faster."""
    num_parameters = sum(parameter.numel() for parameter in learner.module.parameters())
    words = [config.arch, f"{num_parameters / 1e6:.2f} M parameters", config.precision]
    if has_fused_norms(config, world):
        words.append("fused batch norm")
    if learner.pixels.space_to_depth:
        words.append("space-to-depth stem")
    if world.device.type == "cuda":
        words.append("eager" if learner.runner is None else "CUDA graphs")
    return ", ".join(words)


def device_text(world: World, machine: dict[str, Any]) -> str:
    """The processors of all ranks, which are taken to be like those of this machine."""
    gpus = machine["hardware"]["gpus"]
    if world.device.type == "cuda":
        return f"{world.size} x {gpus[0]}"
    ranks = f"{counted(world.size, 'rank')} of " if world.size > 1 else ""
    return f"{machine['hardware']['cpu']}, {ranks}{counted(machine['threads'], 'thread')}"


def batch_text(config: TrainConfig, num_ranks: int) -> str:
    """The images of an update in each phase, and how they come together."""
    factors = [counted(num_ranks, "rank")]
    if config.accumulate > 1:
        factors.append(f"{config.accumulate} minibatches")
    return ", then ".join(
        f"{phase.update_size * num_ranks:,} = {' x '.join(factors)} x {phase.batch_size}"
        for phase in config.phase_configs
    )


def gradient_lines(config: TrainConfig, compression: GradientCompression | None) -> list[str]:
    """How gradients travel, where they are asked to travel compressed."""
    if config.compress == "none":
        return []
    if compression is None:
        return [f"--compress {config.compress}: nothing to do, one rank sends none"]
    machines = compression.num_machines
    between = f"{machines} machines, float32 within each" if machines > 1 else "ranks"
    return [f"{config.compress} codec, one byte an element between {between}"]


def evaluation_text(config: TrainConfig, num_images: int) -> str:
    """The attacks on the trained network."""
    images = f"on {num_images:,} validation images"
    if config.task == "detection":
        attacks = f", {', '.join(config.eval_attacks)} at eps {config.eps}"
        chosen = parse_corruptions(config.eval_corruptions)
        times = counted(sum(map(len, chosen.values())), "time")
        corruptions = f", {counted(len(chosen), 'corruption')} ({times})" * bool(chosen)
        return f"average precision{attacks * bool(config.eps.levels)}{corruptions} {images}"
    if not config.eps.levels:
        return f"clean accuracy {images}"
    attacks = ", ".join(config.eval_attacks)
    has_step = any(attack.has_step for attack in parsed(config.eval_attacks))
    steps = f" in steps of {config.eval_step}" if has_step else ""
    return f"{attacks} at eps {config.eps}{steps} {images}"


def cost_lines(config: TrainConfig, costs: Sequence[Cost]) -> list[str]:
    """The equation of the cost: for each phase, for all, and where --max-passes ends it."""
    lines = [equation(cost) for cost in costs]
    if config.phases:
        names = [f"phase {phase}:" for phase in config.phases]
        width = max(map(len, names))
        lines = [f"{name:<{width}} {line}" for name, line in zip(names, lines, strict=True)]
        lines.append(f"together {updates_and_passes(costs)}")
    shortened = until(config.max_passes, costs)
    if shortened != costs:
        num_minibatches = sum(cost.minibatches for cost in shortened)
        lines.append(
            f"--max-passes {config.max_passes} ends it after {num_minibatches:,} minibatches = "
            + updates_and_passes(shortened)
        )
    attack = sum(cost.passes.attack for cost in shortened)
    return [*lines, f"and {attack:,} image passes for attacks alone"] if attack else lines


def equation(cost: Cost) -> str:
    """Where a phase's updates and passes come from."""
    minibatches, per_epoch = cost.minibatches, cost.num_batches
    epochs = minibatches / per_epoch
    data = f"{counted(round(epochs), 'data epoch')} x {per_epoch:,} minibatches"
    if cost.config.steps is not None:
        data = f"{minibatches:,} minibatches ({epochs:.2f} data epochs of {per_epoch:,})"
    replays = f" x m {cost.config.m}" if cost.config.m > 1 else ""
    return f"{data}{replays} = {updates_and_passes([cost])}"


def updates_and_passes(costs: Sequence[Cost]) -> str:
    """The sums over some phases."""
    updates = sum(cost.updates for cost in costs)
    passes = sum(cost.passes.weights for cost in costs)
    return f"{updates:,} updates = {passes:,} image passes"


def counted(number: int, noun: str) -> str:
    """A number of things: ``1 rank``, ``4 ranks``."""
    return f"{number:,} {noun}" + "s" * (number != 1)
