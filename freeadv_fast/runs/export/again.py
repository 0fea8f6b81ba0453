"""The export of a run once more, from its folder, and what else others ask for."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from freeadv_fast.runs.export import hub, onnx, robustbench
from freeadv_fast.runs.export.card import LICENSE_TODO
from freeadv_fast.runs.export.claims import read_claims, read_record
from freeadv_fast.runs.export.detector import export_detector
from freeadv_fast.runs.export.network import CONFIG
from freeadv_fast.runs.export.trained import CARD, card_left_alone, export_trained
from freeadv_fast.runs.json_file import read_json
from freeadv_fast.runs.saved import SavedRun, load_run, refuse_detector


def export_run(
    run_folder: str | Path,
    output_dir: str | Path | None = None,
    checkpoint: str = "last",
    *,
    model: nn.Module | None = None,
    with_onnx: bool = False,
) -> Path:
    """Exports a run's network again.

    Args:
        run_folder: The run's output folder.
        output_dir: Folder to write; by default ``export`` in the run's folder, and
            ``export-average`` for the averaged weights.
        checkpoint: As for `load_run`.
        model: Your own network where the run trained one, as for `load_run`.
        with_onnx: Whether ``model.onnx`` is written too (`onnx.export_onnx`).

    Returns:
        The folder written.

    Raises:
        UserError: no such run or checkpoint, a folder that holds something else, or a network that
            ONNX does not take.
    """
    if with_onnx:
        onnx.require_packages()
    return export_saved(load_run(run_folder, checkpoint, model=model), output_dir, with_onnx)


def export_saved(run: SavedRun, output_dir: str | Path | None, with_onnx: bool) -> Path:
    """`export_run` of a run that is loaded."""
    folder = run.folder.export_average if run.is_averaged else run.folder.export
    folder = folder if output_dir is None else Path(output_dir).expanduser()
    if with_onnx:
        refuse_detector(run.config, "--onnx", "only classifiers are written as ONNX; leave it out")
    if run.config.task == "detection":
        return export_detector(
            run.detector,
            folder,
            config=run.config,
            classes=run.classes,
            record=read_record(run.folder),
            weights=weights_named(run),
            category_ids=known_category_ids(run),
        )
    return export_trained(
        run.model,
        folder,
        config=run.config,
        classes=run.classes,
        record=read_record(run.folder),
        weights=weights_named(run),
        run_folder=run.folder.root,
        onnx_network=run.network if with_onnx else None,
    )


def export_for(
    run_folder: str,
    output_dir: str | None = None,
    checkpoint: str = "last",
    with_onnx: bool = False,
    robustbench_name: str | None = None,
    repository: str | None = None,
) -> list[str]:
    """What launch/export.py does: `export_run`, a submission to RobustBench, an upload.

    What the user typed is checked before anything is written.

    Args:
        run_folder: As for `export_run`. output_dir: Likewise. checkpoint: Likewise.
        with_onnx: Likewise.
        robustbench_name: The model's name there; None for no submission.
        repository: ``OWNER/NAME`` on the Hugging Face Hub; None for no upload.

    Returns:
        What was done and what is left to do, a line each.

    Raises:
        UserError: as `export_run`, `robustbench.export_robustbench` and `hub.push`.
    """
    if with_onnx:
        onnx.require_packages()
    if repository is not None:
        hub.check_repository(repository)
    if robustbench_name is not None:
        robustbench.check_name(robustbench_name)
    run = load_run(run_folder, checkpoint)
    if robustbench_name is not None:
        refuse_detector(run.config, "--robustbench", "it ranks classifiers only; leave it out")
    submission = None if robustbench_name is None else submission_for(run, robustbench_name)
    folder = export_saved(run, output_dir, with_onnx)
    lines = [f"wrote {folder}", *filter(None, [card_left_alone(folder)])]
    if submission is not None:
        lines += robustbench.export_robustbench(submission)
    if repository is not None:
        lines.append(f"uploaded to {hub.push(folder, repository)}")
        if LICENSE_TODO in (folder / CARD).read_text(encoding="utf-8"):
            lines.append(f"{folder / CARD} names no licence yet: fill in TODO, and upload again")
    return lines


def submission_for(run: SavedRun, name: str) -> robustbench.Submission:
    """What a run can submit to RobustBench.

    Raises:
        UserError: as `robustbench.submission_of`.
    """
    record = read_record(run.folder)
    weights, root = weights_named(run), run.folder.root
    claims = read_claims(record, weights, run.config, run.classes, root)
    return robustbench.submission_of(name, run, claims, has_result=record is not None)


def known_category_ids(run: SavedRun) -> list[int] | None:
    """COCO's ids of a detector's classes, which only its first export says; None without it."""
    path = run.folder.export / CONFIG
    exported = read_json(path) if path.is_file() else {}
    ids: list[int] | None = exported.get("category_ids")
    return ids if exported.get("class_names") == run.classes else None


def weights_named(run: SavedRun) -> str:
    """``last``, ``best`` or ``average``; the path of a checkpoint that is not the run's own."""
    return Path(run.weights).stem if run.is_own else run.weights
