"""What users have evaluated: a saved run, under other attacks or on other images, or a network."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from freeadv_fast.config.attack import Attack, doubt_about_steps, parsed, passes
from freeadv_fast.config.file import load_config, remarks_on
from freeadv_fast.config.presets import CPU_EVAL_ATTACKS, CPU_EVAL_IMAGES
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.data.loader import Loader
from freeadv_fast.distributed.world import World, joined_world
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.accuracy import accuracy_table
from freeadv_fast.evaluation.evaluate import Evaluation, eval_mode
from freeadv_fast.evaluation.evaluate import evaluate as measure
from freeadv_fast.evaluation.images import open_val, whole_val_loader
from freeadv_fast.models.own import check_logits
from freeadv_fast.runs.environment import versions
from freeadv_fast.runs.log import write_json
from freeadv_fast.runs.saved import SavedRun, load_run

# Data whose images have one size and are not resized.
SMALL_DATA, SMALL_SIDE = ("cifar10", "cifar100", "svhn", "digits"), 32
# What a network is attacked with of which no run says it.
NETWORK_ATTACKS = ("pgd-50",)


def evaluate(
    subject: str | Path | SavedRun | nn.Module,
    *,
    data: str | None = None,
    attacks: Sequence[Attack | str] | str | None = None,
    eps: Perturbation | str | float | None = None,
    step: Perturbation | str | float | None = None,
    num_images: int | None = None,
    checkpoint: str = "last",
    model: nn.Module | None = None,
    image_size: int | None = None,
) -> Evaluation:
    """Measures clean accuracy and the accuracy under each attack, and prints a table.

    Of a run it also writes ``evaluation-*.json`` beside the run's result, which it never touches.
    fp32 without TF32, in eval mode. Under torchrun every rank calls this. The clean accuracy is
    over all validation images, however few are attacked; without a GPU only those of at most 64
    pixels a side are all read, of larger ones the attacked.

    Args:
        subject: A run's folder, what `load_run` returned, or any network of (n, 3, H, W) float32
            pixels in [0, 1] to (n, classes) logits, such as `load_export` returns; the network is
            left in its mode, on the device of the evaluation.
        data: Validation images, as `--data`: ``/imagenet``, ``cifar10:FOLDER``, ``digits``.
            Default: the run's own; a network needs it.
        attacks: Such as ``["pgd-50", "cw-50"]`` or ``"pgd-50,cw-50"``; by default the run's own,
            and PGD-50 of a network. Without a GPU the default is at most PGD-20 on at most 400
            images.
        eps: Radius, such as ``"4/255"`` or ``4 / 255``; the run's own by default.
        step: Step of the attacks; by default the run's own in proportion to `eps`, and eps / 4 for
            a network.
        num_images: Validation images to attack, evenly spaced; by default as the run, or all.
        checkpoint: Of a run's folder: ``last`` (the run's result), ``best`` (by held-out images)
            or a path.
        model: Your own network where the run trained one, as for `load_run`.
        image_size: Side of the images that a network takes, in pixels. Default: 32 for CIFAR, SVHN
            and digits, 224 for folders.

    Returns:
        The accuracies, fractions.

    Raises:
        UserError: no such run, checkpoint or data, a bad attack, or data of other classes; a
            `ValueError` with one line.
    """
    chosen: dict[str, Any] = {
        "data": data,
        "eval_attacks": None if attacks is None else _names(attacks),
        "eps": None if eps is None else Perturbation.parse(eps),
        "eval_step": None if step is None else Perturbation.parse(step, "--step"),
        "eval_images": num_images,
    }
    if chosen["eps"] is not None and chosen["eps"].levels == 0:
        raise UserError("--eps 0: an attack needs a radius above 0, such as 4/255")
    if chosen["eval_step"] is not None and chosen["eval_step"].levels == 0:
        raise UserError(
            "--step 0: an attack that stands still; give a step above 0, or leave it out"
        )
    with joined_world() as world:
        if isinstance(subject, nn.Module):
            return _evaluate_network(subject, chosen, image_size, world)
        if not isinstance(subject, SavedRun):
            subject = load_run(subject, checkpoint, model=model)
        return _evaluate_run(subject, chosen, world)


def _names(attacks: Sequence[Attack | str] | str) -> tuple[str, ...]:
    """Attacks by name; a misspelt one is refused before anything is loaded."""
    listed = attacks.split(",") if isinstance(attacks, str) else attacks
    return tuple(str(Attack.parse(attack, "--attacks")) for attack in listed)


def _evaluate_run(run: SavedRun, chosen: dict[str, Any], world: World) -> Evaluation:
    """`evaluate` of a run, with what the user chose instead of the run's own."""
    if world.is_main and chosen["eval_step"] is None:
        for line in remarks_on(run.folder.config):
            print(line, flush=True)
    if world.device.type != "cuda" and run.config.eval_images is None:
        limit_without_gpu(chosen, run.config.eval_attacks, world)
    scale_step(chosen, run.config, world)
    chosen = {name: value for name, value in chosen.items() if value is not None}
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, **chosen))
    measured = _measure(run, world)
    if world.is_main:
        path = _write_evaluation(run, measured)
        print_accuracies(f"{run.folder.root.name}, {run.checkpoint.name}", run.config, measured)
        print(f"wrote {path}", flush=True)
    world.barrier()
    return measured


def _evaluate_network(
    network: nn.Module, chosen: dict[str, Any], image_size: int | None, world: World
) -> Evaluation:
    """`evaluate` of a network that no run of ours describes."""
    name = type(network).__name__
    for field in ("data", "eps"):
        if chosen[field] is None:
            raise UserError(f"--{field}: evaluating a network needs it; give {field}=...")
    if world.device.type != "cuda":
        limit_without_gpu(chosen, NETWORK_ATTACKS, world)
    step = chosen["eval_step"] or Perturbation(chosen["eps"].levels / 4)
    is_small = chosen["data"].partition(":")[0] in SMALL_DATA
    side = image_size or (SMALL_SIDE if is_small else TrainConfig.image_size)
    config = TrainConfig(
        method="natural",
        m=1,
        data=chosen["data"],
        eps=chosen["eps"],
        eval_step=step,
        eval_attacks=chosen["eval_attacks"] or NETWORK_ATTACKS,
        eval_images=chosen["eval_images"],
        image_size=side,
        resize_size=side if is_small else None,
        augment="none",
        normalization="none",
    )
    loader = open_val(config, world, config.eval_images)
    network.to(world.device)
    with eval_mode(network):
        check_logits(network, name, len(loader.classes), side, world.device)
    measured = _measure_on(network, loader, config, world)
    if world.is_main:
        print_accuracies(name, config, measured)
    return measured


def scale_step(chosen: dict[str, Any], config: TrainConfig, world: World) -> None:
    """The run's step in proportion to another radius: 20 of its own may not cross a larger ball."""
    eps = chosen["eps"]
    if eps is None or chosen["eval_step"] is not None or not config.eps.levels:
        return
    step = Perturbation(config.eval_step.levels * eps.levels / config.eps.levels)
    if step != config.eval_step:
        chosen["eval_step"] = step
        if world.is_main:
            print(f"for --eps {eps}: --step {step}", flush=True)


def limit_without_gpu(chosen: dict[str, Any], attacks: Sequence[str], world: World) -> None:
    """Without a GPU, what nobody chose is one PGD-20 on at most 400 images.

    Args:
        chosen: What the user chose; completed.
        attacks: Those that are made otherwise; they stay where they cost no more.
        world: Its rank 0 says what was limited.
    """
    said = []
    if chosen["eval_attacks"] is None and passes(attacks) > passes(CPU_EVAL_ATTACKS):
        chosen["eval_attacks"] = CPU_EVAL_ATTACKS
        named, full = ",".join(CPU_EVAL_ATTACKS), ",".join(attacks)
        said.append(f"no GPU: {named} instead of {full}; --attacks chooses others")
    if chosen["eval_images"] is None:
        chosen["eval_images"] = CPU_EVAL_IMAGES
        said.append(f"no GPU: attacking at most {CPU_EVAL_IMAGES} images; more: --eval-images N")
    if world.is_main and said:
        print("\n".join(said), flush=True)


def _measure(run: SavedRun, world: World) -> Evaluation:
    """Evaluates the run's network as its config says."""
    config = run.config
    loader = open_val(config, world, config.eval_images)
    if loader.classes != run.classes:
        raise UserError(
            f"--data {config.data}: its {len(loader.classes)} classes are not the "
            f"{len(run.classes)} that the network was trained on"
        )
    model = run.model.to(world.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _measure_on(model, loader, config, world)


def _measure_on(model: nn.Module, loader: Loader, config: TrainConfig, world: World) -> Evaluation:
    """Evaluates a network of the config's normalised images."""
    if world.is_main:
        attacks = parsed(config.eval_attacks)
        for line in doubt_about_steps(attacks, config.evaluation_threat, "--step"):
            print(line, flush=True)
    return measure(
        model,
        loader,
        config.eval_attacks,
        config.evaluation_threat,
        world=world,
        mean=config.pixel_mean,
        std=config.pixel_std,
        clean_loader=world.together(lambda: whole_val_loader(config, world)),
        seed=config.seed,
    )


def _write_evaluation(run: SavedRun, measured: Evaluation) -> Path:
    """Writes the accuracies and what they are of, under a name that says both."""
    config = run.config
    attacks = "_".join(config.eval_attacks) or "clean"
    eps, step = (f"{float(p.levels):g}" for p in (config.eps, config.eval_step))
    name = f"evaluation-{run.checkpoint.stem}-{attacks}-eps{eps}-step{step}"
    name += f"-n{measured.num_images}"
    # Other images or weights than the run's own get a name of their own.
    own = load_config(run.folder.config).data, run.folder.checkpoints
    if (config.data, run.checkpoint.parent) != own:
        origin = f"{config.data} {run.checkpoint.resolve()}"
        name += f"-{hashlib.sha256(origin.encode()).hexdigest()[:8]}"
    path = run.folder.root / f"{name}.json"
    record = {
        "run": run.folder.root.name,
        "checkpoint": run.checkpoint.name,
        "method": config.method,
        "dataset": config.data,
        "arch": config.arch,
        "eps": str(config.eps),
        "attack_step": str(config.eval_step),
        "clean_accuracy": measured.clean_accuracy,
        "clean_top5_accuracy": measured.clean_top5,
        "robust_accuracy": measured.robust_accuracy,
        "num_eval_images": measured.num_images,
        "num_clean_images": measured.num_clean_images,
        "seconds": round(measured.seconds, 3),
        "seed": config.seed,
        "versions": versions(),
    }
    write_json(path, record)
    return path


def print_accuracies(name: str, config: TrainConfig, measured: Evaluation) -> None:
    """The accuracies on the terminal, under what they are of."""
    ball = " in L2" if config.norm == "l2" else ""
    print(f"{name} at eps {config.eps}{ball}")
    print(accuracy_table(measured, str(config.eval_step)), flush=True)
