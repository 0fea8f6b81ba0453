"""A finished run's detector, evaluated again: a table, and a file of its own beside the result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from freeadv_fast.config.attack import doubt_about_steps, parsed
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.coco.loader import DetectionLoader
from freeadv_fast.distributed.world import World
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.autoattack.ledger import forget
from freeadv_fast.evaluation.detection.attack import parse_attacks
from freeadv_fast.evaluation.detection.corruptions import parse_corruptions
from freeadv_fast.evaluation.detection.evaluate import DetectionEvaluation, evaluate_detector
from freeadv_fast.evaluation.images import open_val, other_classes
from freeadv_fast.evaluation.written import ball_of, evaluation_name
from freeadv_fast.runs.environment import versions
from freeadv_fast.runs.json_file import write_json
from freeadv_fast.runs.saved import SavedRun


def refuse_unfit(config: TrainConfig, chosen: Mapping[str, Any]) -> None:
    """Refuses what a detector's evaluation does not take, before the config says it less well.

    Args:
        config: The run's. chosen: Fields that the user chose instead; None where not.

    Raises:
        UserError: an attack or a corruption.
    """
    attacks = parsed(chosen["eval_attacks"] or ())
    parse_attacks(attacks, config.evaluation_threat)
    parse_corruptions(chosen["eval_corruptions"] or (), "--corruptions")


def evaluate_run(
    run: SavedRun, folder: Path, subject: Mapping[str, Any], origin: str | None, world: World
) -> DetectionEvaluation:
    """Evaluates the run's detector as its config says, prints a table and writes a file.

    Args:
        run: With the config that is asked for.
        folder: Where it is written, and where a killed evaluation finds what it had.
        subject: What is evaluated: the file's first entries.
        origin: Images and weights that are not the folder's own, in words.
        world: The ranks.

    Raises:
        UserError: the images have no boxes, or others' classes; and as `evaluate_detector`.
    """
    config = run.config
    loader = open_val(config, world, config.eval_images)
    if not isinstance(loader, DetectionLoader):
        raise UserError(f"--data {config.data}: holds no boxes; use --data coco:FOLDER")
    if loader.classes != run.classes:
        raise UserError(other_classes(config.data, loader, len(run.classes)))
    if world.is_main:
        attacks, threat = parsed(config.eval_attacks), config.evaluation_threat
        for line in doubt_about_steps(attacks, threat, "--step"):
            print(line, flush=True)
    measured = evaluate_detector(
        run.detector.to(world.device),
        loader,
        config.eval_attacks,
        config.evaluation_threat,
        parse_corruptions(config.eval_corruptions, "--corruptions"),
        world=world,
        mean=config.pixel_mean,
        std=config.pixel_std,
        seed=config.seed,
        folder=folder,
    )
    if world.is_main:
        stem = Path(run.weights).stem
        path = write_precision(folder, subject, config, measured, stem=stem, origin=origin)
        forget(measured.ledgers)
        print(f"{run.folder.root.name}, {run.weights} at eps {config.eps}")
        print("\n".join([*measured.lines(str(config.eval_step)), f"wrote {path}"]), flush=True)
    world.barrier()
    return measured


def write_precision(
    folder: Path,
    subject: Mapping[str, Any],
    config: TrainConfig,
    measured: DetectionEvaluation,
    *,
    stem: str,
    origin: str | None,
) -> Path:
    """Writes the numbers and what they are of, under a name that says both.

    Args:
        folder: Where it is written.
        subject: What was evaluated: the record's first entries.
        config: Says data, attacks and ball.
        measured: The numbers.
        stem: What the file's name says of the subject.
        origin: Images and weights that are not the folder's own, in words: they get a name of
            their own, and so do corruptions.

    Returns:
        The file.
    """
    counts = f"n{measured.num_images}"
    if measured.corruptions:
        counts += f"-corruptions{len(measured.corruptions)}"
    seen = " ".join(filter(None, (origin, *config.eval_corruptions)))
    path = folder / f"{evaluation_name(config, stem, counts, seen)}.json"
    record = {
        **subject,
        **ball_of(config),
        "clean_accuracy": None,
        "robust_accuracy": {},
        "detection": measured.record(),
        "num_eval_images": measured.num_images,
        "seconds": round(measured.seconds, 3),
        "seed": config.seed,
        "versions": versions(),
    }
    write_json(path, record)
    return path
