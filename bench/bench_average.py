"""What averaged weights cost: a step with and without them, in turn, and the average alone.

    python bench/bench_average.py --out bench/results/MACHINE/average.json
    python bench/bench_average.py --arch resnet50 --image-size 224 --batch-size 256 --seconds 60

The steps are the trainer's own (`bench_step.provider`), on a GPU as recordings. The average alone
is `WeightAverage`'s update of the same network, by the kernel or torch's multi-tensor operation.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import harness
import torch
from bench_step import num_classes, provider

from freeadv_fast.config.method_names import METHODS
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.models.zoo import build_model
from freeadv_fast.step import graphs
from freeadv_fast.step.averaging import WeightAverage

DECAY = 0.9995
BYTES_PER_VALUE = 12  # reads average and weight, writes the average


def main() -> None:
    """Parses the flags, measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--method", default="natural", choices=METHODS)
    parser.add_argument("--rounds", type=int, default=20, help="at most so many samples of each")
    parser.add_argument("--seconds", type=float, help="time for all rounds together")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    flags = parser.parse_args()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    torch.backends.cudnn.benchmark = True
    config = TrainConfig(
        method=flags.method,
        m=1,
        arch=flags.arch,
        image_size=flags.image_size,
        batch_size=flags.batch_size,
        lr=0.01,  # gentle: random labels must not drive the weights to infinity
        normalization="imagenet" if flags.image_size > 64 else "cifar10",
    )
    device = harness.default_device()
    record = {
        "benchmark": "average",
        "environment": harness.environment_record(device),
        "settings": {
            "method": config.method,
            "arch": config.arch,
            "image_size": config.image_size,
            "batch_size": config.batch_size,
            "decay": DECAY,
        },
        **measured(config, device, flags.rounds, flags.seconds),
    }
    report(record)
    if flags.out:
        harness.write_json(flags.out, record)


def measured(
    config: TrainConfig, device: torch.device, rounds: int, seconds: float | None
) -> dict[str, Any]:
    """Seconds of a step either way and of the average alone, and the ratios within each round."""
    average = average_of(config, device)

    def update() -> None:
        average.begin_update()
        average.update()

    calls = {
        "plain": provider(config.method, config, device),
        "averaged": provider(config.method, dataclasses.replace(config, ema=DECAY), device),
        "average alone": update,
    }
    warmup = graphs.WARM_UP + 2 if device.type == "cuda" else 1
    times = harness.measure(calls, device=device, rounds=rounds, seconds=seconds, warmup=warmup)
    ratios = {"averaged_over_plain": harness.pairwise_ratio(times["averaged"], times["plain"])}
    ratios["average_alone_over_plain"] = harness.pairwise_ratio(
        times["average alone"], times["plain"]
    )
    outcome: dict[str, Any] = {"results": times, "time_ratios": ratios}
    if device.type == "cpu":
        cpu = {name: entry["cpu_seconds"] for name, entry in times.items()}
        outcome["cpu_time_ratios"] = {
            "averaged_over_plain": harness.pairwise_ratio(cpu["averaged"], cpu["plain"]),
            "average_alone_over_plain": harness.pairwise_ratio(cpu["average alone"], cpu["plain"]),
        }
    num_values = sum(tensor.numel() for tensor in average.tensors)
    moved = BYTES_PER_VALUE * num_values
    rate = moved / times["average alone"]["median"] / 1e9
    return outcome | {"average_bytes": moved, "average_gb_per_second": rate}


def average_of(config: TrainConfig, device: torch.device) -> WeightAverage:
    """An average of the config's network, with weights beside it."""
    classes = num_classes(config.image_size)
    network = build_model(config.arch, classes, image_size=config.image_size).to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return WeightAverage(network, DECAY)


def report(record: dict[str, Any]) -> None:
    """Prints what was measured."""
    for name, entry in record["results"].items():
        low, middle, high = (1e3 * entry[key] for key in ("p20", "median", "p80"))
        print(f"{name:14s}{middle:9.3f} ms ({low:.3f} to {high:.3f}, n {entry['n']})")
    ratios = record.get("cpu_time_ratios", record["time_ratios"])
    clock = "of processor time " if "cpu_time_ratios" in record else ""
    for name, ratio in ratios.items():
        low, middle, high = (ratio[key] for key in ("p20", "median", "p80"))
        print(f"{name} {clock}{middle:.4f} ({low:.4f} to {high:.4f})")
    print(f"the average alone moves {record['average_gb_per_second']:.1f} GB/s")


if __name__ == "__main__":
    main()
