"""What averaged weights and smoothed labels are worth to free training and FGSM-RS.

    python bench/averaging.py --data cifar10:FOLDER --jobs 2 --out bench/results/cpu/averaging.json

Each method trains a small convolutional network over three seeds, with labels as they are and
smoothed, for equal passes over the images. A run averages its weights as it goes and is evaluated
twice, with its last weights and with their average: four networks of two runs. The average reaches
as far back, as a share of the run, as that of the FastAT Benchmark (0.9995 over 38,300 updates),
whose smoothing (0.4), rate, decay and batch these are as well, none of them tuned for this network.
Its schedule is another one: here the rate falls to 0, and last weights are nearly their own
average. PGD-50 and AutoAttack see the same validation images. The file is written after every run;
a second call makes the runs that are missing.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import torch
from large_batch import SmallNetwork
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.runs.json_file import read_json
from freeadv_fast.runs.log import read_log
from freeadv_fast.training import train

SEEDS = (0, 1, 2)
SMOOTHING, BATCH = 0.4, 128
OPTIMIZER = {"lr": 0.1, "schedule": "linear:0.5", "weight_decay": 5e-4}
EPS, STEP = "8/255", "2/255"
# What an average reaches back over, 1 / (1 - decay) updates, in the benchmark's 100 epochs of
# 49,000 images.
REACH = 2000 / 38300
IMAGES = 50000
METHODS: dict[str, dict[str, Any]] = {
    "free": {"method": "free", "m": 4},
    "fgsm-rs": {"method": "fgsm-rs", "m": 1},
}
# How the four networks of a method and seed are called: label smoothing, averaged weights.
NETWORKS = {
    (0.0, False): "plain",
    (0.0, True): "averaged",
    (SMOOTHING, False): "smoothed",
    (SMOOTHING, True): "smoothed, averaged",
}
ATTACKS = ("pgd-50", "autoattack")
MEASURES = {"clean": "Clean", "pgd-50": "Under PGD-50", "autoattack": "Under AutoAttack"}
COLORS = ("#999999", "#0072B2", "#D55E00", "#009E73")


def config_of(method: str, smoothing: float, seed: int, flags: argparse.Namespace) -> TrainConfig:
    """One run; of FGSM-RS an epoch is two passes, of free training one."""
    epochs = flags.passes / 2 if method == "fgsm-rs" else flags.passes
    return TrainConfig(
        **METHODS[method],
        data=flags.data,
        image_size=32,
        resize_size=32,
        normalization="cifar10",
        augment="pad-crop-flip",
        batch_size=BATCH,
        epochs=epochs,
        **OPTIMIZER,
        eps=EPS,
        label_smoothing=smoothing,
        ema=round(1 - BATCH / (REACH * epochs * IMAGES), 5),
        seed=seed,
        holdout_images=0,
        eval_attacks=",".join(ATTACKS),
        eval_images=flags.eval_images,
        eval_step=STEP,
        output_dir=str(flags.folder / f"{method}-{smoothing}-{seed}"),
    )


def run(method: str, smoothing: float, seed: int, flags: argparse.Namespace) -> dict[str, Any]:
    """Trains in a process of its own and reads what the last weights and their average come to."""
    own = ["--run", method, str(smoothing), str(seed), "--folder", str(flags.folder)]
    command = [sys.executable, __file__, *sys.argv[1:], *own]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    folder = Path(config_of(method, smoothing, seed, flags).run_folder)
    result, log = read_json(folder / "result.json"), read_log(folder / "log.jsonl")
    row = {
        "method": method,
        "smoothing": smoothing,
        "seed": seed,
        "updates": log[-1]["updates"],
        "passes": result["passes"] + result["attack_passes"],
    }
    for name, measured in (("last", result), ("average", result["average"])):
        row[name] = {"clean": measured["clean_accuracy"], **measured["robust_accuracy"]}
    print(f"{method:8s} smoothing {smoothing:<4g} seed {seed}  "
          + "; ".join(f"{name} " + ", ".join(f"{k} {v:.1%}" for k, v in row[name].items())
                      for name in ("last", "average")), flush=True)  # fmt: skip
    return row


def values_of(
    rows: list[dict[str, Any]], method: str, smoothing: float, is_averaged: bool, measure: str
) -> list[float]:
    """One measure of one kind of network, a value a seed."""
    weights = "average" if is_averaged else "last"
    return [
        row[weights][measure]
        for row in rows
        if (row["method"], row["smoothing"]) == (method, smoothing)
    ]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a method and network: means and standard deviations over the seeds.

    `gain` is what it has over the plain network of the same seed: the mean and its standard error.
    """
    lines = []
    for method, (cell, name) in itertools.product(METHODS, NETWORKS.items()):
        line: dict[str, Any] = {"method": method, "network": name}
        for measure in MEASURES:
            own = values_of(rows, method, *cell, measure)
            plain = values_of(rows, method, 0.0, False, measure)
            gains = [a - b for a, b in zip(own, plain, strict=True)]
            line[measure] = {
                "mean": statistics.mean(own),
                "deviation": statistics.stdev(own),
                "gain": statistics.mean(gains),
                "gain_error": statistics.stdev(gains) / len(gains) ** 0.5,
            }
        lines.append(line)
    return lines


def draw(rows: list[dict[str, Any]], title: str) -> Figure:
    """A panel a measure, a group of bars a method: a point a seed, a bar for their mean."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    for axes, (measure, heading) in zip(panels, MEASURES.items(), strict=True):
        draw_measure(axes, rows, measure)
        axes.set(title=heading, xlim=(0, None))
    places = [group * 5 + place for group in range(len(METHODS)) for place in range(len(NETWORKS))]
    names = [f"{method}, {name}" for method in METHODS for name in NETWORKS.values()]
    panels[0].set_yticks(places, names)
    panels[0].invert_yaxis()
    figure.suptitle(title)
    return figure


def draw_measure(axes: Axes, rows: list[dict[str, Any]], measure: str) -> None:
    """The bars of one measure."""
    for group, method in enumerate(METHODS):
        for place, (cell, color) in enumerate(zip(NETWORKS, COLORS, strict=True)):
            values = values_of(rows, method, *cell, measure)
            axes.barh(group * 5 + place, statistics.mean(values), color=color, alpha=0.35)
            axes.plot(values, [group * 5 + place] * len(values), "o", color=color, markersize=5)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="x", alpha=0.25)


def main() -> None:
    """Parses the flags; as one run trains and evaluates, as its parent writes JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="cifar10:FOLDER")
    parser.add_argument("--passes", type=float, default=8, help="over the training images, each")
    parser.add_argument("--eval-images", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; the PNG goes beside it")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.run is not None:
        method, smoothing, seed = flags.run[0], float(flags.run[1]), int(flags.run[2])
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        train(config_of(method, smoothing, seed, flags), model=SmallNetwork())
        return
    study(flags)


def study(flags: argparse.Namespace) -> None:
    """Makes the runs that are missing, and writes JSON and PNG."""
    record = {
        "benchmark": "averaging",
        "environment": harness.environment_record(torch.device("cpu")),
        "settings": {
            "data": flags.data,
            "network": "large_batch.SmallNetwork",
            "methods": METHODS,
            "passes": flags.passes,
            "optimizer": OPTIMIZER,
            "eps": EPS,
            "attack_step": STEP,
            "reach_of_average": REACH,
            "smoothing": SMOOTHING,
            "batch_size": BATCH,
            "eval_images": flags.eval_images,
        },
        "runs": [],
    }
    harness.with_earlier_runs(record, flags.out)
    keys = list(itertools.product(METHODS, (0.0, SMOOTHING), SEEDS))
    keys.sort(key=lambda key: key[2])  # seed by seed
    with tempfile.TemporaryDirectory() as folder:
        flags.folder = Path(folder)
        rows = harness.make_missing(
            keys,
            lambda *key: run(*key, flags),
            record,
            ("method", "smoothing", "seed"),
            flags.out,
            flags.jobs,
        )
    title = (
        f"A small network, {flags.passes:g} passes over CIFAR-10's images, eps {EPS}: "
        f"{len(SEEDS)} seeds, {flags.eval_images} images attacked"
    )
    draw(rows, title).savefig(flags.out.with_suffix(".png"), dpi=150)
    record["summary"] = summary(rows)
    harness.write_json(flags.out, record)


if __name__ == "__main__":
    main()
