"""What a step costs: image passes a second, peak memory, and time in steps of natural training.

    python bench/bench_step.py --arch resnet50 --image-size 224 --batch-size 256 --seconds 120
    python bench/bench_step.py --arch resnet18 --image-size 32 --batch-size 80 --threads 1 \
        --methods natural,fast-advprop,advprop

One sample is m steps over one minibatch, or for free-m one minibatch replayed m times; so a ratio
to natural is what a method costs on the same images. All methods are the trainer's own; plain is
`PlainFree` below. They train the same network, from the same weights, on the same pixels, in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freeadv_fast.budget import Budget
from freeadv_fast.config import METHODS, TrainConfig
from freeadv_fast.distributed import World
from freeadv_fast.methods import build_method
from freeadv_fast.methods.fast_advprop import Exchange
from freeadv_fast.models.zoo import build_model
from freeadv_fast.optim import build_sgd
from freeadv_fast.session import PRECISIONS, build_learner, build_network, resolve_precision

PROVIDERS = (*METHODS, "plain")
REPLAYED = ("free", "free-trades")  # a step is a replay
NUM_CLASSES = {224: 1000}  # any other size: CIFAR's 10


class PlainFree:
    """Free-m as the published PyTorch code does it, written from its description.

    Float images in [0, 1], a float32 noise buffer in NCHW order, one eager operation at a time,
    clamp and normalisation under autograd, loss and two accuracies read by the host at every
    replay. Left as good as ours: the network's channels_last weights, autocast, the optimizer.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        """Builds the network with the config's seed."""
        torch.manual_seed(config.seed)
        classes = num_classes(config.image_size)
        net = build_model(config.arch, classes, image_size=config.image_size)
        self.net: nn.Module = net.to(device, memory_format=torch.channels_last)
        self.optimizer = build_sgd(
            self.net,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            decay=config.decay,
        )
        self.m, self.dtype = config.m, PRECISIONS[resolve_precision(config.precision, device)]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self.eps = float(config.threat.eps)
        self.step_size = float(config.threat.step)
        size = config.image_size
        self.noise = torch.zeros(config.batch_size, 3, size, size, device=device)
        self.mean = torch.tensor(config.pixel_mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(config.pixel_std, device=device).view(3, 1, 1)
        self.meters = {"loss": 0.0, "top1": 0.0, "top5": 0.0, "images": 0}

    def train_minibatch(self, pixels: Tensor, labels: Tensor) -> None:
        """Replays a minibatch m times: (n, 3, H, W) float32 in [0, 1], (n,) int64."""
        num = len(pixels)
        for _ in range(self.m):
            noise = self.noise[:num].clone().requires_grad_()
            x = (pixels + noise).clamp(0, 1)
            x = (x - self.mean) / self.std
            is_half = self.dtype is not torch.float32
            with torch.autocast(x.device.type, self.dtype, enabled=is_half):
                logits = self.net(x)
            loss = F.cross_entropy(logits.float(), labels)
            hits = logits.topk(5, 1).indices == labels[:, None]
            self.meters["loss"] += loss.item() * num
            self.meters["top1"] += hits[:, 0].sum().item()
            self.meters["top5"] += hits.sum().item()
            self.meters["images"] += num
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.noise[:num] += self.step_size * torch.sign(noise.grad)
            self.noise.clamp_(-self.eps, self.eps)
            self.scaler.step(self.optimizer)
            self.scaler.update()


def main() -> None:
    """Parses the flags, measures or, as a child, reports one provider's peak memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--m", type=int, default=4)
    parser.add_argument(
        "--methods", default="natural,free,plain", help=f"of {','.join(PROVIDERS)}; natural first"
    )
    parser.add_argument("--attack-steps", type=int, default=1, help="K of the attack")
    parser.add_argument(
        "--reg-every", type=int, default=2, help="updates between GradAlign's terms"
    )
    parser.add_argument("--precision", default="auto", choices=("auto", *PRECISIONS))
    parser.add_argument("--rounds", type=int, help="at most so many samples of each")
    parser.add_argument("--seconds", type=float, help="time for all rounds together")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--no-memory", action="store_true", help="skip the peak memory")
    parser.add_argument("--memory-of", choices=PROVIDERS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    flags = parser.parse_args()
    names = flags.methods.split(",")
    if not set(names) <= set(PROVIDERS):
        parser.error(f"--methods {flags.methods}: choose among {','.join(PROVIDERS)}")
    if flags.rounds is None and flags.seconds is None:
        flags.rounds = 10
    if flags.threads:
        torch.set_num_threads(flags.threads)
    device = harness.default_device()
    torch.backends.cudnn.benchmark = True
    config = TrainConfig(
        arch=flags.arch,
        image_size=flags.image_size,
        batch_size=flags.batch_size,
        m=flags.m,
        attack_steps=flags.attack_steps,
        reg_every=flags.reg_every,
        precision=flags.precision,
        lr=0.01,  # gentle: random labels must not drive the weights to infinity
        normalization="imagenet" if flags.image_size > 64 else "cifar10",
    )
    if flags.memory_of:
        print(json.dumps(peak_memory(config, device, flags.memory_of)))
        return
    memory = {} if flags.no_memory else all_peaks(names, sys.argv[1:])
    record = {
        "benchmark": "step",
        "environment": harness.environment_record(device),
        "settings": {
            "arch": config.arch,
            "image_size": config.image_size,
            "batch_size": config.batch_size,
            "m": config.m,
            "attack_steps": config.attack_steps,
            "reg_every": config.reg_every,
            "precision": resolve_precision(config.precision, device),
        },
        **run(names, config, device, flags.rounds, flags.seconds),
        "memory": memory,
    }
    report(record)
    if flags.out:
        harness.write_json(flags.out, record)


def run(
    names: list[str],
    config: TrainConfig,
    device: torch.device,
    rounds: int | None,
    seconds: float | None,
) -> dict[str, Any]:
    """Times the methods in turn: seconds per step, and the ratios within each round."""
    calls = {name: provider(name, config, device) for name in names}
    times = harness.measure(calls, device=device, rounds=rounds, seconds=seconds, warmup=1)
    images = config.m * config.batch_size
    results = {
        name: {
            "image_passes_per_second": images * weight_passes(name, config) / entry["median"],
            "seconds_per_minibatch_pass": entry["median"] / config.m,
            "sample_seconds": entry,
        }
        for name, entry in times.items()
    }
    comparison: dict[str, Any] = {"results": results, "time_ratios": ratios(times)}
    if device.type == "cpu":
        cpu_times = {name: entry["cpu_seconds"] for name, entry in times.items()}
        comparison["cpu_time_ratios"] = ratios(cpu_times)
    return comparison


def ratios(times: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What one step costs in steps of the first method, and of free, within each round."""
    first, *others = times
    pairs = [(name, first) for name in others]
    if {"free", "plain"} <= set(others):
        pairs.append(("plain", "free"))
    return {
        f"{one}_over_{other}": harness.pairwise_ratio(times[one], times[other])
        for one, other in pairs
    }


def config_of(name: str, config: TrainConfig) -> TrainConfig:
    """The settings with a method, one minibatch a step unless it is free-m."""
    changes: dict[str, Any] = {"method": name, "m": config.m if name in REPLAYED else 1}
    num_adv = round(config.p_adv * config.batch_size)
    return dataclasses.replace(config, **changes, aux_bn_group=max(2, min(16, num_adv)))


def weight_passes(name: str, config: TrainConfig) -> float:
    """Passes for the weights per image and step."""
    own = config_of("free" if name == "plain" else name, config)
    return own.weight_passes / own.m


def provider(name: str, config: TrainConfig, device: torch.device) -> Callable[[], None]:
    """A function that makes m steps over one fixed minibatch of random pixels."""
    generator = torch.Generator().manual_seed(0)
    size, num = config.image_size, config.batch_size
    images = torch.randint(0, 256, (num, size, size, 3), generator=generator).to(torch.uint8)
    images = images.to(device)
    classes = num_classes(size)
    labels = torch.randint(0, classes, (num,), generator=generator).to(device)
    if name == "plain":
        plain = PlainFree(config, device)
        pixels = images.permute(0, 3, 1, 2).float().div(255).contiguous()
        return lambda: plain.train_minibatch(pixels, labels)
    num_minibatches = 1 if name in REPLAYED else config.m
    config = config_of(name, config)
    torch.manual_seed(config.seed)
    world, budget = World(0, 1, device), Budget.of(config, [1 << 30])
    network = build_network(config, [str(i) for i in range(classes)], is_fresh=True)
    learner = build_learner(network, config, world, budget)

    def shuffle(images: Tensor, labels: Tensor, step: int) -> Exchange:
        return world.shuffle(images, labels, seed=config.seed, step=step)

    method = build_method(config, learner, device, classes, shuffle)

    def steps() -> None:
        for _ in range(num_minibatches):
            method.train_minibatch(images, labels, num)

    return steps


def num_classes(image_size: int) -> int:
    """ImageNet's 1000 at its size, CIFAR's 10 otherwise."""
    return NUM_CLASSES.get(image_size, 10)


def peak_memory(config: TrainConfig, device: torch.device, name: str) -> dict[str, Any]:
    """Peak memory of one provider in this process, in its second minibatch."""
    meter = harness.MemoryMeter(device)
    call = provider(name, config, device)
    call()
    meter.forget_peak()
    call()
    return {"peak_mib": meter.peak_mib(), "kind": meter.kind}


def all_peaks(names: list[str], arguments: list[str]) -> dict[str, Any]:
    """Peak memory of every method, each in a process of its own."""
    found = {
        name: harness.in_child(["bench_step.py", *arguments, "--memory-of", name]) for name in names
    }
    peaks = {f"{name}_peak_mib": entry["peak_mib"] for name, entry in found.items()}
    return {"kind": found[names[0]]["kind"], **peaks}


def report(record: dict[str, Any]) -> None:
    """Prints the record as a table."""
    memory = record["memory"]
    for name, row in record["results"].items():
        entry = row["sample_seconds"]
        peak = f"{memory[f'{name}_peak_mib']:9.0f} MiB" if memory else ""
        print(
            f"{name:12s} {row['image_passes_per_second']:9.1f} passes/s"
            f"  spread {100 * (entry['p80'] - entry['p20']) / entry['median']:5.1f} %"
            f"  n {entry['n']:3d} {peak}"
        )
    for kind in ("time_ratios", "cpu_time_ratios"):
        for name, ratio in record.get(kind, {}).items():
            spread = f"({ratio['p20']:.3f} to {ratio['p80']:.3f})"
            print(f"{kind:16s} {name:25s} {ratio['median']:.3f}  {spread}")


if __name__ == "__main__":
    main()
