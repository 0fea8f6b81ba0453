"""The curves of a run, and what its guard saw."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from freeadv_fast.evaluation.page.curves import (
    DASHED,
    SOLID,
    THIN,
    Chart,
    Curve,
    line_chart,
    readings,
    short_number,
    whole_percent,
)
from freeadv_fast.evaluation.page.files import RunFiles

# Keys of log.jsonl: what they are, their tone, and their line.
ACCURACIES = {
    "train_clean_accuracy": ("training, clean", 0, THIN),
    "train_adversarial_accuracy": ("training, attacked", 1, THIN),
    "holdout_clean_accuracy": ("held out, clean", 0, SOLID),
    "holdout_robust_accuracy": ("held out, attacked", 1, SOLID),
}
GUARD = {
    "guard_robust_accuracy": ("robust accuracy", 1, SOLID),
    "guard_alignment": ("gradient alignment (cosine)", 2, DASHED),
}
ACTIONS = {
    "stop": "training stopped",
    "restore": "went on at half the learning rate",
    "gradalign": "went on with GradAlign",
}


@dataclasses.dataclass(frozen=True)
class Collapse:
    """Robustness that was lost while training went on.

    Attributes:
        passes: Image passes when it was seen. before: The best robust accuracy until then.
        after: What was left of it. answer: What was done. update: The one that was gone back to.
    """

    passes: int
    before: float | None
    after: float | None
    answer: str
    update: int | None


@dataclasses.dataclass(frozen=True)
class GuardHistory:
    """What the guard saw: how many checks, and each collapse."""

    num_checks: int
    collapses: tuple[Collapse, ...]


def guard_history(files: RunFiles) -> GuardHistory | None:
    """The checks of a run and what they found; None where nothing guarded it."""
    num_checks = len(readings(files.log, "guard_robust_accuracy"))
    found = {collapse.passes: collapse for collapse in rewinds(files.log)}
    if isinstance(last := files.result.get("collapse"), dict):
        # The last one is known in full; the log knows that there were others.
        passes = int(last["detected_at_passes"])
        found[passes] = Collapse(
            passes,
            last.get("robust_accuracy_before"),
            last.get("robust_accuracy_after"),
            ACTIONS.get(last.get("action"), str(last.get("action"))),  # type: ignore[arg-type]
            last.get("rewound_to_update"),
        )
    if not num_checks and not found:
        return None
    return GuardHistory(num_checks, tuple(found[passes] for passes in sorted(found)))


def rewinds(log: Sequence[Mapping[str, Any]]) -> list[Collapse]:
    """Where a log goes back: more passes were made, and fewer updates are behind them."""
    found, best = [], 0.0
    for before, after in itertools.pairwise(log):
        robust = robust_accuracy(before)
        if after.get("updates", 0) <= before.get("updates", -1):
            found.append(Collapse(before["passes"], best, robust, "went back and on", None))
        best = max(best, robust or 0.0)
    return found


def robust_accuracy(reading: Mapping[str, Any]) -> float | None:
    """A check's accuracy, the guard's or the selection's at an epoch's end."""
    found: float | None = reading.get("guard_robust_accuracy")
    return reading.get("holdout_robust_accuracy") if found is None else found


def curves_of(files: RunFiles, history: GuardHistory | None) -> list[Chart]:
    """The charts of a run, as far as its log has readings for them."""
    log = files.log
    marks = [collapse.passes for collapse in history.collapses] if history else []
    unit: dict[str, Any] = {"write": whole_percent, "limits": (0.0, 1.0), "marks": marks}
    plain: dict[str, Any] = {"write": short_number, "marks": marks}
    charts = (
        line_chart("Accuracy", "images classified correctly", several(log, named(files)), **unit),
        line_chart("Training loss", loss_unit([files]), one(log, "loss", 0), **plain),
        line_chart("Learning rate", "step size", one(log, "lr", 6), **plain),
        line_chart("Guard", "held-out images", several(log, GUARD), **unit_or_lower(log, marks)),
        line_chart("Speed", "image passes a second", one(log, "passes_per_second", 2), **plain),
    )
    return [chart for chart in charts if chart is not None]


def loss_unit(runs: Sequence[RunFiles]) -> str:
    """What the loss of runs of one task is."""
    return "nats" if runs[0].detection is None else "of classes and boxes, an image"


def named(files: RunFiles) -> dict[str, tuple[str, int, str]]:
    """The accuracies of a log; those on held-out images are the averages' where there are any."""
    if files.result.get("average") is None:
        return ACCURACIES
    return {
        key: (label.replace("held out", "held out, averaged"), tone, style)
        for key, (label, tone, style) in ACCURACIES.items()
    }


def unit_or_lower(log: Sequence[Mapping[str, Any]], marks: Sequence[float]) -> dict[str, Any]:
    """From 0 to 1, and lower where a cosine was negative."""
    lowest = min((value for _, value in readings(log, "guard_alignment")), default=0.0)
    return {"write": short_number, "limits": (min(0.0, lowest), 1.0), "marks": marks}


def several(
    log: Sequence[Mapping[str, Any]], keys: Mapping[str, tuple[str, int, str]]
) -> list[Curve]:
    """A curve for each key that a log has."""
    return [
        Curve(label, readings(log, key), tone, style) for key, (label, tone, style) in keys.items()
    ]


def one(log: Sequence[Mapping[str, Any]], key: str, tone: int) -> list[Curve]:
    """The curve of one key; the chart's title says what it is."""
    return [Curve("", readings(log, key), tone)]
