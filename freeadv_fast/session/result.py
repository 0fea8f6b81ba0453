"""What a run came to: result.json, and the network that it is about."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from freeadv_fast.models.own import hand_back
from freeadv_fast.runs.json_file import read_json
from freeadv_fast.runs.log import RunFolder
from freeadv_fast.runs.saved import load_run

# What a result knows beside what result.json holds: a path and a function say nothing elsewhere.
NOT_SAVED = ("folder", "load_model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What result.json holds, and the network; accuracies are fractions, of the last weights.

    Attributes:
        epochs: Data epochs trained. passes: Forward-backward image passes for the weights, over
            all ranks. attack_passes: Those for a perturbation alone.
        train_seconds: Training loop with its checkpoints, over all sessions; no evaluation.
        warm_up_seconds: Those of them before the rate was steady: in each session up to the end of
            the first minibatch, or, where updates are recorded (--graphs), of the first one with a
            recording. Until then algorithms are timed and kernels compiled.
        robust_accuracy: Accuracy under each attack at `eps`, by the attack's name.
        detection: Null, or what a detector comes to, which has no accuracies
            (`DetectionEvaluation.record`).
        attack_parts: Of attacks of several parts (``autoattack``), by name: the accuracy that still
            stands after each part.
        attack_log: Name of AutoAttack's log of these in the folder; null where it was not run.
        evaluation_seconds: Final evaluations of all weights.
        num_eval_images: Validation images that were attacked; they selected nothing.
        num_clean_images: Validation images that the clean accuracies are over.
        holdout_images: Training images held out to choose weights.
        best_epoch: The epoch that they chose, from 0; -1 where they chose none.
        best: Null, or what the weights of that epoch come to: ``epoch``, ``clean_accuracy``,
            ``clean_top5_accuracy``, ``robust_accuracy``, ``attack_parts``, ``attack_log`` as above;
            ``is_last`` where they are the last ones; ``is_better`` where the held-out images say so
            beyond chance. With averaging the choice is among averages (``is_averaged``), and so are
            these last ones.
        average: Null, or what the average of the weights comes to at the end: ``decay``,
            ``clean_accuracy``, ``clean_top5_accuracy``, ``robust_accuracy``, ``attack_parts``,
            ``attack_log`` as above, or a detector's ``detection``.
        gradients: Null, or how they travelled where --compress is on: ``codec``, ``machines``
            (more than 1: within each, float32 is averaged first, whose bytes are not counted),
            ``bytes_sent`` (by rank 0, in all sessions), ``bytes_an_update`` (of those that were
            compressed), ``float32_bytes_an_update`` (what a ring of float32 all-reduces sends).
        decoding: Null, or where the last phase's training images were decoded, where a GPU could as
            well: ``place`` (CPU or GPU), ``threads`` of a rank, ``cpu_images_per_second`` that they
            decode, ``asked_images_per_second`` that a rank's training takes.
        exported: Which weights are in export/, ``last`` or ``best``.
        collapse: Null, or the last collapse that the guard saw: ``detected_at_passes``, ``epoch``
            (with its fraction), ``robust_accuracy_before`` and ``_after`` (held-out images under
            PGD-10), ``action`` (stop, restore or gradalign), ``restores`` (rewinds to a good state
            so far, this one included), ``rewound_to_update``.
        folder: The run's output folder; not in result.json.
        load_model: Makes `model`; not in result.json.
    """

    recipe: str
    method: str
    dataset: str
    arch: str
    m: int
    eps: str
    epochs: float
    passes: int
    attack_passes: int
    train_seconds: float
    warm_up_seconds: float | None = None
    passes_per_second: float
    clean_accuracy: float | None = None
    clean_top5_accuracy: float | None = None
    robust_accuracy: dict[str, float] = dataclasses.field(default_factory=dict)
    detection: dict[str, Any] | None = None
    attack_parts: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    attack_log: str | None = None
    evaluation_seconds: float | None = None
    attack_step: str
    num_eval_images: int
    num_clean_images: int | None = None
    holdout_images: int
    best_epoch: int
    best: dict[str, Any] | None = None
    average: dict[str, Any] | None = None
    gradients: dict[str, Any] | None = None
    decoding: dict[str, Any] | None = None
    exported: str | None = None
    collapse: dict[str, Any] | None
    seed: int
    ranks: int
    precision: str
    device: str
    versions: dict[str, Any]
    folder: Path
    load_model: Callable[[], nn.Module] = dataclasses.field(repr=False, compare=False)

    @functools.cached_property
    def model(self) -> nn.Module:
        """The evaluated network, in eval mode.

        (n, 3, H, W) float32 pixels in [0, 1] to (n, classes) logits, or to a detector's
        `HeadOutputs`, on the device that it was trained on; on the CPU where the run was found
        finished. Children `normalize` and `model`.
        """
        return self.load_model()

    def record(self) -> dict[str, Any]:
        """The fields of result.json."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in NOT_SAVED]
        return {name: getattr(self, name) for name in names}


def read_result(folder: RunFolder, own: nn.Module | None) -> Result:
    """The result of a run that is finished.

    Args:
        folder: The run's folder.
        own: The user's own network where the run trained one; it takes the weights.

    Raises:
        UserError: the network is another one than the run's.
    """
    saved = {field.name for field in dataclasses.fields(Result)} - set(NOT_SAVED)
    record = {name: value for name, value in read_json(folder.result).items() if name in saved}
    # Before there was `best`, a result was that of the weights that held-out images chose.
    weights = "last" if "best" in record else "best"
    if own is not None:
        run = load_run(folder.root, weights, model=own)
        hand_back(run.model, own)
        return Result(**record, folder=folder.root, load_model=lambda: run.network)
    return Result(
        **record, folder=folder.root, load_model=lambda: load_run(folder.root, weights).network
    )
