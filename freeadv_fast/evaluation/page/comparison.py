"""Several runs beside each other: their accuracies, their curves, and what each one cost."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.page import wording
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
from freeadv_fast.evaluation.page.files import RunFiles, is_number, read_run
from freeadv_fast.evaluation.page.render import write
from freeadv_fast.evaluation.page.results import (
    AUTOATTACK,
    CLEAN,
    Accuracy,
    measured_accuracies,
)
from freeadv_fast.evaluation.page.run import attempt
from freeadv_fast.evaluation.page.settings import differences

COMPARISON = "comparison.html"


def write_comparison(run_folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Writes one page that compares finished runs.

    Args:
        run_folders: The runs' output folders, at least two.
        output: The page. Default: ``comparison.html`` in the folder that holds all of them.

    Returns:
        The page, one file that needs no network.

    Raises:
        UserError: a folder without a result, one that is named twice, or a file in the page's place
            that is no page of ours; a `ValueError` with one line.
    """
    refuse_twice(run_folders)
    runs = [read_run(folder) for folder in run_folders]
    path = Path(output).expanduser() if output is not None else place_beside(run_folders)
    if not path.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {path.parent}")
    names = distinct_names(runs)
    notes: dict[str, str] = {}
    accuracies = [
        attempt(name, lambda own=run: measured_accuracies(own), notes) or {}  # type: ignore[misc]
        for name, run in zip(names, runs, strict=True)
    ]
    values: dict[str, Any] = {
        "rows": [
            row(name, run, path.parent, number)
            for number, (name, run) in enumerate(zip(names, runs, strict=True))
        ],
        "columns": [CLEAN, *attacks_of(accuracies)],
        "images": common_images(accuracies),
        "accuracies": accuracies,
        "leader": attempt("leader", lambda: leader(names, runs, accuracies), notes),
        "curves": attempt("curves", lambda: curves(names, runs), notes),
        "costs": attempt("cost", lambda: costs(names, runs, accuracies), notes),
        "differences": attempt(
            "differences", lambda: differences([run.plain for run in runs]), notes
        ),
    }
    write("comparison.html", path, names=names, notes=notes, **values)
    return path


def refuse_twice(run_folders: Sequence[str | Path]) -> None:
    """Keeps a run from being compared with itself.

    Raises:
        UserError: two paths lead to one folder.
    """
    places = [Path(folder).expanduser().resolve() for folder in run_folders]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise UserError(f"RUN {run_folders[number]}: named twice; leave one of them out")


def place_beside(run_folders: Sequence[str | Path]) -> Path:
    """``comparison.html`` in the deepest folder that holds all runs."""
    parents = [str(Path(folder).expanduser().resolve().parent) for folder in run_folders]
    return Path(os.path.commonpath(parents)) / COMPARISON


def distinct_names(runs: Sequence[RunFiles]) -> list[str]:
    """Each run's name; its path where another run has the same one."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else str(run.folder.root)
        for name, run in zip(names, runs, strict=True)
    ]


def row(name: str, run: RunFiles, origin: Path, number: int) -> dict[str, Any]:
    """What the table says of a run beside its accuracies.

    Args:
        name: What it is called on the page. run: Its files.
        origin: Folder of the page, from which links lead.
        number: Its place, which gives it its colour.
    """
    result = run.result
    file = run.folder.report if run.folder.report.is_file() else run.folder.result
    target = Path(os.path.relpath(file.resolve(), origin.resolve()))
    return {
        "name": name,
        "tone": number % NUM_TONES,
        "style": style_of(number),
        "href": target.as_posix(),
        "about": "; ".join(filter(None, description(result))),
        "data": wording.data_title(str(result.get("dataset", ""))),
        "passes": result.get("passes"),
        "attack_passes": result.get("attack_passes"),
        "train_seconds": result.get("train_seconds"),
        "device": str(result.get("device") or ""),
        "collapsed": bool(result.get("collapse")),
    }


def description(result: Mapping[str, Any]) -> Iterator[str | None]:
    """A run in a few words: its method, network, radius and epochs."""
    replays = result.get("m", 1)
    method = wording.method_title(str(result.get("method", "")))
    yield method if replays == 1 else f"{method}, m = {replays}"
    yield str(result.get("arch") or "")
    yield str(result.get("eps") or "")
    yield f"{result['epochs']:g} epochs" if is_number(result.get("epochs")) else None


def style_of(number: int) -> str:
    """A run's lines: dashed in every second round through the colours."""
    return DASHED if number // NUM_TONES % 2 else SOLID


def attacks_of(accuracies: Sequence[Mapping[str, Accuracy]]) -> list[str]:
    """Every attack of any run, AutoAttack last."""
    names = list(dict.fromkeys(name for own in accuracies for name in own if name != CLEAN))
    return sorted(names, key=lambda name: name == AUTOATTACK)


def common_images(accuracies: Sequence[Mapping[str, Accuracy]]) -> dict[str, int | None]:
    """Images of each column of the table, where all runs have as many; None where they do not."""
    found: dict[str, set[int | None]] = {}
    for own in accuracies:
        for name, accuracy in own.items():
            found.setdefault(name, set()).add(accuracy.images)
    counts = {name: numbers.pop() if len(numbers) == 1 else None for name, numbers in found.items()}
    return {CLEAN: None} | counts


@dataclasses.dataclass(frozen=True)
class Leader:
    """The run that keeps most under an attack, and the next one.

    Attributes:
        attack: Its name. eps: Its radius.
        first: The run. accuracy: Its accuracy. second: The next run. next_accuracy: Its accuracy.
        is_apart: Whether their 95 % intervals do not meet.
    """

    attack: str
    eps: str
    first: str
    accuracy: float
    second: str
    next_accuracy: float
    is_apart: bool


def leader(
    names: Sequence[str], runs: Sequence[RunFiles], accuracies: Sequence[Mapping[str, Accuracy]]
) -> Leader | None:
    """Who leads under the attack that most runs met; None where the attack was not the same."""
    keys = ("dataset", "eps", "attack_step")
    if len({(run.norm, *(str(run.result.get(key)) for key in keys)) for run in runs}) > 1:
        return None
    attack = common_attack(accuracies)
    found = [
        (own[attack], name)
        for name, own in zip(names, accuracies, strict=True)
        if attack in own and own[attack].accuracy is not None
    ]
    if len(found) < 2:
        return None
    (best, first), (second_best, second), *_ = sorted(
        found, key=lambda pair: pair[0].accuracy or 0.0, reverse=True
    )
    is_apart = (best.low or 0.0) > (second_best.high or 1.0)
    return Leader(
        attack,
        str(runs[0].result.get("eps")),
        first,
        best.accuracy or 0.0,
        second,
        second_best.accuracy or 0.0,
        is_apart,
    )


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
        drawn("Training loss", "nats", "loss", write=short_number),
    )
    return [chart for chart in charts if chart is not None]


def costs(
    names: Sequence[str],
    runs: Sequence[RunFiles],
    accuracies: Sequence[Mapping[str, Accuracy]],
) -> list[Chart]:
    """Accuracy against cost: in seconds where one device made all runs, and in passes."""
    attack = common_attack(accuracies)

    def drawn(title: str, x_title: str, cost: Callable[[RunFiles], float | None]) -> Chart | None:
        dots = []
        for number, (name, run, own) in enumerate(zip(names, runs, accuracies, strict=True)):
            for kind, is_hollow in ((CLEAN, True), (attack, False)):
                x, y = cost(run), own[kind].accuracy if kind in own else None
                if x is not None and y is not None:
                    words = f"{name}: {y:.1%} {'clean' if is_hollow else f'under {kind}'}"
                    dots.append(Dot(x, y, number % NUM_TONES, words, is_hollow))
        return scatter_chart(title, f"clean and under {attack}", dots, x_title=x_title)

    charts = [drawn("Accuracy against passes", "image passes, the attack's included", all_passes)]
    if len({str(run.result.get("device")) for run in runs}) == 1:
        charts.append(drawn("Accuracy against time", "seconds of training", train_seconds))
    return [chart for chart in charts if chart is not None]


def common_attack(accuracies: Sequence[Mapping[str, Accuracy]]) -> str:
    """The attack that most runs were measured under: of several AutoAttack, or the first."""
    ranks = {
        name: (sum(name in own for own in accuracies), name == AUTOATTACK)
        for name in attacks_of(accuracies)
    }
    return max(ranks, key=lambda name: ranks[name], default="")


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
