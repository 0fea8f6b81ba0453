"""The accuracy on each set, as its authors measure it."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Mapping
from pathlib import Path

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.index import shortened
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.evaluate import Evaluation
from freeadv_fast.evaluation.images import open_val
from freeadv_fast.evaluation.shifts.corruptions import CORRUPTIONS, SEVERITIES, CorruptedLoader
from freeadv_fast.evaluation.shifts.folders import refuse_unknown
from freeadv_fast.evaluation.shifts.imagenet_c import (
    ALEXNET_ERROR,
    CorruptionErrors,
    describe_gaps,
    find_gaps,
)
from freeadv_fast.evaluation.shifts.records import (
    NOT_PUBLISHED,
    report_imagenet_c,
    report_on_the_fly,
    report_shift,
)
from freeadv_fast.evaluation.shifts.trial import Trial


def evaluate_imagenet_c(
    trial: Trial, root: str | Path, corruptions: Mapping[str, Mapping[int, Path]]
) -> CorruptionErrors:
    """Evaluates what there is of ImageNet-C, writes and prints it."""
    config = already_cut(trial.run.config)
    errors: dict[str, dict[int, float]] = {}
    contents: dict[str, dict[int, tuple[int, int]]] = {}
    unreadable: list[str] = []
    num_images, seconds = 0, 0.0
    for name, folders in corruptions.items():
        for severity, folder in folders.items():
            try:
                loader = trial.folder_loader("--imagenet-c", folder, config)
            except UserError as error:
                unreadable.append(
                    f"{name} {severity} ({str(error).removeprefix('--imagenet-c: ')})"
                )
                continue
            measured = trial.measure(loader, f"{name} {severity}/{SEVERITIES[-1]}")
            errors.setdefault(name, {})[severity] = 1 - measured.clean_accuracy
            contents.setdefault(name, {})[severity] = len(loader.classes), len(loader.index.files)
            del loader
            gc.collect()  # a decoder is a ring of references and holds threads and buffers
            num_images, seconds = max(num_images, measured.num_images), seconds + measured.seconds
    if not errors:
        raise UserError(f"--imagenet-c {root}: unreadable: {shortened(unreadable)}")
    gaps = find_gaps(contents, len(trial.run.classes))
    result = CorruptionErrors(
        errors=errors,
        averaged=tuple(name for name in errors if name in ALEXNET_ERROR and name not in gaps),
        num_in_full_mean=len(ALEXNET_ERROR),
        num_images=num_images,
        seconds=seconds,
        remarks=describe_gaps(errors, gaps, unreadable, len(trial.run.classes)),
    )
    if trial.world.is_main:
        report_imagenet_c(trial, result, str(root))
    return result


def evaluate_imagenet_r(trial: Trial, folder: Path) -> Evaluation:
    """Evaluates ImageNet-R as its authors do: only the logits of its classes compete.

    Source: github.com/hendrycks/imagenet-r, eval.py, ``net(data)[:, imagenet_r_mask]``.
    """
    loader = trial.folder_loader("--imagenet-r", folder, trial.run.config)
    measured = trial.measure(loader, "ImageNet-R", is_restricted=True)
    report_shift(trial, "ImageNet-R", folder, measured, len(loader.classes), len(loader.classes))
    return measured


def evaluate_stylized(trial: Trial, folder: Path) -> Evaluation:
    """Evaluates Stylized-ImageNet; all logits compete.

    Its files are cut to 224 pixels, as ImageNet-C's (its preprocess_imagenet.py: CenterCrop(224)).
    """
    loader = trial.folder_loader("--stylized", folder, already_cut(trial.run.config))
    measured = trial.measure(loader, "Stylized-ImageNet")
    known = len(trial.run.classes)
    report_shift(trial, "Stylized-ImageNet", folder, measured, len(loader.classes), known)
    return measured


def evaluate_on_the_fly(trial: Trial, data: str | None) -> CorruptionErrors:
    """Corrupts validation images in memory and evaluates them."""
    config = dataclasses.replace(trial.run.config, data=data or trial.run.config.data)
    loader = open_val(config, trial.world, trial.num_images)
    refuse_unknown(f"--data {config.data}", loader.classes, trial.run.classes)
    clean = trial.measure(loader, "no corruption")
    errors: dict[str, dict[int, float]] = {name: {} for name in CORRUPTIONS}
    seconds = clean.seconds
    for name, row in errors.items():
        for severity in SEVERITIES:
            corrupted = CorruptedLoader(loader, name, severity, config.seed)
            measured = trial.measure(corrupted, f"{name} {severity}/{SEVERITIES[-1]}")
            row[severity] = 1 - measured.clean_accuracy
            seconds += measured.seconds
    result = CorruptionErrors(
        errors=errors,
        averaged=tuple(CORRUPTIONS),
        num_in_full_mean=len(CORRUPTIONS),
        num_images=clean.num_images,
        seconds=seconds,
        remarks=(NOT_PUBLISHED,),
        clean_error=1 - clean.clean_accuracy,
    )
    if trial.world.is_main:
        report_on_the_fly(trial, result, config.data)
    return result


def already_cut(config: TrainConfig) -> TrainConfig:
    """The preprocessing of sets whose files were resized and cut to 224 pixels by their authors.

    Resizing them to 256 and cutting 224 out again loses the border and measures something else
    (RobustBench, issue 59).
    """
    return dataclasses.replace(config, resize_size=config.image_size)
