"""What is left of each set: a table, a chart and a JSON file beside the run's result."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from freeadv_fast.config.file import load_config
from freeadv_fast.evaluation.evaluate import Evaluation
from freeadv_fast.evaluation.shifts.corruptions import CORRUPTIONS
from freeadv_fast.evaluation.shifts.imagenet_c import (
    IMAGENET_C,
    CorruptionErrors,
    alexnet_normalized,
    describe_means,
)
from freeadv_fast.evaluation.shifts.report import corruption_table, plot_corruptions
from freeadv_fast.evaluation.shifts.trial import Trial
from freeadv_fast.runs.environment import versions
from freeadv_fast.runs.json_file import write_json

ON_THE_FLY = {
    group: tuple(name for name, corruption in CORRUPTIONS.items() if corruption.group == group)
    for group in IMAGENET_C
}

NOT_PUBLISHED = "on-the-fly, not ImageNet-C; do not compare with published numbers"


def report_imagenet_c(trial: Trial, measured: CorruptionErrors, folder: str) -> None:
    """Prints ImageNet-C's table and means, writes them and the chart."""
    means, lines = describe_means(measured)
    normalized = alexnet_normalized(measured)
    record = {"folder": folder, **means, "alexnet_normalized_errors": normalized}
    stem = _file_stem(trial, "imagenet-c", folder)
    title = f"{trial.run.folder.root.name} on ImageNet-C"
    _report_corruptions(trial, stem, title, IMAGENET_C, measured, record, normalized, lines)


def report_on_the_fly(trial: Trial, measured: CorruptionErrors, data: str) -> None:
    """Prints the table of the corruptions made here, writes it and the chart."""
    lines = [
        f"error without corruption: {measured.clean_error:.1%}",
        f"mean error, unnormalised: {measured.mean_error:.1%}",
    ]
    record = {
        "dataset": data,
        "clean_error": measured.clean_error,
        "on_the_fly_mean_error_unnormalized": measured.mean_error,
    }
    own = load_config(trial.run.folder.config).data
    stem = _file_stem(trial, "on-the-fly", "" if data == own else data)
    title = f"{trial.run.folder.root.name} on corruptions made on the fly"
    _report_corruptions(trial, stem, title, ON_THE_FLY, measured, record, None, lines)


def _report_corruptions(
    trial: Trial,
    stem: str,
    title: str,
    groups: Mapping[str, Sequence[str]],
    measured: CorruptionErrors,
    record: dict[str, Any],
    normalized: Mapping[str, float] | None,
    lines: Sequence[str],
) -> None:
    """Writes JSON and chart under `stem`, prints the table and the lines below it."""
    record |= {
        "corruptions_in_mean": measured.averaged,
        "corruption_errors": measured.corruption_errors,
        "errors": measured.errors,
        "remarks": measured.remarks,
    }
    title += f", {measured.num_images:,} images a severity"
    path = _write(trial, stem, record, measured.num_images, measured.seconds)
    plots = trial.run.folder.plots
    plots.mkdir(exist_ok=True)
    drawn = {
        group: {name: measured.errors[name] for name in names if name in measured.errors}
        for group, names in groups.items()
    }
    references = {"mean": measured.mean_error, "no corruption": measured.clean_error}
    starred = set(measured.errors) - set(measured.averaged)
    notes = ["* not in the mean"] if starred else []
    if not measured.is_full:
        count = f"{len(measured.averaged)} of {measured.num_in_full_mean}"
        notes.append(f"mean over {count} corruptions, not the published one")
    if NOT_PUBLISHED in measured.remarks:
        notes.append(NOT_PUBLISHED)
    plot_corruptions(
        {group: errors for group, errors in drawn.items() if errors},
        plots / f"{stem}.png",
        title=title,
        references={text: error for text, error in references.items() if error is not None},
        starred=starred,
        footnote="; ".join(notes),
    )
    table = corruption_table(measured.errors, normalized)
    print(f"{title}\n\n{table}\n", *measured.remarks, *lines, sep="\n")
    print(f"wrote {path} and {plots / stem}.png", flush=True)


def report_shift(
    trial: Trial,
    name: str,
    folder: Path,
    measured: Evaluation,
    num_classes: int,
    num_competing: int,
) -> None:
    """Prints and writes the accuracy on a set that is shifted as a whole.

    Args:
        trial: Gives run and ranks.
        name: The set's.
        folder: Where it lies.
        measured: Its accuracy.
        num_classes: Classes of its images.
        num_competing: Logits that an answer is the largest of.
    """
    if not trial.world.is_main:
        return
    record = {
        "folder": str(folder),
        "accuracy": measured.clean_accuracy,
        "num_classes": num_classes,
        "num_competing_logits": num_competing,
    }
    stem = _file_stem(trial, name.lower(), str(folder))
    path = _write(trial, stem, record, measured.num_images, measured.seconds)
    print(
        f"{name}: accuracy {measured.clean_accuracy:.1%} on {measured.num_images:,} images of "
        f"{num_classes:,} of the network's {len(trial.run.classes):,} classes; "
        f"the answer is the largest of {num_competing:,} logits\nwrote {path}",
        flush=True,
    )


def _file_stem(trial: Trial, name: str, source: str) -> str:
    """A name that says set, weights and number, and tells other images and weights apart.

    Args:
        trial: Gives weights and number.
        name: The set's.
        source: Where the images are from; empty for the run's own.
    """
    checkpoint = trial.run.checkpoint
    count = "all" if trial.num_images is None else trial.num_images
    stem = f"robustness-{Path(trial.run.weights).stem}-{name}-n{count}"
    origin = [str(Path(source).resolve())] if source else []
    if not trial.run.is_own:
        origin.append(str(checkpoint.resolve()))
    if origin:
        stem += f"-{hashlib.sha256(' '.join(origin).encode()).hexdigest()[:8]}"
    return stem


def _write(
    trial: Trial, stem: str, record: Mapping[str, Any], num_images: int, seconds: float
) -> Path:
    """Writes a set's record, with what it was measured on, beside the run's result."""
    config = trial.run.config
    path = trial.run.folder.root / f"{stem}.json"
    common = {
        "run": trial.run.folder.root.name,
        "checkpoint": trial.run.weights,
        "method": config.method,
        "arch": config.arch,
        "image_size": config.image_size,
        "num_eval_images": num_images,
        "seconds": round(seconds, 3),
        "seed": config.seed,
        "versions": versions(),
    }
    write_json(path, common | dict(record))
    return path
