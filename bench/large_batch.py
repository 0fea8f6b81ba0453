"""Large batches: what SGD loses, what layer-wise rates keep, what compression costs.

    python bench/large_batch.py --data cifar10:FOLDER --out bench/results/cpu/large-batch.json

DAT (Zhang et al., UAI 2022) trains a small convolutional network on two ranks over gloo, with equal
passes over the images: in batches of 64 with SGD, in batches of 2,048 with SGD and with layer-wise
rates (`--optimizer lalr`), and the last with each codec (`--compress`). Batch norm sees 32 images
in all of them, so that the number of updates is all that a large batch changes.

Each optimizer and batch is first tried at several rates with a seed of its own (`RATES`), and the
rate that leaves the highest robust accuracy is taken for the three seeds that count. Where the best
is the largest or the smallest rate, the record says so. The file is written after every run; a
second call makes the runs that are missing.
"""

from __future__ import annotations

import argparse
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
from torch import Tensor, nn

from freeadv_fast.config.fields import RunFields
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.recipes.catalogue import RECIPES
from freeadv_fast.runs.json_file import read_json
from freeadv_fast.runs.log import read_log
from freeadv_fast.training import train

RANKS, MINIBATCH, BN_GROUP = 2, 64, 32
TUNING_SEED, SEEDS = 100, (0, 1, 2)

# What each run is beside its rate. A batch of 64 is one of 32 images on each rank.
SGD_64 = {"optimizer": "sgd", "weight_decay": 5e-4, "batch_size": 32, "accumulate": 1}
LARGE = {"batch_size": MINIBATCH, "accumulate": 2048 // (RANKS * MINIBATCH)}
LALR = {"optimizer": "lalr", "weight_decay": 1e-4, **LARGE}
CELLS: dict[str, dict[str, Any]] = {
    "64, SGD": SGD_64,
    "2,048, SGD": {"optimizer": "sgd", "weight_decay": 5e-4, **LARGE},
    "2,048, layer-wise": LALR,
    "2,048, layer-wise, bucket codec": LALR | {"compress": "bucket"},
    "2,048, layer-wise, paper codec": LALR | {"compress": "paper"},
}
RATES = {
    "64, SGD": (0.06, 0.2, 0.6),
    "2,048, SGD": (0.6, 1.8, 5.4),
    "2,048, layer-wise": (0.06, 0.2, 0.6),
}
COLORS = ("#999999", "#D55E00", "#0072B2", "#56B4E9", "#009E73")


class SmallNetwork(nn.Module):
    """Four convolutions with batch norm, 1.3 million products an image: (n, 3, 32, 32) to 10."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width, stride in ((3, 16, 2), (16, 32, 2), (32, 64, 2), (64, 64, 1)):
            convolution = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.features(x).mean((2, 3)))
        return logits


def config_of(cell: str, rate: float, seed: int, flags: argparse.Namespace) -> TrainConfig:
    """The run of a cell."""
    base: RunFields = RECIPES[f"cifar10-preact18-dat-{flags.attack}"]
    fields = {name: getattr(base, name) for name in ("method", "dat_attack", "normalization")}
    return TrainConfig(
        **fields,
        **CELLS[cell],
        m=1,
        data=flags.data,
        image_size=32,
        resize_size=32,
        augment="pad-crop-flip",
        eps=flags.eps,
        attack_steps=flags.attack_steps,
        bn_group=BN_GROUP,
        epochs=flags.epochs,
        warmup_epochs=flags.epochs / 6,
        schedule=f"piecewise:0=1,{flags.epochs * 5 / 6:g}=0",
        lr=rate,
        seed=seed,
        holdout_images=0,
        eval_attacks="pgd-20",
        eval_images=flags.eval_images,
        eval_step="2/255",
        output_dir=str(flags.folder / f"{cell}-{rate}-{seed}".replace(" ", "")),
    )


def run(cell: str, rate: float, seed: int, flags: argparse.Namespace) -> dict[str, Any]:
    """Trains a cell once on two ranks of this machine's CPU, and reads what it came to."""
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    command = [torchrun, "--standalone", "--nproc-per-node", str(RANKS), __file__, *sys.argv[1:]]
    own = ["--cell", cell, "--rate", str(rate), "--seed", str(seed), "--folder", str(flags.folder)]
    subprocess.run(command + own, check=True, stdout=subprocess.DEVNULL)
    folder = Path(config_of(cell, rate, seed, flags).run_folder)
    result, log = read_json(folder / "result.json"), read_log(folder / "log.jsonl")
    return {
        "cell": cell,
        "rate": rate,
        "seed": seed,
        "updates": log[-1]["updates"],
        "passes": result["passes"],
        "train_seconds": result["train_seconds"],
        "clean": result["clean_accuracy"],
        "robust": result["robust_accuracy"]["pgd-20"],
    }


def all_runs(
    which: list[tuple[str, float, int]], record: dict[str, Any], flags: argparse.Namespace
) -> list[dict[str, Any]]:
    """The runs of these cells, rates and seeds in their order, `--jobs` at a time."""
    names = ("cell", "rate", "seed")
    return harness.make_missing(
        which, lambda *key: told(run(*key, flags)), record, names, flags.out, flags.jobs
    )


def tuned_rates(record: dict[str, Any], flags: argparse.Namespace) -> dict[str, float]:
    """The best rate of each cell that has rates to try."""
    trials = all_runs(
        [(cell, rate, TUNING_SEED) for cell, rates in RATES.items() for rate in rates],
        record,
        flags,
    )
    return {
        cell: max((t for t in trials if t["cell"] == cell), key=lambda t: float(t["robust"]))[
            "rate"
        ]
        for cell in RATES
    }


def told(row: dict[str, Any]) -> dict[str, Any]:
    """The row, printed."""
    print(f"{row['cell']:32s} rate {row['rate']:<5g} seed {row['seed']:<3d} clean "
          f"{row['clean']:.1%}, pgd-20 {row['robust']:.1%}, {row['updates']} updates, "
          f"{row['train_seconds']:.0f} s", flush=True)  # fmt: skip
    return row


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, a line a cell."""
    lines = []
    for cell in CELLS:
        own = [row for row in rows if row["cell"] == cell]
        line: dict[str, Any] = {"cell": cell, "rate": own[0]["rate"], "updates": own[0]["updates"]}
        for what in ("clean", "robust"):
            values = [row[what] for row in own]
            line |= {what: statistics.mean(values), f"{what}_deviation": statistics.stdev(values)}
        lines.append(line)
    return lines


def draw(rows: list[dict[str, Any]], title: str) -> Figure:
    """Clean and robust accuracy of every cell: a point a seed, a bar for their mean."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    names = list(CELLS)
    for axes, (what, heading) in zip(
        panels, (("clean", "Clean"), ("robust", "Under PGD-20")), strict=True
    ):
        for place, (cell, color) in enumerate(zip(CELLS, COLORS, strict=True)):
            values = [row[what] for row in rows if row["cell"] == cell]
            axes.barh(place, statistics.mean(values), color=color, alpha=0.35)
            axes.plot(values, [place] * len(values), "o", color=color)
        axes.set(title=heading, xlim=(0, None))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(axis="x", alpha=0.25)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.suptitle(title)
    return figure


def main() -> None:
    """Parses the flags; as one of the ranks trains, as their parent writes JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="cifar10:FOLDER")
    parser.add_argument("--attack", choices=("pgd", "fgsm"), default="fgsm")
    parser.add_argument("--attack-steps", type=int, default=1)
    parser.add_argument("--eps", default="8/255")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--eval-images", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of two processes each")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; the PNG goes beside it")
    parser.add_argument("--cell", choices=CELLS, help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.cell is not None:
        torch.set_num_threads(1)
        torch.manual_seed(flags.seed)
        train(config_of(flags.cell, flags.rate, flags.seed, flags), model=SmallNetwork())
        return
    record = {
        "benchmark": "large-batch",
        "environment": harness.environment_record(torch.device("cpu")),
        "settings": {
            "attack": flags.attack,
            "attack_steps": flags.attack_steps,
            "eps": flags.eps,
            "epochs": flags.epochs,
            "eval_images": flags.eval_images,
            "ranks": RANKS,
            "bn_group": BN_GROUP,
            "cells": CELLS,
            "rates": {cell: list(rates) for cell, rates in RATES.items()},
        },
        "runs": [],
    }
    harness.with_earlier_runs(record, flags.out)
    with tempfile.TemporaryDirectory() as folder:
        flags.folder = Path(folder)
        rates = tuned_rates(record, flags)
        others = rates["2,048, layer-wise"]  # the codecs' rate as well
        keys = [(cell, rates.get(cell, others), seed) for seed in SEEDS for cell in CELLS]
        rows = all_runs(keys, record, flags)
    branch = f"DAT-{flags.attack.upper()}"
    title = f"{branch} on CIFAR-10 (JPEG copy), a small network, eps {flags.eps}, equal passes"
    draw(rows, title).savefig(flags.out.with_suffix(".png"), dpi=150)
    at_the_edge = [c for c, r in rates.items() if r in (min(RATES[c]), max(RATES[c]))]
    record |= {"summary": summary(rows), "best_rate_at_the_edge": at_the_edge}
    harness.write_json(flags.out, record)


if __name__ == "__main__":
    main()
