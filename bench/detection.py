"""What Fast AdvProp and free training are worth to a small detector on the embedded shapes.

    python bench/detection.py --seeds 3 --out bench/results/cpu/detection.json

Each method trains by its recipe (shapes-natural, shapes-fast-advprop, shapes-free) for the price of
the same epochs of natural training, and is evaluated on the validation images as they are, under
five corruptions at severity 3, and under PGD-10 at its recipe's radius. The shapes are drawn: this
shows that training works and says nothing about photographs. The file is written after every run; a
second call makes the runs that are missing.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from freeadv_fast.config.file import config_to_dict
from freeadv_fast.recipes.catalogue import RECIPES
from freeadv_fast.runs.json_file import read_json

METHODS = {"natural": "#999999", "fast-advprop": "#0072B2", "free": "#D55E00"}
SCRIPT = harness.REPOSITORY / "launch" / "coco_retinanet.py"


def run(method: str, seed: int, folder: Path, num_threads: int) -> dict[str, Any]:
    """Trains in a process of its own and reads what the last weights come to."""
    own = folder / f"{method}-{seed}"
    command = [sys.executable, str(SCRIPT), "--data", "shapes", "--recipe", f"shapes-{method}"]
    command += ["--seed", str(seed), "--output-dir", str(own)]
    threads = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=threads)
    row = row_of(method, seed, read_json(own / "result.json"))
    print(f"{method:14s} seed {seed}  clean {row['clean']:.1%}, corrupted "
          f"{row['corrupted']:.1%}, {row['train_seconds']:.0f} s", flush=True)  # fmt: skip
    return row


def row_of(method: str, seed: int, result: dict[str, Any]) -> dict[str, Any]:
    """A run's line: average precision clean, corrupted and attacked, passes and seconds."""
    found = result["detection"]
    return {
        "method": method,
        "seed": seed,
        "clean": found["clean"]["AP"],
        "clean_AP50": found["clean"]["AP50"],
        "corrupted": found["mean_corrupted"],
        "corruptions": {
            name: statistics.mean(by_severity.values())
            for name, by_severity in found["corruptions"].items()
        },
        "attacks": {name: numbers["AP"] for name, numbers in found["attacks"].items()},
        "eps": result["eps"],
        "passes": result["passes"] + result["attack_passes"],
        "train_seconds": result["train_seconds"],
        "evaluation_seconds": found["seconds"],
    }


def measures_of(row: dict[str, Any]) -> dict[str, float]:
    """What the figure shows of a run, by name."""
    corruptions = {name.replace("_", " "): value for name, value in row["corruptions"].items()}
    return {"clean": row["clean"], "mean of the corruptions": row["corrupted"], **corruptions}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a method: the mean over the seeds of each measure, and what it has over natural."""
    means = {
        method: {
            name: statistics.mean(measures_of(row)[name] for row in own) for name in names_of(rows)
        }
        for method, own in by_method(rows).items()
    }
    return [
        {"method": method, "mean": mean}
        | {"gain": {name: value - means["natural"][name] for name, value in mean.items()}}
        for method, mean in means.items()
    ]


def by_method(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each method that has some."""
    runs = {method: [row for row in rows if row["method"] == method] for method in METHODS}
    return {method: own for method, own in runs.items() if own}


def names_of(rows: list[dict[str, Any]]) -> list[str]:
    """The measures, the same of every run."""
    return list(measures_of(rows[0]))


def draw(rows: list[dict[str, Any]], title: str) -> Figure:
    """A group of bars a measure, one a method: their mean, and a point a seed."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, names = figure.subplots(), names_of(rows)
    runs = by_method(rows)
    step, middle = len(runs) + 1, (len(runs) - 1) / 2
    for place, (method, own) in enumerate(runs.items()):
        for group, name in enumerate(names):
            values = [measures_of(row)[name] for row in own]
            at = group * step + place
            label = method if group == 0 else None
            axes.barh(at, statistics.mean(values), color=METHODS[method], alpha=0.35, label=label)
            axes.plot(values, [at] * len(values), "o", color=METHODS[method], markersize=5)
    axes.set_yticks([group * step + middle for group in range(len(names))], names)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.suptitle(title)
    axes.set(xlabel="average precision", xlim=(0, None))
    axes.grid(axis="x", alpha=0.25)
    axes.legend()
    return figure


def main() -> None:
    """Makes the runs that are missing, and writes JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method")
    parser.add_argument("--methods", default=",".join(METHODS), help="among which natural")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; the PNG goes beside it")
    flags = parser.parse_args()
    num_threads = max(1, (os.cpu_count() or 1) // flags.jobs)
    methods = flags.methods.split(",")
    recipes = {method: config_to_dict(RECIPES[f"shapes-{method}"]) for method in METHODS}
    record = {
        "benchmark": "detection",
        "environment": harness.environment_record(torch.device("cpu")),
        "settings": {"recipes": recipes, "threads_of_a_run": num_threads},
        "runs": [],
    }
    harness.with_earlier_runs(record, flags.out)
    # Seed by seed, so that what is there compares.
    keys = [(method, seed) for seed, method in itertools.product(range(flags.seeds), methods)]
    with tempfile.TemporaryDirectory() as folder:
        rows = harness.make_missing(
            keys,
            lambda method, seed: run(method, seed, Path(folder), num_threads),
            record,
            ("method", "seed"),
            flags.out,
            flags.jobs,
        )
    seeds = "one seed" if flags.seeds == 1 else f"{flags.seeds} seeds"
    title = f"A small RetinaNet on drawn shapes, five corruptions at severity 3, {seeds}"
    draw(rows, title).savefig(flags.out.with_suffix(".png"), dpi=150)
    record["summary"] = summary(rows)
    harness.write_json(flags.out, record)


if __name__ == "__main__":
    main()
