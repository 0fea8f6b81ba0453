"""Detectors beside each other: average precisions, corruptions, and what each one cost."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.page.detection import Precision, mean_of, number
from freeadv_fast.evaluation.page.files import RunFiles
from freeadv_fast.evaluation.page.pictures import Picture, embed
from freeadv_fast.evaluation.page.wording import corruption_title

# COCO's numbers that stand beside each other.
CLEAN = ("AP", "AP50", "AP75")


@dataclasses.dataclass(frozen=True)
class Precisions:
    """What one run came to.

    Attributes:
        clean: Those of `CLEAN`. attacked: AP under each attack that any run met, in their order.
        mean: Mean AP under corruption. relative: It as a share of the clean AP.
        is_benchmark: Whether it is under all of COCO-C, so that `mean` is mPC and `relative` rPC.
        images: Validation images. corrupted: Corruption's name to the mean AP over its severities.
    """

    clean: tuple[Precision, ...]
    attacked: tuple[Precision, ...]
    mean: Precision
    relative: Precision
    is_benchmark: bool
    images: int | None
    corrupted: Mapping[str, Precision]


@dataclasses.dataclass(frozen=True)
class CorruptedLeader:
    """The run that keeps most under corruption, and the next one.

    Attributes:
        first: The run. mean: Its mean AP under corruption. clean: Its clean AP.
        second: The next run. next_mean: Its mean AP under corruption.
    """

    first: str
    mean: float
    clean: Precision
    second: str
    next_mean: float


def refuse_mixture(runs: Sequence[RunFiles]) -> None:
    """Keeps detectors from being compared with classifiers.

    Raises:
        UserError: names one of each.
    """
    detectors = [run for run in runs if run.detection is not None]
    classifiers = [run for run in runs if run.detection is None]
    if detectors and classifiers:
        raise UserError(
            f"RUN {detectors[0].folder.root}: of a detector, and {classifiers[0].folder.root} of a "
            "classifier; compare runs of one kind"
        )


def attacks_of(runs: Sequence[RunFiles]) -> list[str]:
    """Every attack of any run."""
    return list(dict.fromkeys(name for run in runs for name in found(run).get("attacks") or {}))


def precisions_of(run: RunFiles, attacks: Sequence[str]) -> Precisions:
    """What a run's result.json says, beside `attacks` that other runs met."""
    record = found(run)
    attacked = record.get("attacks") or {}
    return Precisions(
        tuple(number(record["clean"].get(key)) for key in CLEAN),
        tuple(number((attacked.get(name) or {}).get("AP")) for name in attacks),
        number(record.get("mean_corrupted")),
        number(record.get("relative")),
        bool(record.get("is_benchmark")),
        record.get("num_images"),
        {name: mean_of(row) for name, row in (record.get("corruptions") or {}).items()},
    )


def found(run: RunFiles) -> dict[str, Any]:
    """What a detector came to; empty of a classifier."""
    return run.detection or {}


def heights(precisions: Sequence[Precisions | None]) -> list[dict[str, float]]:
    """What is drawn against the cost: AP on clean images and under corruption."""
    return [
        {
            words: value
            for words, value in (("clean", own.clean[0]), ("under corruption", own.mean))
            if value is not None
        }
        if own is not None
        else {}
        for own in precisions
    ]


def is_same_test(runs: Sequence[RunFiles]) -> bool:
    """Whether all runs were evaluated on as many images of one set, corrupted alike."""
    seen = {
        (
            str(run.result.get("dataset")),
            found(run).get("num_images"),
            tuple((name, *row) for name, row in (found(run).get("corruptions") or {}).items()),
        )
        for run in runs
    }
    return len(seen) == 1


def is_benchmark(precisions: Sequence[Precisions | None]) -> bool:
    """Whether no run was evaluated on a part of COCO-C."""
    return all(own.is_benchmark for own in precisions if own is not None and own.corrupted)


def leader(
    names: Sequence[str], runs: Sequence[RunFiles], precisions: Sequence[Precisions | None]
) -> CorruptedLeader | None:
    """Who leads under corruption; None where the corruptions or images were not the same."""
    known = [
        (own.mean, name, own.clean[0])
        for name, own in zip(names, precisions, strict=True)
        if own is not None and own.mean is not None
    ]
    if len(known) < len(runs) or not is_same_test(runs):
        return None
    (mean, first, clean), (next_mean, second, _), *_ = sorted(known, key=lambda own: -own[0])
    return CorruptedLeader(first, mean, clean, second, next_mean)


def corrupted_rows(precisions: Sequence[Precisions | None]) -> list[tuple[str, list[Precision]]]:
    """A line for each corruption of any run, with each run's mean AP."""
    names = dict.fromkeys(name for own in precisions if own is not None for name in own.corrupted)
    return [
        (
            corruption_title(name),
            [None if own is None else own.corrupted.get(name) for own in precisions],
        )
        for name in names
    ]


def corruption_picture(names: Sequence[str], runs: Sequence[RunFiles]) -> Picture | None:
    """The runs' precision under the corruptions that all of them met; None of none."""
    records = dict(zip(names, map(found, runs), strict=True))
    common = set.intersection(*(set(own.get("corruptions") or {}) for own in records.values()))
    if not common:
        return None
    # Imported here, where it delays no other page.
    from freeadv_fast.evaluation.pictures.corruptions import plot_corruptions

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corruptions.png"
        plot_corruptions(records, path)
        (picture,) = embed([path], {})
    return picture
