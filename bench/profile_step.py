"""Where a training step's time goes, by kind of kernel.

    python bench/profile_step.py --fuse off --graphs off --out bench/results/MACHINE/profile.json
    python bench/profile_step.py --arch resnet18 --image-size 32 --batch-size 2 --m 2  # any machine

On a GPU every kernel that runs is counted and timed by CUPTI, those of CUDA graphs too. On a CPU it
is PyTorch's operators, each without what it calls. `step_seconds` is timed before the profiler
starts; `busy_share` is the kernels' time over it: what is missing to 1 the GPU waited for the host.
"""

from __future__ import annotations

import argparse
import collections
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import harness
import torch
from bench_step import provider
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from freeadv_fast.config.choices import Switch
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.session.network import PRECISIONS, resolve_precision
from freeadv_fast.step import graphs

# The first that matches counts. Names as CUPTI (C++ templates), Triton and ATen spell them.
# cuDNN runs 1x1 convolutions by the matrix kernels of cuBLAS, so that the last layer's product
# cannot be told from them and counts as a convolution.
CLASSES = {
    "batch norm": r"batch_?norm|bn_(fw|bw)",
    "pooling": r"pool|MeanOps|aten::mean",
    "optimizer": r"multi_tensor|foreach|fused_?sgd|amp_update|non_finite|Optimizer\.",
    "copies": r"memcpy|memset|copy|nchwToNhwc|nhwcToNchw|AddPadding|convertTensor|CatArray"
    r"|FillFunctor|aten::(zeros?_?|fill_|clone|contiguous|cat)$",
    "convolution": r"conv|fprop|dgrad|wgrad|winograd|cudnn|gemm|gemv|cublas|cutlass|nvjet|splitK"
    r"|aten::(addmm|mm|linear)$|AddmmBackward",
    "elementwise": r"elementwise|functor|threshold|relu|clamp|aten::(add|sub|mul|div|sign)_?$",
}
NUM_PRINTED = 25


def main() -> None:
    """Parses the flags, profiles, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--method", default="free")
    parser.add_argument("--m", type=int, default=4, help="passes over the minibatch in a step")
    parser.add_argument("--precision", default="auto", choices=("auto", *PRECISIONS))
    for flag in ("--fuse", "--graphs"):
        parser.add_argument(flag, default="auto", choices=get_args(Switch), help="the trainer's")
    parser.add_argument("--steps", type=int, default=3, help="profiled steps of m passes")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    flags = parser.parse_args()
    device = harness.default_device()
    config = TrainConfig(
        arch=flags.arch,
        image_size=flags.image_size,
        batch_size=flags.batch_size,
        method=flags.method,
        m=flags.m,
        precision=flags.precision,
        fuse=flags.fuse,
        graphs=flags.graphs,
        lr=0.01,  # as in bench_step
        normalization="imagenet" if flags.image_size > 64 else "cifar10",
    )
    settings = {
        name: getattr(flags, name)
        for name in ("arch", "image_size", "batch_size", "method", "m", "fuse", "graphs", "steps")
    }
    settings["precision"] = resolve_precision(flags.precision, device)
    record = {
        "benchmark": "profile",
        "environment": harness.environment_record(device),
        "settings": settings,
        **profiled(config, device, flags.steps),
    }
    report(record)
    if flags.out:
        harness.write_json(flags.out, record)


def profiled(config: TrainConfig, device: torch.device, steps: int) -> dict[str, Any]:
    """Seconds and counts of one pass by class and by kernel, and the time of a pass."""
    step = provider(config.method, config, device)
    for _ in range(graphs.WARM_UP + 1 if device.type == "cuda" else 1):
        step()
    unprofiled = harness.measure({"step": step}, device=device, rounds=5)["step"]
    is_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            step()
        if is_gpu:
            torch.cuda.synchronize()
    found = by_kernel(gpu_events(profiler) if is_gpu else cpu_events(profiler))
    passes = steps * config.m
    kernels = [
        {"name": name, "class": kind, "seconds": seconds / passes, "count": count / passes}
        for (name, kind), (seconds, count) in found.items()
    ]
    kernels.sort(key=lambda kernel: -kernel["seconds"])
    total = sum(kernel["seconds"] for kernel in kernels)
    classes: dict[str, Any] = {}
    for kernel in kernels:
        entry = classes.setdefault(kernel["class"], {"seconds": 0.0, "share": 0.0, "count": 0.0})
        entry["seconds"] += kernel["seconds"]
        entry["count"] += kernel["count"]
    for entry in classes.values():
        entry["share"] = entry["seconds"] / total
    return {
        "counted": "kernels" if is_gpu else "operators",
        "classes": dict(sorted(classes.items(), key=lambda item: -item[1]["seconds"])),
        "kernels": kernels,
        "kernel_seconds": total,
        "step_seconds": unprofiled,
        "busy_share": total * config.m / unprofiled["median"],
    }


def gpu_events(profiler: profile) -> Iterator[tuple[str, str, float]]:
    """Name, class and seconds of everything that ran on the GPU."""
    for event in profiler.events() or ():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            yield event.name, classify(event.name), event.time_range.elapsed_us() / 1e6


def cpu_events(profiler: profile) -> Iterator[tuple[str, str, float]]:
    """Name, class and own seconds of every operator.

    What an operator calls, an allocation or a view, counts to the class of the nearest caller that
    has one; everything in the optimizer's step counts there.
    """
    for event in profiler.events() or ():
        kinds = [classify(name) for name in callers(event)]
        known = [kind for kind in kinds if kind != "other"]
        kind = "optimizer" if "optimizer" in kinds else (known or ["other"])[0]
        yield event.name, kind, event.self_cpu_time_total / 1e6


def callers(event: FunctionEvent) -> Iterator[str]:
    """Names of an operator and of what called it, from the inside out."""
    at: FunctionEvent | None = event
    while at is not None:
        yield at.name
        at = at.cpu_parent


def by_kernel(
    events: Iterator[tuple[str, str, float]],
) -> dict[tuple[str, str], tuple[float, int]]:
    """Seconds and number of the events of one name and class."""
    seconds: collections.Counter[tuple[str, str]] = collections.Counter()
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for name, kind, duration in events:
        seconds[name, kind] += duration
        counts[name, kind] += 1
    return {key: (seconds[key], counts[key]) for key in counts}


def classify(name: str) -> str:
    """The class of a kernel or operator by its name; ours are classes of their own."""
    if name in our_kernels():
        return f"ours: {name}"
    for kind, pattern in CLASSES.items():
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "other"


@functools.cache
def our_kernels() -> frozenset[str]:
    """Names of the Triton kernels under kernels/, which keep them on the GPU."""
    files = (harness.REPOSITORY / "kernels").glob("*.py")
    return frozenset(
        name
        for file in files
        for name in re.findall(r"^@jit\ndef (\w+_kernel)\(", file.read_text(), re.MULTILINE)
    )


def report(record: dict[str, Any]) -> None:
    """Prints the classes and the kernels that take longest."""
    per_pass = record["step_seconds"]["median"] / record["settings"]["m"]
    print(
        f"a pass: {1e3 * per_pass:.3f} ms, of which {record['counted']} "
        f"{1e3 * record['kernel_seconds']:.3f} ms ({100 * record['busy_share']:.1f} %)"
    )
    for kind, entry in record["classes"].items():
        print(
            f"{kind:32s}{1e6 * entry['seconds']:12.1f} us {100 * entry['share']:6.1f} %"
            f"{entry['count']:9.1f}"
        )
    print()
    for kernel in record["kernels"][:NUM_PRINTED]:
        print(
            f"{1e6 * kernel['seconds']:12.1f} us{kernel['count']:8.1f}  {kernel['class']:14s} "
            f"{kernel['name'][:100]}"
        )


if __name__ == "__main__":
    main()
