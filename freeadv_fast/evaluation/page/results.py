"""The tables of a page: accuracies at the end, later evaluations, shifted images, the audit."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.accuracy import attack_columns
from freeadv_fast.evaluation.page.files import RunFiles, is_number, reason
from freeadv_fast.evaluation.page.wording import BALLS, DASH, data_title
from freeadv_fast.recipes.catalogue import PAPERS
from freeadv_fast.recipes.papers import REPORTED, Reported
from freeadv_fast.runs.chance import wilson_interval

# What a result's clean accuracies are called among those under attack.
OWN_EVALUATION = re.compile(r"-n\d+\.json$")
CLEAN, TOP5 = "none", "none, top-5"
AUTOATTACK = "autoattack"

# What robustness-*.json hold, and what it is.
SHIFTED = {
    "accuracy": "accuracy",
    "mean_corruption_error_unnormalized": "mean error, unnormalised",
    "mce_alexnet_normalized": "mCE, normalised by AlexNet",
    "partial_mean_corruption_error_unnormalized": "mean error of some corruptions",
    "partial_mce_alexnet_normalized": "the same, normalised by AlexNet",
    "on_the_fly_mean_error_unnormalized": "mean error, made on the fly",
    "clean_error": "error without corruption",
}


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """One accuracy, with all that makes the attack weak or strong.

    Attributes:
        attack: Its name; `CLEAN` for none.
        steps: Sign steps a restart; None where there are none or where they are the attack's own.
        step: Their length; a dash where there are none. restarts: Random starts.
        images: Images that it is over; None where that is not known.
        accuracy: A fraction; None where only others have one.
        low: Lower end of the 95 % interval. high: Upper end.
        others: The same of other weights and of the paper, in the order of `FinalTable.titles`.
    """

    attack: str
    steps: int | None
    step: str
    restarts: int | None
    images: int | None
    accuracy: float | None
    low: float | None = None
    high: float | None = None
    others: tuple[float | None, ...] = ()


@dataclasses.dataclass(frozen=True)
class FinalTable:
    """What the weights are worth.

    Attributes:
        weights: Whose `Accuracy.accuracy` it is: ``last``.
        titles: Whose `Accuracy.others` are.
        rows: A line the clean images, a line an attack.
        place: Where the paper reports its row; empty where there is none.
        paper: The paper's title.
    """

    weights: str
    titles: tuple[str, ...]
    rows: tuple[Accuracy, ...]
    place: str = ""
    paper: str = ""


@dataclasses.dataclass(frozen=True)
class LaterEvaluation:
    """A line of an evaluation-*.json.

    Attributes:
        file: Its name. weights: ``last``. eps: The radius. data: What --data named.
        seen: Which images, and how they were seen, where it was not as the run sees them.
        clean: The clean accuracy. row: That under the attack.
        parts: What still stood after each part of the attack.
    """

    file: str
    weights: str
    eps: str
    data: str
    seen: str
    clean: float | None
    row: Accuracy
    parts: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Shift:
    """What is left on a set of shifted images.

    Attributes:
        file: Its robustness-*.json.
        numbers: What was measured, in words, and the fraction.
        remarks: What keeps the numbers from being the published ones.
    """

    file: str
    name: str
    weights: str
    images: int | None
    numbers: tuple[tuple[str, float], ...]
    remarks: tuple[str, ...]


def one_accuracy(
    attack: str, step: str | None, accuracy: float | None, images: Any, *others: float | None
) -> Accuracy:
    """A line of a table.

    Args:
        attack: The attack's name.
        step: Its step; None for clean images.
        accuracy: A fraction or None.
        images: How many; anything but a positive number leaves the interval out.
        others: The same of other weights.
    """
    columns: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # an attack of another version
        columns |= attack_columns(attack, step)
    images = images if is_number(images) and images > 0 else None
    low = high = None
    if accuracy is not None and images:
        low, high = wilson_interval(accuracy, images)
    return Accuracy(
        attack,
        columns.get("steps"),
        str(columns.get("step", "-")).replace("-", DASH),
        columns.get("restarts"),
        images,
        accuracy,
        low,
        high,
        others,
    )


def final_table(files: RunFiles) -> FinalTable:
    """The accuracies of result.json, those of other weights and the paper's beside them."""
    result = files.result
    columns = [own_accuracies(result), *other_weights(result).values()]
    titles = list(other_weights(result))
    paper, reported = reported_row(str(result.get("recipe")))
    if reported is not None:
        columns.append(in_fractions(reported))
        titles.append("paper")
    step, images = result.get("attack_step"), result.get("num_eval_images")
    rows = []
    for attack in dict.fromkeys(name for column in columns for name in column):
        is_clean = attack in (CLEAN, TOP5)
        accuracy, *others = (column.get(attack) for column in columns)
        of = result.get("num_clean_images") or images if is_clean else images
        of = None if accuracy is None else of
        rows.append(one_accuracy(attack, None if is_clean else step, accuracy, of, *others))
    return FinalTable(
        table_weights(result),
        tuple(titles),
        tuple(rows),
        reported.place if reported else "",
        paper,
    )


def table_weights(result: Mapping[str, Any]) -> str:
    """Whose the accuracies of a result are.

    Before there was `best`, they were those of the weights that held-out images chose.
    """
    return "last" if "best" in result else "chosen"


def own_accuracies(record: Mapping[str, Any]) -> dict[str, float]:
    """Accuracies of a result or of a part of one, by attack."""
    clean = {CLEAN: record.get("clean_accuracy"), TOP5: record.get("clean_top5_accuracy")}
    found = clean | dict(record.get("robust_accuracy") or {})
    return {name: value for name, value in found.items() if is_number(value)}


def other_weights(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Accuracies of averaged and of chosen weights, where they are others, by what they are."""
    others = {}
    if isinstance(average := result.get("average"), dict):
        others["averaged"] = own_accuracies(average)
    best = result.get("best")
    if isinstance(best, dict) and not best.get("is_last"):
        kind = "best average" if best.get("is_averaged") else "best"
        others[f"{kind}, of epoch {best.get('epoch')}"] = own_accuracies(best)
    return others


def reported_row(recipe: str) -> tuple[str, Reported | None]:
    """The paper of a recipe, and what it reports of it; none of most."""
    title = next((title for title, rows in PAPERS.items() if recipe in rows), "")
    return title, REPORTED.get(recipe)


def in_fractions(reported: Reported) -> dict[str, float]:
    """A paper's percents by attack."""
    clean = {} if reported.clean is None else {CLEAN: reported.clean}
    return {name: value / 100 for name, value in (clean | dict(reported.robust)).items()}


def attack_parts(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Attack to part to the accuracy that still stands after it."""
    parts = record.get("attack_parts") or {}
    return {name: dict(own) for name, own in parts.items() if own}


def later_evaluations(files: RunFiles) -> list[LaterEvaluation]:
    """A line for each attack of each evaluation-*.json; one that is damaged is told."""
    lines = []
    for file, record in files.evaluations.items():
        try:
            if record.get("detection") is None:
                lines += list(lines_of(file, record))
        except Exception as error:  # a user's file holds anything at all
            files.damage[file] = reason(error)
    return lines


def lines_of(file: str, record: Mapping[str, Any]) -> Iterator[LaterEvaluation]:
    """The lines of one evaluation; one without attacks has a line for its clean images."""
    weights = weights_name(record)
    eps, data = str(record.get("eps")), str(record.get("dataset"))
    clean, step = record.get("clean_accuracy"), str(record.get("attack_step"))
    seen = seen_as(record)
    robust = record.get("robust_accuracy") or {}
    if not robust:
        row = one_accuracy(CLEAN, None, clean, record.get("num_clean_images"))
        yield LaterEvaluation(file, weights, eps, data, seen, clean, row)
    for attack, accuracy in robust.items():
        row = one_accuracy(attack, step, accuracy, record.get("num_eval_images"))
        parts = attack_parts(record).get(attack, {})
        yield LaterEvaluation(file, weights, eps, data, seen, clean, row, parts)


def seen_as(record: Mapping[str, Any]) -> str:
    """What an evaluation says of its ball and images beside radius and data, in words."""
    words = ["in L2"] if record.get("norm") == "l2" else []
    if record.get("preprocessing") is not None:
        words.append(f"preprocessing {record['preprocessing']}")
    if images := record.get("image_list"):
        words.append(f"the images of {images['file']}")
    return ", ".join(words)


def weights_name(record: Mapping[str, Any]) -> str:
    """``last`` of a record of last.pt."""
    return str(record.get("checkpoint")).removesuffix(".pt")


def measured_accuracies(files: RunFiles) -> dict[str, Accuracy]:
    """The last weights' accuracies at the run's own radius, at the end or later, by attack.

    AutoAttack is last, as the one that settles it. Of two measurements of an attack the one at the
    end of the run counts, for it is what others print.
    """
    result = files.result
    found = {row.attack: row for row in final_table(files).rows if row.accuracy is not None}
    for line in later_evaluations(files):
        # Other weights of that name, or other images, add a hash to the file's name.
        is_own = OWN_EVALUATION.search(line.file) and line.data == result.get("dataset")
        is_own = is_own and line.eps == result.get("eps")
        if line.weights == "last" and is_own and line.row.accuracy is not None:
            found.setdefault(line.row.attack, line.row)
    found.pop(TOP5, None)
    return dict(sorted(found.items(), key=lambda item: item[0] == AUTOATTACK))


def strongest(accuracies: Mapping[str, Accuracy]) -> Accuracy | None:
    """The attack that leaves least; None where there is none."""
    attacked = [row for name, row in accuracies.items() if name != CLEAN]
    return min(attacked, key=lambda row: row.accuracy or 0.0, default=None)


def shifts_of(files: RunFiles) -> list[Shift]:
    """A line for each robustness-*.json; one that is damaged is told."""
    shifts = []
    for file, record in files.robustness.items():
        try:
            shifts.append(shift_of(file, record))
        except Exception as error:  # a user's file holds anything at all
            files.damage[file] = reason(error)
    return shifts


def shift_of(file: str, record: Mapping[str, Any]) -> Shift:
    """The line of a robustness-*.json."""
    weights, remarks = weights_name(record), record.get("remarks")
    numbers = {words: record.get(key) for key, words in SHIFTED.items()}
    return Shift(
        file,
        set_name(file, weights),
        weights,
        record.get("num_eval_images"),
        tuple((words, value) for words, value in numbers.items() if is_number(value)),
        tuple(map(str, remarks)) if isinstance(remarks, list) else (),
    )


def set_name(file: str, weights: str) -> str:
    """``imagenet-c`` of robustness-last-imagenet-c-n400-1a2b3c4d.json."""
    stem = PurePath(weights).name  # weights of another run go by their path
    name = file.removesuffix(".json").removeprefix("robustness-").removeprefix(f"{stem}-")
    return name.rpartition("-n")[0] or name


@dataclasses.dataclass(frozen=True)
class Audit:
    """The checks that broken defences fail.

    Attributes:
        checks: As audit.json lists them.
        passed: How many hold. failed: How many do not; the others could not be judged.
        about: What they were made on, in a line.
        doubted: The accuracy that a failure makes doubtful: the table's, or whose it is.
    """

    checks: tuple[Mapping[str, Any], ...]
    passed: int
    failed: int
    about: str
    doubted: str


def audit_table(files: RunFiles, record: Mapping[str, Any]) -> Audit:
    """What audit.json says.

    Args:
        files: The run's, whose table an audit of the same weights, data and ball is about.
        record: What audit.json holds.
    """
    names = ("name", "question", "is_passed", "measured", "meaning")
    checks = [{name: check.get(name) for name in names} for check in record["checks"]]
    verdicts: Sequence[object] = [check["is_passed"] for check in checks]
    tables = (
        table_weights(files.result),
        str(files.result.get("eps")),
        files.norm,
        str(files.result.get("dataset")),
    )
    # Audits of earlier versions name neither norm nor data.
    audited = weights, eps, norm, data = (
        weights_name(record),
        str(record.get("eps")),
        str(record.get("norm", files.norm)),
        str(record.get("data", tables[-1])),
    )
    about = f"{weights} weights, eps {eps} in {BALLS.get(norm, norm)}"
    if record.get("attack_step") is not None:
        about += f", step {record['attack_step']}"
    number = f"{record['num_images']:,} " if is_number(record.get("num_images")) else ""
    about += f", {number}images of {data_title(data)}"
    return Audit(
        tuple(checks),
        sum(verdict is True for verdict in verdicts),
        sum(verdict is False for verdict in verdicts),
        f"{about}, seed {record.get('seed')}",
        "the robust accuracy above"
        if audited == tables
        else f"the robust accuracy that it is about ({about})",
    )
