"""Several runs beside each other: their accuracies, their curves, and what each one cost."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.page import detection_comparison as detectors
from freeadv_fast.evaluation.page import wording
from freeadv_fast.evaluation.page.comparison_charts import costs, curves, style_of
from freeadv_fast.evaluation.page.curves import NUM_TONES
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
        UserError: a folder without a result, one that is named twice, detectors among classifiers,
            or a file in the page's place that is no page of ours; a `ValueError` with one line.
    """
    refuse_twice(run_folders)
    runs = [read_run(folder) for folder in run_folders]
    detectors.refuse_mixture(runs)
    path = Path(output).expanduser() if output is not None else place_beside(run_folders)
    if not path.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {path.parent}")
    names = distinct_names(runs)
    notes: dict[str, str] = {}
    values: dict[str, Any] = {
        "rows": [
            row(name, run, path.parent, number)
            for number, (name, run) in enumerate(zip(names, runs, strict=True))
        ],
        "curves": attempt("curves", lambda: curves(names, runs), notes),
        "differences": attempt(
            "differences", lambda: differences([run.plain for run in runs]), notes
        ),
    }
    is_detection = runs[0].detection is not None
    values |= (of_detectors if is_detection else of_classifiers)(names, runs, notes)
    template = "comparison_detection.html" if is_detection else "comparison.html"
    write(template, path, names=names, notes=notes, **values)
    return path


def of_classifiers(
    names: Sequence[str], runs: Sequence[RunFiles], notes: dict[str, str]
) -> dict[str, Any]:
    """What a page says of classifiers alone; `notes` takes why something is left out."""
    accuracies = [
        attempt(name, lambda own=run: measured_accuracies(own), notes) or {}  # type: ignore[misc]
        for name, run in zip(names, runs, strict=True)
    ]
    attack = common_attack(accuracies)
    heights = [heights_of(own, attack) for own in accuracies]
    unit = f"clean and under {attack}"
    return {
        "columns": [CLEAN, *attacks_of(accuracies)],
        "images": common_images(accuracies),
        "accuracies": accuracies,
        "leader": attempt("leader", lambda: leader(names, runs, accuracies), notes),
        "costs": attempt("cost", lambda: costs("Accuracy", unit, names, runs, heights), notes),
    }


def of_detectors(
    names: Sequence[str], runs: Sequence[RunFiles], notes: dict[str, str]
) -> dict[str, Any]:
    """What a page says of detectors alone; `notes` takes why something is left out."""
    attacks = attempt("attacks", lambda: detectors.attacks_of(runs), notes) or []
    precisions = [
        attempt(name, lambda own=run: detectors.precisions_of(own, attacks), notes)  # type: ignore[misc]
        for name, run in zip(names, runs, strict=True)
    ]
    heights = detectors.heights(precisions)
    unit = "clean and under corruption"
    highest = max((value for own in heights for value in own.values()), default=1.0)
    return {
        "attacks": attacks,
        "precisions": precisions,
        "corruptions": detectors.corrupted_rows(precisions),
        "picture": attempt("picture", lambda: detectors.corruption_picture(names, runs), notes),
        "is_benchmark": detectors.is_benchmark(precisions),
        "is_same_test": attempt("same", lambda: detectors.is_same_test(runs), notes),
        "leader": attempt("leader", lambda: detectors.leader(names, runs, precisions), notes),
        "costs": attempt("cost", lambda: costs("AP", unit, names, runs, heights, highest), notes),
    }


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


def heights_of(accuracies: Mapping[str, Accuracy], attack: str) -> dict[str, float]:
    """What is drawn of a run against its cost: its accuracy ``clean`` and under an attack."""
    kinds = {"clean": CLEAN, f"under {attack}": attack}
    found = {words: accuracies.get(kind) for words, kind in kinds.items()}
    return {
        words: own.accuracy
        for words, own in found.items()
        if own is not None and own.accuracy is not None
    }


def common_attack(accuracies: Sequence[Mapping[str, Accuracy]]) -> str:
    """The attack that most runs were measured under: of several AutoAttack, or the first."""
    ranks = {
        name: (sum(name in own for own in accuracies), name == AUTOATTACK)
        for name in attacks_of(accuracies)
    }
    return max(ranks, key=lambda name: ranks[name], default="")
