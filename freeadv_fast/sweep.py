"""Methods x radii x seeds on one dataset: every cell a run of its own, one table, one plot.

A sweep's folder holds a folder a cell, named METHOD-epsE-seedS, each a complete run of `train`, and
sweep.json, sweep.csv, sweep.md and sweep.png over all of them, rewritten after every cell. Where
there are several GPUs each takes a cell, in a process of its own; CUDA_VISIBLE_DEVICES says which.
"""

from __future__ import annotations

import csv
import dataclasses
import gc
import io
import itertools
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from freeadv_fast.cli.flags import (
    flag_name,
    parse,
    parse_with_tyro,
    share_of,
    value_of,
    with_resumed_folder,
)
from freeadv_fast.cli.help import asks_for_help, tool_page
from freeadv_fast.cli.resolve import resolve
from freeadv_fast.cli.run import guard
from freeadv_fast.config.file import config_to_dict, load_config
from freeadv_fast.config.method_names import DUAL
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.task_fields import has_boxes, task_of
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.accuracy import attack_columns
from freeadv_fast.evaluation.report import plot_sweep
from freeadv_fast.evaluation.tables import markdown_table, results_table
from freeadv_fast.recipes.catalogue import DEFAULTS
from freeadv_fast.runs.json_file import read_json, write_json
from freeadv_fast.runs.lock import FolderLock
from freeadv_fast.runs.log import RunFolder
from freeadv_fast.runs.whole_file import renamed_when_whole
from freeadv_fast.session.side_by_side import Job, run_side_by_side, visible_gpus
from freeadv_fast.training import train

TABLE = "sweep.json"
Dataset = Literal["cifar", "imagenet"]
# What the sweep itself decides for each cell, and the flag to use instead.
DECIDED_HERE = {
    "config": "--methods",
    "dry_run": "--dry-run with a training script",
    "method": "--methods",
    "recipe": "--methods and --dataset",
    "seed": "--seeds",
}
# Fields in which a finished cell may differ from what is asked for now: none changes its result.
WITHOUT_EFFECT = {
    "checkpoint_every",
    "export",
    "log_every",
    "max_bad_fraction",
    "output_dir",
    "precision",  # saved as resolved, asked for as auto
    "recipe",
    "resume",
    "workers",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """Methods x radii x seeds. Every other flag goes to each cell whose method reads it."""

    methods: str = "natural,free"
    """Training methods, separated by commas; each with its own recipe of the dataset."""
    eps: str = "4/255,8/255"
    """Radii of training and evaluation, separated by commas."""
    seeds: str = "0"
    """Seeds of weights, order, crops and evaluation starts, separated by commas."""
    dataset: Dataset = "cifar"
    """Whose recipes --data is trained with: cifar or imagenet. Without --data the embedded digits
    and their recipes are used."""
    output_dir: str = "runs/sweep"
    """Folder of the table, the plot, and a folder for each run."""
    resume: bool = False
    """Continue the sweep in --output-dir: finished cells are kept, an interrupted one goes on."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep, and what came of it.

    Attributes:
        eps: Radius of training and evaluation.
        attack: The run's last evaluation attack. attack_step: Its step, such as ``1/255``.
        clean, robust: Accuracies, fractions; robust under `attack`.
        passes_per_second: Image passes for the weights. seconds: In the training loop.
        collapsed: Whether the run's guard saw robustness collapse; None where no result says so.
        error: Why there is no result, one line; empty where there is one, or is not yet.
    """

    method: str
    eps: str
    seed: int
    attack: str | None = None
    attack_step: str | None = None
    clean: float | None = None
    robust: float | None = None
    passes_per_second: float | None = None
    seconds: float | None = None
    collapsed: bool | None = None
    error: str = ""

    @property
    def eps_levels(self) -> float:
        """Radius in grey levels (1/255)."""
        return float(Perturbation.parse(self.eps).levels)

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.method}-eps{self.eps_levels:g}-seed{self.seed}"

    @property
    def is_pending(self) -> bool:
        """Whether its run has yet to finish."""
        return self.clean is None and not self.error


Train = Callable[[TrainConfig], object]
Planned = list[tuple[Cell, TrainConfig | None]]

# Exit statuses of a cell that was asked to stop: --resume goes on with it.
STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM}

# A cell in a process of its own: the dataset, and the flags of a training script.
CELL = """import sys
from freeadv_fast.cli.run import run_training
sys.exit(run_training("free", sys.argv[1], sys.argv[2:]))"""


def run_sweep(
    arguments: Sequence[str], train: Train = train, gpus: Sequence[str] | None = None
) -> int:
    """Parses a command line, trains what is missing, and returns the process's exit status.

    Args:
        arguments: Without the program's name.
        train: What runs a cell in this process.
        gpus: Those that take a cell each, as CUDA_VISIBLE_DEVICES names them; fewer than two: this
            process runs one cell after the other. By default all that are visible.

    Returns:
        0; 2 when a flag is wrong or a cell failed; 128 + its number after a signal.
    """
    gpus = visible_gpus() if gpus is None else gpus
    return guard(lambda: _sweep(list(arguments), train, gpus))


def _sweep(arguments: list[str], train: Train, gpus: Sequence[str]) -> int:
    """`run_sweep` with its mistakes raised."""
    if asks_for_help(arguments):
        print(tool_page(Sweep))
        return 0
    own, flags = split_arguments(arguments)
    sweep = parse_with_tyro(Sweep, with_resumed_folder(own, TABLE), Sweep())
    sweep = dataclasses.replace(sweep, output_dir=os.path.expanduser(sweep.output_dir))
    refuse_bad_flags(sweep, flags)
    planned = plan(sweep, flags)
    root = Path(sweep.output_dir)
    claim(root, sweep.resume)
    lock = FolderLock(root)
    if (line := lock.take()) is not None:
        print(line, flush=True)
    try:
        refuse_other_table(root, planned)
        cells = [read_result(cell, config) for cell, config in planned]
        write_results(root, cells, arguments)
        pending = [index for index, cell in enumerate(cells) if cell.is_pending]
        for index, cell in run_cells(sweep, flags, planned, pending, train, gpus):
            cells[index] = cell
            write_results(root, cells, arguments)
    finally:
        lock.release()
    print(f"\n{results_table(table_rows(cells))}\nwrote {root}/sweep.md, .csv, .json, .png")
    return 2 if any(cell.error for cell in cells) else 0


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The sweep's own flags and those of the training scripts, each with its values.

    A bare ``--`` may stand between them; what follows it goes to the cells.
    """
    names = {field.name for field in dataclasses.fields(Sweep)}
    own: list[str] = []
    flags: list[str] = []
    target = flags
    for index, argument in enumerate(arguments):
        if argument == "--":
            return own, flags + arguments[index + 1 :]
        if argument.startswith("--"):
            target = own if flag_name(argument) in names else flags
        target.append(argument)
    return own, flags


def refuse_bad_flags(sweep: Sweep, flags: list[str]) -> None:
    """Raises UserError for what no cell could be run with."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--nproc-per-node: a sweep runs in one process; start it without torchrun")
    typed = {flag_name(flag) for flag in flags if flag.startswith("--")}
    for name in typed & DECIDED_HERE.keys():
        flag = "--" + name.replace("_", "-")
        raise UserError(f"{flag}: a sweep sets it for each cell; use {DECIDED_HERE[name]}")
    refuse_detection(flags)
    is_embedded = value_of(flags, "--data") in (None, "digits")
    dataset = "digits" if is_embedded else sweep.dataset
    for method in sweep.methods.split(","):
        if method not in DEFAULTS[dataset]:
            raise UserError(
                f"--methods {method}: no recipe for {dataset}; choose among "
                + ", ".join(DEFAULTS[dataset])
            )
    for eps in sweep.eps.split(","):
        Perturbation.parse(eps)
    for seed in sweep.seeds.split(","):
        if not seed.isdecimal():
            raise UserError(f"--seeds {seed}: write whole numbers, such as 0,1,2")


def refuse_detection(flags: list[str]) -> None:
    """Raises UserError where a detector is to be swept, or images with boxes."""
    arch, data = (value_of(flags, flag) or "" for flag in ("--arch", "--data"))
    if task_of(arch) == "detection" or has_boxes(data):
        flag = f"--arch {arch}" if task_of(arch) == "detection" else f"--data {data}"
        raise UserError(
            f"{flag}: a sweep is of classifiers; train detectors one by one, and compare them with "
            "launch/report.py RUN RUN"
        )


def plan(sweep: Sweep, flags: list[str]) -> Planned:
    """Every cell with its config; None, and an error in the cell, where its flags do not fit.

    Raises:
        UserError: they fit no cell.
    """
    planned: Planned = []
    remarks: dict[str, None] = {}
    for method, eps, seed in dict.fromkeys(
        itertools.product(*(axis.split(",") for axis in (sweep.methods, sweep.eps, sweep.seeds)))
    ):
        cell = Cell(method, str(Perturbation.parse(eps)), int(seed))
        try:
            config, said = configure(sweep, cell, flags)
            planned.append((cell, config))
            remarks |= dict.fromkeys(said)
        except UserError as error:
            planned.append((dataclasses.replace(cell, error=str(error)), None))
    if all(config is None for _, config in planned):
        raise UserError(planned[0][0].error)
    print("\n".join([f"{len(planned)} cells in {sweep.output_dir}", *remarks]), flush=True)
    return planned


def configure(sweep: Sweep, cell: Cell, flags: list[str]) -> tuple[TrainConfig, list[str]]:
    """A cell's config as its training script would make it, and remarks for the user."""
    arguments = cell_arguments(sweep, cell, flags)
    command, typed = parse(arguments, cell.method, sweep.dataset)  # type: ignore[arg-type]
    config, remarks = resolve(command.run, typed)
    return dataclasses.replace(config, resume=Path(config.run_folder).exists()), remarks


def cell_arguments(sweep: Sweep, cell: Cell, flags: list[str]) -> list[str]:
    """What is typed to train a cell alone."""
    folder = Path(sweep.output_dir) / cell.name
    arguments = share_of(flags, cell.method, sweep.methods.split(","))
    arguments += ["--method", cell.method, "--eps", cell.eps, "--seed", str(cell.seed)]
    return [*arguments, "--output-dir", str(folder)]


def claim(root: Path, resume: bool) -> None:
    """Makes the sweep's folder, or refuses one that holds something else.

    Raises:
        UserError: the folder is not empty and the sweep not resumed, or it cannot be made.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        if any(root.iterdir()) and not resume:
            raise UserError(
                f"--output-dir {root}: holds another sweep; add --resume to continue it or choose "
                "another folder"
            )
    except OSError as error:
        raise UserError(f"--output-dir {root}: {error.strerror or error}") from None


def refuse_other_table(root: Path, planned: Planned) -> None:
    """A table is not overwritten by one of other runs, or of fewer.

    Raises:
        UserError: a run was made with other flags, or would be missing; the line names it.
    """
    for _, config in planned:
        if config is not None and (folder := RunFolder(Path(config.run_folder))).config.exists():
            refuse_other_run(config, folder)
    if not (root / TABLE).exists():
        return
    names = {cell.name for cell, _ in planned}
    for record in read_json(root / TABLE)["cells"]:
        known = Cell(record["method"], record["eps"], record["seed"])
        if known.name not in names:
            raise UserError(
                f"--resume: the table in {root} holds {known.name}, which these --methods, --eps "
                "and --seeds leave out; name its cells too, or choose another --output-dir"
            )


def run_cells(
    sweep: Sweep,
    flags: list[str],
    planned: Planned,
    pending: list[int],
    train: Train,
    gpus: Sequence[str],
) -> Iterator[tuple[int, Cell]]:
    """Trains the cells that are `pending` and yields each as it is done."""
    if len(gpus) < 2 or len(pending) < 2:
        for index in pending:
            cell, config = planned[index]
            print(f"\n[{index + 1}/{len(planned)}] {cell.name}", flush=True)
            if config is not None:
                yield index, run_cell(cell, config, train)
        return
    jobs = []
    for index in pending:
        cell = planned[index][0]
        arguments = cell_arguments(sweep, cell, flags)
        arguments += ["--resume"] * Path(sweep.output_dir, cell.name).exists()
        command = [sys.executable, "-c", CELL, sweep.dataset, *arguments]
        jobs.append(Job(command, Path(sweep.output_dir) / f"{cell.name}.log"))
    for number, status in run_side_by_side(jobs, gpus):
        index = pending[number]
        cell, config = planned[index]
        cell = read_result(cell, config)
        print(f"[{index + 1}/{len(planned)}] {cell.name}: {jobs[number].log}", flush=True)
        if cell.is_pending and status not in STOPPED:
            cell = dataclasses.replace(cell, error=last_error(jobs[number].log, status))
        yield index, cell


def last_error(log: Path, status: int) -> str:
    """What a cell's process said last of its failure."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else f"exit status {status}; see {log}"


def run_cell(cell: Cell, config: TrainConfig, train: Train) -> Cell:
    """Trains a cell; a user's mistake is noted in it, so that the others go on."""
    try:
        train(config)
        gc.collect()  # a decoder is a ring of references and holds threads and buffers
    except UserError as error:
        print(f"error: {error}", flush=True)
        return dataclasses.replace(cell, error=str(error))
    return read_result(cell, config)


def read_result(cell: Cell, config: TrainConfig | None) -> Cell:
    """The cell with what its finished run says; as it is where the run is not finished."""
    if config is None:
        return cell
    folder = RunFolder(Path(config.run_folder))
    if not folder.result.exists():
        return cell
    try:
        refuse_other_run(config, folder)
    except UserError as error:
        return dataclasses.replace(cell, error=str(error))
    result = read_json(folder.result)
    is_watched = config.method not in ("natural", *DUAL) and config.guard_every != 0
    attack, robust = next(reversed(result["robust_accuracy"].items()), (None, None))
    return dataclasses.replace(
        cell,
        attack=attack,
        attack_step=attack and result["attack_step"],
        clean=result["clean_accuracy"],
        robust=robust,
        passes_per_second=result["passes_per_second"],
        seconds=result["train_seconds"],
        collapsed=bool(result.get("collapse")) if is_watched else None,
    )


def refuse_other_run(config: TrainConfig, folder: RunFolder) -> None:
    """A finished run must be the one that is asked for: its result stands in the table.

    Raises:
        UserError: the run was made with another value of a field that matters.
    """
    saved, wanted = (config_to_dict(c) for c in (load_config(folder.config), config))
    for name in sorted(saved.keys() - WITHOUT_EFFECT):
        if saved[name] != wanted[name]:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} {wanted[name]}: the run in {folder.root} was made with {flag} "
                f"{saved[name]}; remove its folder, or choose another --output-dir"
            )


def table_rows(cells: Sequence[Cell]) -> list[dict[str, object]]:
    """A line a cell, for `tables.results_table`."""
    rows: list[dict[str, object]] = []
    for cell in cells:
        collapsed = {None: "-", False: "no", True: "yes"}[cell.collapsed]
        row: dict[str, object] = {"method": cell.method, "eps": cell.eps, "seed": cell.seed}
        row |= {"clean": cell.clean, "robust": cell.robust}
        row |= attack_columns(cell.attack or "-", cell.attack_step)
        row |= {
            "passes/s": cell.passes_per_second and round(cell.passes_per_second),
            "seconds": cell.seconds and round(cell.seconds),
            "collapsed": collapsed,
        }
        rows.append(row | ({"error": cell.error} if cell.error else {}))
    return rows


def write_results(root: Path, cells: Sequence[Cell], arguments: list[str]) -> None:
    """Writes sweep.json, sweep.csv, sweep.md and sweep.png, each whole or not at all."""
    records = [dataclasses.asdict(cell) | {"eps_levels": cell.eps_levels} for cell in cells]
    command = shlex.join(["launch/sweep.py", *arguments])
    write_json(root / TABLE, {"command": command, "cells": records})
    sheet = io.StringIO()
    writer = csv.DictWriter(sheet, records[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    with renamed_when_whole(root / "sweep.csv") as partial:
        partial.write_text(sheet.getvalue(), encoding="utf-8")
    with renamed_when_whole(root / "sweep.md") as partial:
        partial.write_text(markdown_table(table_rows(cells)) + "\n", encoding="utf-8")
    if any(cell.robust is not None for cell in cells):
        with renamed_when_whole(root / "sweep.png") as partial:
            plot_sweep(records, partial)
