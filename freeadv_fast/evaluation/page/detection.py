"""What a detector came to, as a page shows it: average precisions instead of accuracies."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from freeadv_fast.evaluation.page.files import RunFiles, is_number, reason
from freeadv_fast.evaluation.page.wording import corruption_title

# COCO's numbers that a table has room for, and how they are called there.
COLUMNS = {
    "AP": "AP",
    "AP50": "AP50",
    "AP75": "AP75",
    "APs": "small",
    "APm": "medium",
    "APl": "large",
    "AR100": "recall",
}
# More classes than these are not told one by one.
MOST_CLASSES = 20

Precision = float | None


@dataclasses.dataclass(frozen=True)
class PrecisionRow:
    """COCO's numbers of some images.

    Attributes:
        name: ``clean``, or the attack's name.
        weights: Whose they are, ``last`` or ``averaged``.
        cells: In the order of `COLUMNS`.
    """

    name: str
    weights: str
    cells: tuple[Precision, ...]


@dataclasses.dataclass(frozen=True)
class CorruptionTable:
    """AP under corruption.

    Attributes:
        severities: Titles of the columns.
        rows: Corruption's name, AP at each severity, and their mean.
        mean: Mean of these means. relative: It as a share of the clean AP.
        is_benchmark: Whether this is all of COCO-C, so that `mean` is mPC and `relative` rPC.
        num_pairs: Corruptions at a severity; 75 in COCO-C.
    """

    severities: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Precision, ...], Precision], ...]
    mean: Precision
    relative: Precision
    is_benchmark: bool
    num_pairs: int


@dataclasses.dataclass(frozen=True)
class DetectionTables:
    """What a run's page says instead of accuracies.

    Attributes:
        images: Validation images. precision: AP of the last weights on them.
        strongest: The attack that leaves least, and that AP; None of none.
        rows: COCO's numbers. classes: AP by class, best first; empty where they are many.
        corruptions: Of the last weights; None where there were none. averaged: Of the averaged.
    """

    images: int | None
    precision: Precision
    strongest: tuple[str, float] | None
    rows: tuple[PrecisionRow, ...]
    classes: tuple[tuple[str, Precision], ...]
    corruptions: CorruptionTable | None
    averaged: CorruptionTable | None


@dataclasses.dataclass(frozen=True)
class LaterDetection:
    """A line of an evaluation-*.json of a detector.

    Attributes:
        file: Its name. weights: ``last``. eps: The radius of its attacks. data: What --data named.
        name: ``clean``, or the attack's name. images: How many. precision: AP.
        corrupted: Where corruptions were evaluated; of the clean line.
    """

    file: str
    weights: str
    eps: str
    data: str
    name: str
    images: int | None
    precision: Precision
    corrupted: CorruptionTable | None = None


def detection_tables(files: RunFiles) -> DetectionTables | None:
    """What result.json says of a detector; None of a classifier."""
    last = files.detection
    if last is None:
        return None
    averaged = (files.result.get("average") or {}).get("detection") or {}
    attacked = {name: number(own.get("AP")) for name, own in (last.get("attacks") or {}).items()}
    known = {name: ap for name, ap in attacked.items() if ap is not None}
    weakest = min(known, key=lambda name: known[name], default=None)
    return DetectionTables(
        last.get("num_images"),
        number(last["clean"].get("AP")),
        None if weakest is None else (weakest, known[weakest]),
        (*precision_rows(last, "last"), *precision_rows(averaged, "averaged")),
        class_rows(last.get("per_class") or {}),
        corruption_table(last),
        corruption_table(averaged),
    )


def precision_rows(record: Mapping[str, Any], weights: str) -> Iterator[PrecisionRow]:
    """A line for the clean images and one for each attack; none of an empty record."""
    if not record:
        return
    for name, own in {"clean": record["clean"], **(record.get("attacks") or {})}.items():
        yield PrecisionRow(name, weights, tuple(number(own.get(key)) for key in COLUMNS))


def class_rows(per_class: Mapping[str, Any]) -> tuple[tuple[str, Precision], ...]:
    """AP of each class, best first; none where there are many."""
    if len(per_class) > MOST_CLASSES:
        return ()
    rows = [(name, number(ap)) for name, ap in per_class.items()]
    return tuple(sorted(rows, key=lambda row: -1.0 if row[1] is None else row[1], reverse=True))


def corruption_table(record: Mapping[str, Any]) -> CorruptionTable | None:
    """AP by corruption and severity; None where no corruption was evaluated."""
    corruptions = record.get("corruptions") or {}
    if not corruptions:
        return None
    severities = tuple(sorted({key for row in corruptions.values() for key in row}))
    return CorruptionTable(
        severities,
        tuple(
            (corruption_title(name), tuple(number(row.get(s)) for s in severities), mean_of(row))
            for name, row in corruptions.items()
        ),
        number(record.get("mean_corrupted")),
        number(record.get("relative")),
        bool(record.get("is_benchmark")),
        sum(map(len, corruptions.values())),
    )


def mean_of(row: Mapping[str, Any]) -> Precision:
    """The mean over the severities of a corruption; None where one of them is not known."""
    values = [number(value) for value in row.values()]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def number(value: Any) -> Precision:
    """A number of a JSON file; None of anything else."""
    return float(value) if is_number(value) else None


def later_detections(files: RunFiles) -> list[LaterDetection]:
    """The lines of each evaluation-*.json of a detector; one that is damaged is told."""
    lines = []
    for file, record in files.evaluations.items():
        try:
            if record.get("detection") is not None:
                lines += list(lines_of(file, record))
        except Exception as error:  # a user's file holds anything at all
            files.damage[file] = reason(error)
    return lines


def lines_of(file: str, record: Mapping[str, Any]) -> Iterator[LaterDetection]:
    """The lines of one evaluation: its clean images, and its attacks."""
    found = record["detection"]
    weights = str(record.get("checkpoint")).removesuffix(".pt")
    eps, data = str(record.get("eps")), str(record.get("dataset"))
    for row in precision_rows(found, weights):
        yield LaterDetection(
            file,
            weights,
            eps,
            data,
            row.name,
            found.get("num_images"),
            row.cells[0],
            corruption_table(found) if row.name == "clean" else None,
        )
