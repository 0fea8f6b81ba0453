"""Charts of several runs: their training, and what they reached against what it cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from freeadv_fast.evaluation.page.cost import THIRDS_FOR_ATTACK, THIRDS_FOR_WEIGHTS
from freeadv_fast.evaluation.page.curves import (
    DASHED,
    NUM_TONES,
    SOLID,
    Chart,
    Curve,
    Dot,
    averaged,
    line_chart,
    readings,
    scatter_chart,
    short_number,
    whole_percent,
)
from freeadv_fast.evaluation.page.files import RunFiles, is_number
from freeadv_fast.evaluation.page.history import loss_unit


def curves(names: Sequence[str], runs: Sequence[RunFiles]) -> list[Chart]:
    """The curves that most runs have, a line a run."""

    def drawn(title: str, unit: str, key: str, **style: Any) -> Chart | None:
        lines = [
            Curve(name, averaged(readings(run.log, key)), number % NUM_TONES, style_of(number))
            for number, (name, run) in enumerate(zip(names, runs, strict=True))
        ]
        return line_chart(title, unit, lines, **style)

    share: dict[str, Any] = {"write": whole_percent, "limits": (0.0, 1.0)}
    charts = (
        drawn("Held out, attacked", "classified correctly", "holdout_robust_accuracy", **share),
        drawn("Held out, clean", "classified correctly", "holdout_clean_accuracy", **share),
        drawn("Training, attacked", "classified correctly", "train_adversarial_accuracy", **share),
        drawn("Training loss", loss_unit(runs), "loss", write=short_number),
    )
    return [chart for chart in charts if chart is not None]


def style_of(number: int) -> str:
    """A run's lines: dashed in every second round through the colours."""
    return DASHED if number // NUM_TONES % 2 else SOLID


def costs(
    noun: str,
    unit: str,
    names: Sequence[str],
    runs: Sequence[RunFiles],
    heights: Sequence[Mapping[str, float]],
    highest: float = 1.0,
) -> list[Chart]:
    """What runs reach against what they cost: in seconds where one device made all, and in passes.

    Args:
        noun: What they reach. unit: On which images.
        names: The runs'. runs: Likewise.
        heights: Of each run the fractions by the images, ``clean`` the hollow one.
        highest: Where the charts end.
    """

    def drawn(title: str, x_title: str, cost: Callable[[RunFiles], float | None]) -> Chart | None:
        dots = []
        for number, (name, run, own) in enumerate(zip(names, runs, heights, strict=True)):
            if (x := cost(run)) is None:
                continue
            for words, y in own.items():
                label = f"{name}: {y:.1%} {words}"
                dots.append(Dot(x, y, number % NUM_TONES, label, words == "clean"))
        return scatter_chart(title, unit, dots, x_title=x_title, highest=highest)

    charts = [drawn(f"{noun} against passes", "image passes, the attack's included", all_passes)]
    if len({str(run.result.get("device")) for run in runs}) == 1:
        charts.append(drawn(f"{noun} against time", "seconds of training", train_seconds))
    return [chart for chart in charts if chart is not None]


def all_passes(run: RunFiles) -> float | None:
    """Image passes for the weights and for attacks, those as the two thirds that they are."""
    passes, attack = run.result.get("passes"), run.result.get("attack_passes") or 0
    if not is_number(passes):
        return None
    return float(passes + attack * THIRDS_FOR_ATTACK / THIRDS_FOR_WEIGHTS)


def train_seconds(run: RunFiles) -> float | None:
    """Seconds of training."""
    seconds = run.result.get("train_seconds")
    return float(seconds) if is_number(seconds) else None
