"""What was measured of the weights that are exported: result.json and evaluation-*.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from freeadv_fast.config.attack import ENSEMBLE, Attack
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.errors import UserError
from freeadv_fast.runs.chance import wilson_interval
from freeadv_fast.runs.export.datasets import dataset_of
from freeadv_fast.runs.log import RunFolder, read_json


@dataclasses.dataclass(frozen=True)
class Claim:
    """One accuracy of the exported weights.

    Attributes:
        attack: None of a clean accuracy.
        accuracy: Fraction of the images.
        num_images: On so many.
        step: Of an attack whose steps have a length that was set, such as ``1/255``.
        is_top5: Whether any of five guesses counts.
        parts: Of an attack of several parts, what still stood after each.
        origin: The file that says it.
        seed: Of the attack's random starts.
    """

    attack: Attack | None
    accuracy: float
    num_images: int
    step: str | None = None
    is_top5: bool = False
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    origin: str = "result.json"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Claims:
    """All accuracies of the exported weights, none where nobody measured them.

    Attributes:
        clean: Clean accuracies; top-5 after top-1.
        robust: Under each attack, at the run's radius and norm.
    """

    clean: Sequence[Claim] = ()
    robust: Sequence[Claim] = ()

    @property
    def autoattack(self) -> Claim | None:
        """The one that RobustBench ranks by; None where it was not run."""
        return next((c for c in self.robust if c.attack and c.attack.loss == ENSEMBLE), None)


def read_record(folder: RunFolder) -> dict[str, Any] | None:
    """What result.json says; None where the run has none.

    Raises:
        UserError: it is damaged.
    """
    try:
        return read_json(folder.result)
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{folder.result}: damaged; move it away, or train the run again") from None


def read_claims(
    record: Mapping[str, Any] | None,
    weights: str,
    config: TrainConfig,
    classes: Sequence[str],
    folder: Path | None = None,
) -> Claims:
    """What is known of some weights of a run.

    Args:
        record: What result.json holds; None where there is none.
        weights: ``last``, ``best``, ``average``; of others nothing is known.
        config: The run's.
        classes: Class names in the order of the logits.
        folder: The run's; where it is given, the evaluations that lie there count too, the newest
            of each attack that result.json does not have.
    """
    figures = None if record is None else _figures(record, weights)
    if record is None or figures is None:
        return Claims()
    robust = _robust(figures | {"attack_parts": _parts(record, weights)}, record, "result.json")
    clean = _clean(figures, record)
    for path, evaluation in _evaluations(folder):
        if _is_of(evaluation, weights, clean[0]) and _is_there(evaluation, config, classes):
            known = {str(claim.attack) for claim in robust}
            fresh = _robust(evaluation, evaluation, path.name)
            robust += [claim for claim in fresh if str(claim.attack) not in known]
    return Claims(clean, robust)


def _figures(record: Mapping[str, Any], weights: str) -> dict[str, Any] | None:
    """The accuracies of some weights in result.json; None where it has none of them.

    Version 0.1.0 had no ``best``: its result was that of the weights that held-out images chose,
    where they chose any.
    """
    chosen = "best" not in record and record.get("best_epoch", -1) >= 0
    if weights == ("best" if chosen else "last"):
        return dict(record)
    found = record.get(weights) if weights in ("best", "average") else None
    return dict(found) if found else None


def _parts(record: Mapping[str, Any], weights: str) -> Mapping[str, Any]:
    """What stood after each part of an attack; known of the last weights alone."""
    return record.get("attack_parts") or {} if weights == "last" else {}


def _clean(figures: Mapping[str, Any], record: Mapping[str, Any]) -> list[Claim]:
    """The clean accuracies of result.json."""
    # Version 0.1.0 counted the attacked images.
    num_images = record.get("num_clean_images") or record["num_eval_images"]
    top5 = figures.get("clean_top5_accuracy")
    claims = [Claim(None, figures["clean_accuracy"], num_images)]
    return claims + ([] if top5 is None else [Claim(None, top5, num_images, is_top5=True)])


def _robust(figures: Mapping[str, Any], record: Mapping[str, Any], origin: str) -> list[Claim]:
    """The accuracies under attacks of result.json or of an evaluation."""
    parts = figures.get("attack_parts") or {}
    return [
        Claim(
            attack := Attack.parse(name),
            accuracy,
            record["num_eval_images"],
            step=record["attack_step"] if attack.has_step else None,
            parts=parts.get(name) or {},
            origin=origin,
            seed=record.get("seed", 0),
        )
        for name, accuracy in figures["robust_accuracy"].items()
    ]


def _evaluations(folder: Path | None) -> list[tuple[Path, dict[str, Any]]]:
    """The evaluations in a run's folder, newest first; what cannot be read is left out."""
    found = []
    paths = sorted(folder.glob("evaluation-*.json")) if folder else []
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            found.append((path, dict(json.loads(path.read_text(encoding="utf-8")))))
        except (OSError, ValueError, TypeError):
            continue
    return found


def _is_of(evaluation: Mapping[str, Any], weights: str, clean: Claim) -> bool:
    """Whether an evaluation is of these weights.

    A run that went on keeps the evaluations of what it was: those whose clean accuracy is not the
    result's within chance are left out.
    """
    if Path(str(evaluation.get("checkpoint"))).stem != weights:
        return False
    num_images = evaluation.get("num_clean_images") or evaluation.get("num_eval_images")
    if not num_images or "robust_accuracy" not in evaluation or "attack_step" not in evaluation:
        return False
    low, high = wilson_interval(clean.accuracy, num_images)
    return bool(low <= evaluation.get("clean_accuracy", -1) <= high)


def _is_there(evaluation: Mapping[str, Any], config: TrainConfig, classes: Sequence[str]) -> bool:
    """Whether an evaluation is of the run's images, wherever they lay, and within its ball."""
    ball = {"eps": str(config.eps), "norm": config.norm}
    if any(evaluation.get(key, value) != value for key, value in ball.items()):
        return False
    data = str(evaluation.get("dataset", config.data))
    own = dataset_of(config.data, classes)
    return data == config.data or (own.hub is not None and dataset_of(data, classes) == own)
