"""Labels that leak through batch statistics: Fast AdvProp with and without its shuffle.

    python bench/leak.py --data /data/cifar10 --out bench/results/cpu/leak.json

Fast AdvProp attacks images in batch-norm groups and then trains on the adversarial ones. Without a
shuffle between the groups, Mei et al. 2022 (section 4.2) saw training accuracy on adversarial
images rise above that on clean ones on ImageNet, 88.0 % against 73.3 %.

A small pre-activation ResNet from scratch, `FastAdvProp` and `World.shuffle` of the package; groups
of the auxiliary batch norm stand for the ranks. eps is large and attacks start at the image, so
that minutes show what ImageNet shows after many epochs. The two runs go side by side, a process
each. When and whether it shows depends on the learning rate: see bench/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import harness
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from single_layer import load_data
from torch import Tensor, nn

from freeadv_fast.config.budget import Budget
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.schedule import Schedule
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.distributed.world import World
from freeadv_fast.evaluation.report import BLUE, GREY, VERMILION
from freeadv_fast.methods.build import build_method
from freeadv_fast.models.preact_resnet import PreActBlock
from freeadv_fast.session.method import RankShuffle
from freeadv_fast.session.network import build_learner

# Role of a pass, its line's name and colour.
CURVES = (
    ("clean", "clean, main branch", BLUE),
    ("noise", "attack's start, auxiliary branch", GREY),
    ("adversarial", "adversarial, auxiliary branch", VERMILION),
)


class SmallNetwork(nn.Module):
    """PreActResNet of four blocks, `width` to 8 `width` channels: (n, 3, H, W) to (n, classes)."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.blocks = nn.Sequential(
            *(
                PreActBlock(a, b, 1 if a == b else 2, raw_shortcut=False)
                for a, b in zip(widths, widths[1:], strict=False)
            )
        )
        self.bn = nn.BatchNorm2d(8 * width)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.bn(self.blocks(self.conv(x))))
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits


def train(
    images: Tensor, labels: Tensor, config: TrainConfig, flags: argparse.Namespace
) -> list[dict[str, Any]]:
    """Trains once; the training accuracies of each `--log-every` updates."""
    torch.set_num_threads(1)
    world = World(0, 1, torch.device("cpu"))
    torch.manual_seed(flags.seed)
    num_classes = int(labels.max()) + 1
    network = SmallNetwork(flags.width, num_classes)
    budget = Budget.of(config, [flags.updates])
    learner = build_learner(network, config, world, budget)
    method = build_method(
        config, learner, world.device, num_classes, RankShuffle(world, flags.seed)
    )
    generator = torch.Generator().manual_seed(flags.seed)
    network.train()
    lines, started = [], time.perf_counter()
    for update in range(1, flags.updates + 1):
        rows = torch.randint(len(images), (config.batch_size,), generator=generator)
        minibatch = images[rows]
        is_flipped = torch.rand(len(rows), generator=generator) < 0.5
        minibatch[is_flipped] = minibatch[is_flipped].flip(2)
        method.train_minibatch(minibatch, labels[rows], len(rows))
        if update % flags.log_every == 0:
            reading = learner.meters.read(world)
            lines.append({"update": update, "loss": reading.loss} | dict(reading.accuracy))
            text = ", ".join(f"{role} {lines[-1][role]:.3f}" for role, _, _ in CURVES)
            seconds = time.perf_counter() - started
            print(
                f"shuffle {config.shuffle}, update {update}: {text} ({seconds:.0f} s)", flush=True
            )
    return lines


def draw(runs: dict[str, list[dict[str, Any]]], title: str) -> Figure:
    """Training accuracy over the updates, without the shuffle on the left, with it on the right."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (name, lines) in zip(panels, runs.items(), strict=True):
        for role, label, color in CURVES:
            axes.plot(
                [line["update"] for line in lines],
                [line[role] for line in lines],
                color=color,
                label=label,
            )
        axes.set(title=name, xlabel="updates", ylim=(0, 1))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("training accuracy")
    panels[0].legend(loc="upper left", frameon=False)
    figure.suptitle(title)
    return figure


def main() -> None:
    """Parses the flags, trains twice, writes JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as JPEG, or ImageFolder")
    parser.add_argument("--images", type=int, default=50_000, help="training images, at most")
    parser.add_argument("--updates", type=int, default=8000)
    parser.add_argument("--eps", default="16/255")
    parser.add_argument("--group", type=int, default=8, help="auxiliary batch-norm group")
    parser.add_argument("--clean", type=int, default=8, help="clean images of a minibatch")
    parser.add_argument("--adversarial", type=int, default=32, help="adversarial ones")
    parser.add_argument("--width", type=int, default=12)
    parser.add_argument("--lr", type=float, default=0.1)
    # The updates are 1 + p_adv = 1.8 epochs of the natural budget.
    parser.add_argument("--schedule", default="piecewise:0=0,0.2025=1,1.62=1,1.8=0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; the PNG goes beside it")
    flags = parser.parse_args()
    data = load_data(flags.data, flags.images, 1)
    pixels, labels = data.train
    images = pixels.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    config = TrainConfig(
        method="fast-advprop",
        m=1,
        p_adv=flags.adversarial / (flags.clean + flags.adversarial),
        batch_size=flags.clean + flags.adversarial,
        aux_bn_group=flags.group,
        bn_group=flags.clean,
        eps=Perturbation.parse(flags.eps),
        attack_start="zero",
        normalization="none",
        epochs=1,
        lr=flags.lr,
        schedule=Schedule.parse(flags.schedule),
        weight_decay=5e-4,
        seed=flags.seed,
    )
    shuffles = {"without the shuffle": False, "with the shuffle": True}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        futures = {
            name: pool.submit(
                train, images, labels, dataclasses.replace(config, shuffle=is_shuffled), flags
            )
            for name, is_shuffled in shuffles.items()
        }
        runs = {name: future.result() for name, future in futures.items()}
    title = (
        f"{data.name}, eps {flags.eps}: auxiliary batch norm over groups of {flags.group} of "
        f"{flags.adversarial} images"
    )
    draw(runs, title).savefig(flags.out.with_suffix(".png"), dpi=150)
    record = {
        "benchmark": "leak",
        "environment": harness.environment_record(torch.device("cpu")),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(flags).items()},
        "runs": runs,
        "last": {name: lines[-1] for name, lines in runs.items()},
    }
    harness.write_json(flags.out, record)


if __name__ == "__main__":
    main()
