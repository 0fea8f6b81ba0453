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
from freeadv_fast.runs.json_file import read_json
from freeadv_fast.runs.log import RunFolder
from freeadv_fast.runs.saved import AVERAGE

RESULT = "result.json"


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
        log: Name of AutoAttack's log in the run's folder.
        images: Which images, where a file listed them: its name and the head of its SHA-256.
    """

    attack: Attack | None
    accuracy: float
    num_images: int
    step: str | None = None
    is_top5: bool = False
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    origin: str = RESULT
    seed: int = 0
    log: str | None = None
    images: str | None = None


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
        folder: The run's; where it is given, the evaluations that lie there count too. Of several
            with the same attack in the same steps the one of the most images is taken; among
            equals result.json's, then the newest.
    """
    figures = None if record is None else _figures(record, weights)
    if record is None or figures is None:
        return Claims()
    clean = _clean(figures, record)
    robust = _robust(figures, record, RESULT)
    for path, evaluation in _evaluations(folder):
        if _is_of(evaluation, weights, clean[0]) and _is_there(evaluation, config, classes):
            robust += _robust(evaluation, evaluation, path.name)
    best: dict[tuple[str, str | None], Claim] = {}
    for claim in robust:
        key = str(claim.attack), claim.step
        if key not in best or claim.num_images > best[key].num_images:
            best[key] = claim
    return Claims(clean, list(best.values()))


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


def _clean(figures: Mapping[str, Any], record: Mapping[str, Any]) -> list[Claim]:
    """The clean accuracies of result.json."""
    # Version 0.1.0 counted the attacked images.
    num_images = record.get("num_clean_images") or record["num_eval_images"]
    top5 = figures.get("clean_top5_accuracy")
    claims = [Claim(None, figures["clean_accuracy"], num_images)]
    return claims + ([] if top5 is None else [Claim(None, top5, num_images, is_top5=True)])


def _robust(figures: Mapping[str, Any], record: Mapping[str, Any], origin: str) -> list[Claim]:
    """The accuracies under attacks of result.json or of an evaluation."""
    parts, listed = figures.get("attack_parts") or {}, record.get("image_list")
    return [
        Claim(
            attack := Attack.parse(name),
            accuracy,
            record["num_eval_images"],
            step=record["attack_step"] if attack.has_step else None,
            parts=parts.get(name) or {},
            origin=origin,
            seed=record.get("seed", 0),
            log=None if attack.has_step else figures.get("attack_log"),
            images=_list_name(listed) if listed else None,
        )
        for name, accuracy in figures["robust_accuracy"].items()
    ]


def _list_name(listed: Mapping[str, Any]) -> str:
    """A list of images by which others know it: its file's name and the head of its checksum."""
    return f"{Path(listed['file']).name} (sha256 {listed['sha256'][:16]})"


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
    result's within chance are left out. A checkpoint that is not the run's own goes by its path.
    """
    if evaluation.get("checkpoint") != (weights if weights == AVERAGE else f"{weights}.pt"):
        return False
    num_images = evaluation.get("num_clean_images") or evaluation.get("num_eval_images")
    if not num_images or not evaluation.get("robust_accuracy") or "attack_step" not in evaluation:
        return False
    low, high = wilson_interval(clean.accuracy, num_images)
    return bool(low <= evaluation.get("clean_accuracy", -1) <= high)


def _is_there(evaluation: Mapping[str, Any], config: TrainConfig, classes: Sequence[str]) -> bool:
    """Whether an evaluation is of the run's images, seen as the run sees them, within its ball.

    A list of images is one of RobustBench's, where it ranks by a list: of ImageNet.
    """
    own = {"eps": str(config.eps), "norm": config.norm, "preprocessing": None}
    if any(evaluation.get(key, value) != value for key, value in own.items()):
        return False
    if evaluation.get("image_list") and dataset_of(config.data, classes).robustbench != "imagenet":
        return False
    return _place(str(evaluation.get("dataset", config.data))) == _place(config.data)


def _place(data: str) -> tuple[str, Path]:
    """The kind and the folder of what `--data` was: relative or not, the same folder is one."""
    kind, separator, folder = data.rpartition(":")
    return kind + separator, Path(folder).expanduser().resolve()
