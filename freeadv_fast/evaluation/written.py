"""What an evaluation leaves behind: a table on the terminal, and a file of its own."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.view import AS_CONFIGURED, View
from freeadv_fast.evaluation.accuracy import accuracy_table
from freeadv_fast.evaluation.evaluate import Evaluation
from freeadv_fast.runs.environment import versions
from freeadv_fast.runs.json_file import write_json


def print_accuracies(
    name: str, config: TrainConfig, measured: Evaluation, view: View = AS_CONFIGURED
) -> None:
    """The accuracies on the terminal, under what they are of."""
    ball = " in L2" if config.norm == "l2" else ""
    print(f"{name} at eps {config.eps}{ball}")
    for line in describe(view):
        print(line)
    print(accuracy_table(measured, str(config.eval_step)), flush=True)


def describe(view: View) -> list[str]:
    """Which images are seen, and how, where a config does not say it; a line each."""
    lines = []
    if view.image_list is not None:
        images = view.image_list
        lines.append(
            f"images: the {len(images.names):,} of {images.path} (sha256 {images.digest[:16]}...)"
        )
    if view.preprocessing is not None:
        lines.append(f"preprocessing: {view.preprocessing}")
    return lines


def evaluation_name(config: TrainConfig, stem: str, counts: str, seen: str) -> str:
    """The name of an evaluation's file, without its ending.

    Args:
        config: Says attacks and ball.
        stem: What it says of the subject. counts: And of the images.
        seen: What makes images and weights others than the folder's own, in words; empty for none.
    """
    attacks = "_".join(config.eval_attacks) or "clean"
    eps, step = (f"{float(p.levels):g}" for p in (config.eps, config.eval_step))
    name = f"evaluation-{stem}-{attacks}-eps{eps}-step{step}-{counts}"
    return f"{name}-{hashlib.sha256(seen.encode()).hexdigest()[:8]}" if seen else name


def ball_of(config: TrainConfig) -> dict[str, str]:
    """What an evaluation's record says of its attacks' ball and step."""
    return {
        "eps": str(config.eps),
        "norm": config.norm,
        "attack_step": str(config.eval_step),
    }


def write_evaluation(
    folder: Path,
    subject: dict[str, Any],
    config: TrainConfig,
    view: View,
    measured: Evaluation,
    *,
    stem: str,
    origin: str | None,
) -> Path:
    """Writes the accuracies and what they are of, under a name that says both.

    Args:
        folder: Where it is written.
        subject: What was evaluated: the record's first entries.
        config: Says data, attacks and ball. view: Of the images.
        measured: The accuracies.
        stem: What the file's name says of the subject.
        origin: Images and weights that are not the folder's own, in words: they get a name of
            their own.

    Returns:
        The file.
    """
    seen = origin or ""
    if view != AS_CONFIGURED:
        seen += f" {view.preprocessing} {view.image_list and view.image_list.digest}"
    name = evaluation_name(config, stem, f"n{measured.num_images}", seen)
    path = folder / f"{name}.json"
    record = {
        **subject,
        **ball_of(config),
        "clean_accuracy": measured.clean_accuracy,
        "clean_top5_accuracy": measured.clean_top5,
        "robust_accuracy": measured.robust_accuracy,
        "attack_parts": measured.attack_parts,
        "attack_log": measured.log,
        "num_eval_images": measured.num_images,
        "num_clean_images": measured.num_clean_images,
        "preprocessing": view.preprocessing,
        "image_list": None,
        "seconds": round(measured.seconds, 3),
        "seed": config.seed,
        "versions": versions(),
    }
    if view.image_list is not None:
        images = view.image_list
        record["image_list"] = {
            "file": images.path,
            "sha256": images.digest,
            "num_images": len(images.names),
        }
    write_json(path, record)
    return path
