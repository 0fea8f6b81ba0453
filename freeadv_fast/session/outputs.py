"""What a finished run leaves for people: the export, pictures and the page.

No run fails for any of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from freeadv_fast.data.build import build_val_loader
from freeadv_fast.data.coco.loader import DetectionLoader
from freeadv_fast.evaluation.class_words import class_words
from freeadv_fast.evaluation.detection.evaluate import DetectionEvaluation
from freeadv_fast.evaluation.evaluate import Evaluation
from freeadv_fast.models.normalize import with_normalizer
from freeadv_fast.models.retinanet import Detector
from freeadv_fast.runs.export.detector import export_detector
from freeadv_fast.runs.export.trained import card_left_alone, export_trained
from freeadv_fast.runs.log import read_log
from freeadv_fast.session.guard import CHECK_ATTACK
from freeadv_fast.session.result import Result
from freeadv_fast.session.run import Run
from freeadv_fast.session.signals import Interrupted

NUM_PICTURED = 6

# What a classifier and what a detector come to.
Measured: TypeAlias = Evaluation | DetectionEvaluation


def attempt(run: Run, failure: str, work: Callable[[], object]) -> None:
    """Does what may fail without the run failing; a line says what is missing then, and why."""
    try:
        work()
    except Interrupted:
        raise
    except Exception as error:  # a font, a disk, a library of somebody else's
        run.log.say(f"{failure}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def write_export(run: Run, result: Result, weights: str) -> None:
    """Writes the network as it is for use elsewhere."""
    folder = run.folder.export_average if weights == "average" else run.folder.export
    classes, record = run.loaders.train.classes, result.record()
    loader = run.loaders.val
    if isinstance(run.model, Detector) and isinstance(loader, DetectionLoader):
        export_detector(
            run.model,
            folder,
            config=run.config,
            classes=classes,
            record=record,
            weights=weights,
            category_ids=loader.annotations.category_ids.tolist(),
        )
    else:
        export_trained(
            run.model, folder, config=run.config, classes=classes, record=record, weights=weights
        )
    if (line := card_left_alone(folder)) is not None:
        run.log.say(line)


def draw(run: Run, measured: Measured) -> None:
    """Draws the training curves and a grid of validation images, attacked or with their boxes."""
    plots = run.folder.plots
    curves, pictures = plots / "training.png", plots / "perturbations.png"
    attempt(run, f"not drawn: {curves}", lambda: draw_curves(run, curves))
    if isinstance(measured, DetectionEvaluation):
        found = measured
        attempt(run, f"not drawn: boxes in {plots}", lambda: draw_objects(run, found))
    elif run.attacks:
        attempt(run, f"not drawn: {pictures}", lambda: draw_pictures(run, pictures))


def draw_curves(run: Run, path: Path) -> None:
    """Draws what log.jsonl holds."""
    # Imported here, where it delays no start.
    from freeadv_fast.evaluation import report

    path.parent.mkdir(exist_ok=True)
    report.plot_training(read_log(run.folder.log), path)


def draw_objects(run: Run, measured: DetectionEvaluation) -> None:
    """Draws what is found on some validation images, and the precision under each corruption."""
    # Imported here, where it delays no start.
    from freeadv_fast.evaluation.pictures.boxes import draw_detection

    assert isinstance(run.model, Detector)  # what else was measured as one
    run.folder.plots.mkdir(exist_ok=True)
    draw_detection(
        run.folder.plots,
        model=run.model,
        loader=run.loaders.val,
        config=run.config,
        evaluation=measured,
        world=run.world,
    )


def draw_pictures(run: Run, path: Path) -> None:
    """Draws some validation images, their perturbations and what the network takes them for."""
    from freeadv_fast.evaluation import report

    config = run.config
    path.parent.mkdir(exist_ok=True)
    alone = dataclasses.replace(run.world, rank=0, size=1)
    batch = next(iter(build_val_loader(config, alone, NUM_PICTURED).epoch(0)))
    report.plot_perturbations(
        with_normalizer(run.model, config.pixel_mean, config.pixel_std),
        batch.images,
        batch.labels,
        class_words(run.loaders.val.classes, config.data),
        next((attack for attack in run.attacks if attack.has_step), CHECK_ATTACK),
        run.evaluation_threat,
        path,
        num_columns=NUM_PICTURED,
    )


def write_report(run: Run) -> None:
    """Writes the page that a person reads, from all that the folder holds by now."""
    # Imported here, where it delays no start.
    from freeadv_fast.evaluation.page import write_page

    run.log.say(f"report: {write_page(run.folder.root)}")
