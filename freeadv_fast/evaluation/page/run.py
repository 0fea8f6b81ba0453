"""RUN/report.html: what a run was, what it came to, what it cost and how to repeat it."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from freeadv_fast.config.file import CONFIG_NAME
from freeadv_fast.distributed.world import is_main_rank
from freeadv_fast.evaluation.page import wording
from freeadv_fast.evaluation.page.cost import spent
from freeadv_fast.evaluation.page.detection import detection_tables, later_detections
from freeadv_fast.evaluation.page.files import RunFiles, read_run, reason
from freeadv_fast.evaluation.page.history import curves_of, guard_history
from freeadv_fast.evaluation.page.pictures import Picture, embed
from freeadv_fast.evaluation.page.render import write
from freeadv_fast.evaluation.page.results import (
    CLEAN,
    attack_parts,
    audit_table,
    final_table,
    later_evaluations,
    measured_accuracies,
    shifts_of,
    strongest,
    table_weights,
)
from freeadv_fast.evaluation.page.settings import changed_from_recipe, repeat
from freeadv_fast.runs.log import RunFolder

T = TypeVar("T")

# Its curves are drawn on the page itself.
TRAINING_PICTURE = "training.png"
# Classes that are named one by one; of more only their number is said.
MOST_CLASSES = 12

# What may stand in a run's folder, and what it holds.
CONTENTS = {
    "result.json": "what was measured, passes, seconds, versions",
    CONFIG_NAME: "every field of the run",
    "env.json": "command, versions, hardware, commit",
    "log.jsonl": "losses, rates and accuracies while it trained",
    "audit.json": "checks of the robust accuracy",
    "checkpoints/last.pt": "the last weights, and what --resume needs",
    "checkpoints/best.pt": "the weights that held-out images chose",
    "export": "the weights for use elsewhere",
    "export-average": "the averaged weights for use elsewhere",
    "plots": "pictures",
}
PATTERNS = {
    "result-*.json": "a result from before the run went on",
    "evaluation-*.json": "a later evaluation",
    "robustness-*.json": "accuracies on shifted images",
    "autoattack*.log": "what AutoAttack said",
    "before-*": "evaluations of the weights from before the run went on",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file of the run's folder: its path there, what it holds, its bytes (None of a folder)."""

    path: str
    about: str
    num_bytes: int | None


def write_page(run_folder: str | Path) -> Path:
    """Writes ``report.html`` into a finished run's folder, from what stands there alone.

    A file that is missing or damaged costs its section, and the page says so.

    Args:
        run_folder: The run's output folder.

    Returns:
        The page: one file that needs no network, with relative links to the run's files.

    Raises:
        UserError: no finished run is there, or a report.html that is not ours; a `ValueError` with
            one line.
    """
    files = read_run(run_folder)
    path = files.folder.report
    notes: dict[str, str] = {}
    history = attempt("guard", lambda: guard_history(files), notes)
    values = {
        "head": heading(files),
        "facts": attempt("facts", lambda: facts_of(files), notes),
        "verdict": attempt("verdict", lambda: verdict(files), notes),
        "final": attempt("final", lambda: final_table(files), notes),
        "detection": attempt("detection", lambda: detection_tables(files), notes),
        "detections": attempt("later", lambda: later_detections(files), notes),
        "best": attempt("best", lambda: verdict_on_best(files), notes),
        "changes": attempt("changes", lambda: changed_from_recipe(files), notes),
        "parts": attempt("parts", lambda: attack_parts(files.result), notes),
        "evaluations": attempt("later", lambda: later_evaluations(files), notes),
        "shifts": attempt("shifts", lambda: shifts_of(files), notes),
        "audit": attempt("audit", lambda: files.audit and audit_table(files, files.audit), notes),
        "history": history,
        "curves": attempt("curves", lambda: curves_of(files, history), notes),
        "spent": attempt("cost", lambda: spent(files), notes),
        "repeat": attempt("repeat", lambda: repeat(files), notes),
        "entries": attempt("entries", lambda: entries(files.folder.root), notes),
    }
    pictures = attempt("pictures", lambda: pictures_of(files, bool(values["curves"])), notes)
    write("run.html", path, files=files, pictures=pictures, notes=notes, **values)
    return path


def refresh_page(subject: str | Path) -> None:
    """Writes a run's page anew after something was added to its folder, and says where it is.

    Nothing fails for it: a line says why it could not be written.

    Args:
        subject: What was evaluated; nothing is written where that is no finished run, and by ranks
            other than the first.
    """
    folder = RunFolder(Path(subject).expanduser())
    if not is_main_rank() or not folder.result.is_file():
        return
    try:
        print(f"report: {write_page(subject)}", flush=True)
    except Exception as error:  # a full disk, or a file of the user's in its place
        print(f"not written: {folder.report}: {reason(error)}", flush=True)


def attempt(section: str, build: Callable[[], T], notes: dict[str, str]) -> T | None:
    """What a section shows; None and a note where a file holds what nobody would have written.

    Args:
        section: Its name. build: Makes what it shows.
        notes: Takes the reason why it is left out.
    """
    try:
        return build()
    except Exception as error:  # a user's or another version's file holds anything at all
        notes[section] = reason(error)
        return None


def heading(files: RunFiles) -> dict[str, Any]:
    """What was trained on what: the title."""
    result = files.result
    finished = datetime.datetime.fromtimestamp(files.folder.result.stat().st_mtime)
    return {
        "title": wording.method_title(str(result.get("method"))),
        "replays": replays_text(result),
        "network": str(result.get("arch")),
        "data": wording.data_title(str(result.get("dataset"))),
        "name": files.name,
        "finished": f"{finished:%d %B %Y}".lstrip("0"),
    }


def replays_text(result: Mapping[str, Any]) -> str:
    """``m = 8``; nothing of a method that replays no minibatch."""
    return f"m = {result['m']}" if result.get("m", 1) != 1 else ""


def facts_of(files: RunFiles) -> list[tuple[str, str]]:
    """The facts below the title."""
    result, plain = files.result, files.plain
    facts = {
        "Method": ", ".join(filter(None, (str(result.get("method")), replays_text(result)))),
        "Recipe": result.get("recipe"),
        "Network": result.get("arch"),
        "Data": str(result.get("dataset")),
        "Classes": classes_text(files.classes),
        "Image size": f"{plain['image_size']} px" if plain.get("image_size") else None,
        "Radius": radius_text(files),
        "Budget": budget_text(files),
        "Averaging": plain.get("ema"),
        "Label smoothing": plain.get("label_smoothing") or None,
        "Weight perturbation": plain.get("awp") or None,
        "Seed": result.get("seed"),
        "Weights": "averaged and last" if result.get("average") else None,
    }
    return [(name, str(value)) for name, value in facts.items() if value is not None]


def radius_text(files: RunFiles) -> str | None:
    """The radius and its norm; None of a detector that was neither trained within it nor attacked.

    Of a classifier it is that of the attacks at the end, too.
    """
    result, detection = files.result, files.detection
    if detection is not None and result.get("method") == "natural" and not detection.get("attacks"):
        return None
    return f"{result.get('eps')} in {wording.BALLS.get(files.norm, '')}"


def classes_text(classes: list[str]) -> str | None:
    """The classes by name, or how many there are."""
    if not classes:
        return None
    if len(classes) > MOST_CLASSES:
        return f"{len(classes):,}"
    return f"{len(classes)}: {', '.join(classes)}"


def budget_text(files: RunFiles) -> str | None:
    """Epochs that were asked for, those over the data, and passes."""
    result = files.result
    words = []
    if isinstance(files.plain.get("steps"), int):
        words.append(f"{files.plain['steps']:,} updates")
    elif files.plain.get("epochs"):
        words.append(f"{files.plain['epochs']:g} epochs")
    if isinstance(result.get("passes"), int):
        words.append(f"{result['passes']:,} image passes")
    return ", ".join(words) or None


def verdict(files: RunFiles) -> dict[str, Any]:
    """What the page's first sentence says."""
    accuracies = measured_accuracies(files)
    result = files.result
    return {
        "clean": accuracies.get(CLEAN),
        "attacked": strongest(accuracies),
        "has_autoattack": "autoattack" in accuracies,
        "eps": result.get("eps"),
        "ball": wording.BALLS.get(files.norm, ""),
        "passes": result.get("passes"),
        "attack_passes": result.get("attack_passes") or 0,
        "train_seconds": result.get("train_seconds"),
        "device": result.get("device"),
        "weights": table_weights(result),
    }


def verdict_on_best(files: RunFiles) -> str | None:
    """What the chosen weights are worth beside the last ones, where they are others."""
    best = files.result.get("best")
    if not best or best["is_last"]:
        return None
    kind = "averages" if best.get("is_averaged") else "weights"
    return (
        f"The best {kind} are those that {wording.count(files.result['holdout_images'])} held-out "
        f"images chose; they are {'better' if best['is_better'] else 'no better'} than the last by "
        "more than chance explains."
    )


def pictures_of(files: RunFiles, has_curves: bool) -> list[Picture]:
    """The pictures of plots/, the best known first; the curves once."""
    paths = sorted(files.folder.plots.glob("*.png"), key=lambda path: (path.stem[:10], path.name))
    paths.sort(key=lambda path: path.stem not in ("perturbations", "boxes"))
    if has_curves:
        paths = [path for path in paths if path.name != TRAINING_PICTURE]
    return embed(paths, files.damage)


def entries(root: Path) -> list[Entry]:
    """The files of a run's folder that a reader may want."""
    named = [(root / name, about) for name, about in CONTENTS.items()]
    named += [(p, about) for pattern, about in PATTERNS.items() for p in sorted(root.glob(pattern))]
    return [
        Entry(
            path.relative_to(root).as_posix() + "/" * path.is_dir(),
            about,
            None if path.is_dir() else path.stat().st_size,
        )
        for path, about in named
        if path.exists()
    ]
