"""Does the recorded, fused, half-precision path learn what it should? Three ways to one answer.

    python bench/reproduce.py --data /data/cifar10 --out bench/results/h200/reproduce.json

Each recipe is trained by the trainer as it is, by the trainer with nothing fused, nothing recorded
and everything in fp32, and by `plain_training.py`, which shares no code with it: the same images,
the same budget, several seeds. One evaluator measures all networks. Where the ways' means differ
by less than a point, or than chance allows, the path is right.

Runs share the card (`--jobs`), so that their seconds say nothing; six at once, beside other work,
were ended by the budget before they were evaluated. The file is written after every run; a second
call makes the runs that are missing.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import plain_training
import torch
from run_gpu import run_limited
from torch import nn

from freeadv_fast import load_run

RECIPES = {
    "fgsm-rs": plain_training.Recipe("fgsm-rs", 15, 1, lr=0.2, peak=0.5, is_gradalign=False),
    "free": plain_training.Recipe("free", 48, 8, lr=0.04, peak=0.4, is_gradalign=True),
}
OURS = {"fgsm-rs": "cifar10-preact18-fgsm-rs-15ep", "free": "cifar10-preact18-free-m8-eps8"}

# The second is what the first would be on a CPU.
WAYS: dict[str, list[str]] = {
    "trainer": [],
    "trainer, plain": ["--fuse", "off", "--graphs", "off", "--precision", "fp32"],
    "plain PyTorch": [],
}
HELD_OUT = 1000

# How the lines of a run begin that are kept: epochs, and what did not happen as asked.
SAID = ("epoch", "graphs:", "fused")
POINT = 0.01


def train_and_measure(method: str, way: str, seed: int, flags: argparse.Namespace) -> None:
    """One run, in a process of its own; its last line of output is its row as JSON."""
    device, began = harness.default_device(), time.monotonic()
    recipe = dataclasses.replace(RECIPES[method], epochs=flags.epochs[method])
    if way == "plain PyTorch":
        net = by_plain_pytorch(recipe, seed, flags, device)
    else:
        net = by_the_trainer(method, WAYS[way], recipe.epochs, seed, flags).to(device)
    seconds = time.monotonic() - began
    images, labels = plain_training.read_cifar10(flags.data, ["test_batch"], device)
    images, labels = images[: flags.eval_images], labels[: flags.eval_images]
    torch.manual_seed(0)
    clean, robust = plain_training.accuracies(net, images, labels, flags.attack_steps)
    row = {"method": method, "way": way, "seed": seed, "clean": clean, "robust": robust}
    print(json.dumps({**row, "seconds": seconds}))


def by_plain_pytorch(
    recipe: plain_training.Recipe, seed: int, flags: argparse.Namespace, device: torch.device
) -> nn.Module:
    """Under autocast in bf16 on a GPU, as the trainer is by default."""
    torch.backends.cudnn.benchmark = True
    batches = [f"data_batch_{number}" for number in range(1, 6)]
    images, labels = plain_training.read_cifar10(flags.data, batches, device)
    kept = torch.randperm(len(images))[flags.held_out :][: flags.images]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return plain_training.train(recipe, images[kept], labels[kept], seed, dtype)


def by_the_trainer(
    method: str, switches: list[str], epochs: float, seed: int, flags: argparse.Namespace
) -> nn.Module:
    """As its user would: from a shell, guard and selection by held-out images included."""
    folder = tempfile.mkdtemp(dir=flags.folder)
    command = [sys.executable, "launch/cifar.py", "--recipe", OURS[method], *switches]
    command += ["--data", f"cifar10:{flags.data}", "--epochs", f"{epochs:g}", "--seed", str(seed)]
    command += ["--holdout-images", str(flags.held_out), "--output-dir", folder]
    command += ["--eval-attacks", "pgd-10", "--eval-images", "500"]
    if flags.images:
        command += ["--max-passes", str(flags.images)]
    subprocess.run(command, cwd=harness.REPOSITORY, check=True)
    return load_run(folder).network


def run(method: str, way: str, seed: int, flags: argparse.Namespace) -> dict[str, Any]:
    """`train_and_measure` in a process that is ended when the time is up."""
    left = max(flags.deadline - time.monotonic(), 1)
    command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(flags.folder)]
    command += ["--run", method, way, str(seed)]
    status, output = run_limited(command, left)
    said = [line for line in output.splitlines() if line.startswith(SAID)]
    if status == 0:
        return {**json.loads(output.splitlines()[-1]), "said": said}
    error = f"{status}: {output[-300:]}"
    return {"method": method, "way": way, "seed": seed, "error": error, "said": said}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a method and way: means, and standard errors where there are several seeds."""
    lines = []
    for method in RECIPES:
        for way in WAYS:
            own = [r for r in rows if (r["method"], r["way"]) == (method, way) and "clean" in r]
            line: dict[str, Any] = {"method": method, "way": way, "seeds": len(own)}
            for what in ("clean", "robust") if own else ():
                values = [row[what] for row in own]
                line[what] = statistics.mean(values)
                if len(values) > 1:
                    error = statistics.stdev(values) / math.sqrt(len(values))
                    line[f"{what}_standard_error"] = error
            lines += [line] if own else []
    return lines


def verdict(lines: list[dict[str, Any]]) -> list[str]:
    """For each method, by how much its ways differ."""
    told = []
    for method in RECIPES:
        own = [line for line in lines if line["method"] == method]
        if len(own) < 2:
            continue
        spans = {
            what: max(line[what] for line in own) - min(line[what] for line in own)
            for what in ("clean", "robust")
        }
        agree = max(spans.values()) <= POINT
        told.append(
            f"{method}: {len(own)} ways differ by {spans['clean']:.1%} clean and "
            f"{spans['robust']:.1%} under attack: {'within' if agree else 'more than'} a point"
        )
    return told


def main() -> None:
    """Parses the flags; makes all runs, or, as a child, one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10's python files")
    parser.add_argument("--methods", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=2, help="runs of each method and way")
    parser.add_argument("--fgsm-epochs", type=float, default=RECIPES["fgsm-rs"].epochs)
    parser.add_argument("--free-epochs", type=float, default=RECIPES["free"].epochs)
    parser.add_argument("--attack-steps", type=int, default=10, help="of PGD")
    parser.add_argument("--eval-images", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=3, help="runs at a time")
    parser.add_argument("--budget", type=float, default=3600, help="seconds for everything")
    parser.add_argument("--tiny", action="store_true", help="minutes on a CPU, to prove the script")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    flags.data = flags.data.resolve()
    flags.epochs = {"fgsm-rs": flags.fgsm_epochs, "free": flags.free_epochs}
    flags.images, flags.held_out = None, HELD_OUT
    if flags.tiny:
        flags.images, flags.eval_images, flags.attack_steps, flags.seeds = 128, 20, 1, 1
        flags.epochs, flags.jobs, flags.held_out = {"fgsm-rs": 1, "free": 8}, 1, 20
    if flags.run:
        method, way, seed = flags.run
        train_and_measure(method, way, int(seed), flags)
        return
    flags.deadline = time.monotonic() + flags.budget
    asked = [(m, w, s) for s in range(flags.seeds) for m in flags.methods for w in WAYS]
    settings = {"epochs": flags.epochs, "attack_steps": flags.attack_steps}
    settings |= {"eval_images": flags.eval_images, "held_out": flags.held_out, "switches": WAYS}
    record: dict[str, Any] = {
        "benchmark": "reproduce",
        "environment": harness.environment_record(harness.default_device()),
        "settings": settings,
        "summary": [],
        "rows": [],
    }
    if flags.out.is_file():
        earlier = json.loads(flags.out.read_text())
        if earlier["settings"] == settings:
            record["rows"] = [row for row in earlier["rows"] if "error" not in row]
    made = {(row["method"], row["way"], row["seed"]) for row in record["rows"]}
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ThreadPoolExecutor(flags.jobs) as pool,
    ):
        flags.folder = Path(folder)
        runs = [pool.submit(run, *which, flags) for which in asked if which not in made]
        for finished in concurrent.futures.as_completed(runs):
            row = finished.result()
            print(json.dumps(row), flush=True)
            record["rows"].append(row)
            record["summary"] = summary(record["rows"])
            record["verdict"] = verdict(record["summary"])
            harness.write_json(flags.out, record)
    for line in record["summary"]:
        print(line)
    print(*record.get("verdict", ()), sep="\n")


if __name__ == "__main__":
    main()
