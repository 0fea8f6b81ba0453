"""A saved run evaluated again: under other attacks, at another eps, on other images."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from freeadv_fast.config.attack import Attack
from freeadv_fast.config.file import load_config
from freeadv_fast.config.presets import CPU_EVAL_ATTACKS, CPU_EVAL_IMAGES
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.data.build import build_val_loader
from freeadv_fast.distributed.world import World, join_world, leave_world
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.evaluate import Evaluation, evaluate
from freeadv_fast.evaluation.report import results_table
from freeadv_fast.runs.environment import versions
from freeadv_fast.runs.log import write_json
from freeadv_fast.runs.saved import SavedRun, load_run


def evaluate_run(
    run_folder: str | Path,
    *,
    data: str | None = None,
    attacks: Sequence[Attack | str] | None = None,
    eps: Perturbation | str | None = None,
    step: Perturbation | str | None = None,
    num_images: int | None = None,
    checkpoint: str = "best",
) -> Evaluation:
    """Evaluates a run's network, writes ``evaluation-*.json`` beside its result and prints a table.

    Under torchrun every rank calls this. result.json is never touched.

    Args:
        run_folder: The run's output folder.
        data: Validation images, as `--data`; the run's own by default.
        attacks: Attacks or their names; the run's own by default.
        eps: Radius, such as ``4/255``; the run's own by default.
        step: Step of the attacks; by default the run's own, in proportion to `eps`.
        num_images: Validation images to attack; as many as the run's by default.
        checkpoint: ``best``, ``last`` or a path.

    Returns:
        The accuracies.

    Raises:
        UserError: no such run or checkpoint, a bad attack, or data of other classes.
    """
    chosen: dict[str, Any] = {
        "data": data,
        "eval_attacks": attacks
        and tuple(str(Attack.parse(attack, "--attacks")) for attack in attacks),
        "eps": None if eps is None else Perturbation.parse(eps),
        "eval_step": None if step is None else Perturbation.parse(step, "--step"),
        "eval_images": num_images,
    }
    if chosen["eps"] is not None and chosen["eps"].levels == 0:
        raise UserError("--eps 0: an attack needs a radius above 0, such as 4/255")
    world = join_world()
    try:
        run = load_run(run_folder, checkpoint)
        if world.device.type != "cuda" and run.config.eval_images is None:
            limit_without_gpu(chosen, world)
        scale_step(chosen, run.config, world)
        chosen = {name: value for name, value in chosen.items() if value is not None}
        run = dataclasses.replace(run, config=dataclasses.replace(run.config, **chosen))
        measured = _measure(run, world)
        if world.is_main:
            path = _write_evaluation(run, measured)
            print(results_table([_table_row(run, measured)]))
            print(f"wrote {path}", flush=True)
        world.barrier()
        return measured
    finally:
        leave_world()


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


def limit_without_gpu(chosen: dict[str, Any], world: World) -> None:
    """Without a GPU, what neither run nor user chose is one PGD-20 on at most 400 images."""
    for name, value in (("eval_attacks", CPU_EVAL_ATTACKS), ("eval_images", CPU_EVAL_IMAGES)):
        if chosen[name] is None:
            chosen[name] = value
            if world.is_main:
                flag = name.replace("eval_attacks", "attacks").replace("_", "-")
                print(f"no GPU: {flag} limited to {value}; --{flag} chooses others", flush=True)


def _measure(run: SavedRun, world: World) -> Evaluation:
    """Evaluates the run's network as its config says."""
    config = run.config
    loader = build_val_loader(config, world, config.eval_images)
    if loader.classes != run.classes:
        raise UserError(
            f"--data {config.data}: its {len(loader.classes)} classes are not the "
            f"{len(run.classes)} that the network was trained on"
        )
    model = run.model.to(world.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return evaluate(
        model,
        loader,
        config.eval_attacks,
        config.evaluation_threat,
        world=world,
        mean=config.pixel_mean,
        std=config.pixel_std,
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
        "seconds": round(measured.seconds, 3),
        "seed": config.seed,
        "versions": versions(),
    }
    write_json(path, record)
    return path


def _table_row(run: SavedRun, measured: Evaluation) -> dict[str, object]:
    """The terminal's line."""
    row: dict[str, object] = {
        "run": run.folder.root.name,
        "checkpoint": run.checkpoint.name,
        "eps": str(run.config.eps),
        "images": measured.num_images,
        "clean": measured.clean_accuracy,
    }
    if measured.clean_top5 is not None:
        row["top-5"] = measured.clean_top5
    return row | dict(measured.robust_accuracy)
