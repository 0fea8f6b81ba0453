"""Catastrophic overfitting in training as we do it: FGSM, N-FGSM and GradAlign under guard.

    python bench/collapse.py --data /data/cifar10-folder --out bench/results/cpu/collapse.json

Trains the small network of `leak.py` with `freeadv_fast.training`, once for each method, and draws
what the guard and the selection measured. FGSM runs twice: to the end, and as the guard stops it.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import harness
import torch
from leak import SmallNetwork
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from freeadv_fast.config.threat import Perturbation
from freeadv_fast.evaluation.report import BLUE, GREEN, GREY, VERMILION
from freeadv_fast.recipes.catalogue import RECIPES
from freeadv_fast.runs.json_file import read_json
from freeadv_fast.runs.log import read_log
from freeadv_fast.training import train

# Name in the figure, method and what else is special about the run, colour.
RUNS: dict[str, tuple[str, dict[str, Any], str]] = {
    "FGSM": ("fgsm", {"guard_every": 0}, VERMILION),
    "FGSM, stopped by the guard": ("fgsm", {}, GREY),
    "N-FGSM": ("n-fgsm", {}, BLUE),
    "GradAlign": ("gradalign", {"reg_every": 1}, GREEN),
    "GradAlign, every second update": ("gradalign", {"reg_every": 2}, "#56B4E9"),
}


def run(name: str, flags: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Trains one network; its result and its log."""
    method, changes, _ = RUNS[name]
    base = RECIPES[f"cifar10-preact18-{method}-eps8"]
    eps = Perturbation.parse(flags.eps)
    config = dataclasses.replace(
        base,
        recipe="custom",
        data=str(flags.data),
        eps=eps,
        eval_step=Perturbation(eps.levels / 4),
        eval_attacks=("pgd-50",),
        eval_images=flags.eval_images,
        holdout_images=flags.holdout_images,
        guard_every=flags.guard_every,
        guard_images=flags.guard_images,
        epochs=flags.epochs,
        lr=flags.lr,
        log_every=20,
        workers=1,
        seed=flags.seed,
        output_dir=str(folder / name.replace(" ", "-").replace(",", "")),
    )
    config = dataclasses.replace(config, **changes)
    torch.manual_seed(flags.seed)
    train(config, model=SmallNetwork(flags.width, 10))
    output = Path(config.run_folder)
    result = read_json(output / "result.json")
    kept = ("method", "epochs", "passes", "attack_passes", "train_seconds", "clean_accuracy",
            "robust_accuracy", "best_epoch", "collapse")  # fmt: skip
    return {key: result[key] for key in kept} | {"log": read_log(output / "log.jsonl")}


def draw(runs: dict[str, dict[str, Any]], title: str) -> Figure:
    """Robust accuracy on held-out images, and on the training images' own single-step attack."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    robust, aligned = figure.subplots(1, 2, sharex=True)
    for name, found in runs.items():
        color = RUNS[name][2]
        for axes, key in ((robust, "holdout_robust_accuracy"), (aligned, "guard_alignment")):
            lines = [line for line in found["log"] if key in line]
            axes.plot(
                [line["updates"] for line in lines],
                [line[key] for line in lines],
                color=color,
                label=name,
                linestyle="--" if "guard" in name else "-",
                marker=".",
            )
        training = [line for line in found["log"] if "train_adversarial_accuracy" in line]
        if name == "FGSM":
            robust.plot(
                [line["updates"] for line in training],
                [line["train_adversarial_accuracy"] for line in training],
                color=color,
                linestyle=":",
                label="FGSM, in training under its own attack",
            )
    robust.set(title="Held-out images under PGD-10", xlabel="updates", ylim=(0, None))
    robust.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    aligned.set(title="Gradient alignment", xlabel="updates", ylim=(0, 1.02))
    for axes in (robust, aligned):
        axes.grid(alpha=0.25)
    robust.legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    return figure


def main() -> None:
    """Parses the flags, trains, writes JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="ImageFolder of 32-pixel images")
    parser.add_argument("--eps", default="16/255")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--width", type=int, default=12)
    parser.add_argument("--holdout-images", type=int, default=200)
    parser.add_argument("--guard-images", type=int, default=128)
    parser.add_argument("--guard-every", type=int, default=20)
    parser.add_argument("--eval-images", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; the PNG goes beside it")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: run(name, flags, Path(folder)) for name in RUNS}
    title = f"A small PreActResNet on CIFAR-10 (JPEG copy), eps {flags.eps}"
    draw(runs, title).savefig(flags.out.with_suffix(".png"), dpi=150)
    record = {
        "benchmark": "collapse",
        "environment": harness.environment_record(torch.device("cpu")),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(flags).items()},
        "runs": runs,
    }
    harness.write_json(flags.out, record)


if __name__ == "__main__":
    main()
