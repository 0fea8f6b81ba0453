"""A natural training step under torch.compile's settings against eager, each in its own process.

    python bench/bench_compile.py --out bench/results/MACHINE/compile.json
    python bench/bench_compile.py --arch resnet18 --image-size 32 --batch-size 2 --seconds 1 \
        --variants eager-fp32                                                      # any machine

The network alone is compiled; optimizer and loss are eager. `layout` forces channels_last through
the backward graph (TORCHINDUCTOR_FORCE_LAYOUT_OPT=1; pytorch issue 189239). A variant that fails or
passes its limit is recorded with its error; compile_seconds are those of its first three steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
import torch.nn.functional as F

from freeadv_fast.models.zoo import build_model
from freeadv_fast.session.network import PRECISIONS
from freeadv_fast.step.optim import build_sgd

# Compiled batch norm is the compiler's own in either half precision, so one dtype will do there.
VARIANTS = "eager-bf16,eager-fp16,default-bf16,layout-bf16,reduce-overhead-bf16"
MODES = ("eager", "default", "layout", "reduce-overhead")
FIRST_STEPS = 3  # compile, warm up, and (reduce-overhead) record its graphs


def main() -> None:
    """Runs every variant as a child, or, as a child, one variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument(
        "--variants", default=VARIANTS, help=f"MODE-PRECISION, comma between; {', '.join(MODES)}"
    )
    parser.add_argument("--seconds", type=float, default=8, help="time for a variant's samples")
    parser.add_argument("--limit", type=float, default=180, help="seconds for a variant in all")
    parser.add_argument("--budget", type=float, default=600, help="seconds for all variants")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    flags = parser.parse_args()
    for name in flags.variants.split(","):
        mode, _, precision = name.rpartition("-")
        if mode not in MODES or precision not in PRECISIONS:
            parser.error(f"--variants {name}: MODE-PRECISION of {MODES} and {tuple(PRECISIONS)}")
    if flags.variant:
        print(json.dumps(measure_variant(flags.variant, flags)))
        return
    deadline = time.monotonic() + flags.budget
    variants: dict[str, Any] = {}
    record = {
        "benchmark": "compile",
        "environment": harness.environment_record(harness.default_device()),
        "settings": {
            "arch": flags.arch,
            "image_size": flags.image_size,
            "batch_size": flags.batch_size,
        },
        "variants": variants,
    }
    for name in flags.variants.split(","):
        left = min(flags.limit, deadline - time.monotonic())
        variants[name] = run_child(name, sys.argv[1:], left)
        report(name, variants[name])
        if flags.out:
            harness.write_json(flags.out, record)
    if all("error" in entry for entry in variants.values()):
        sys.exit(1)


def run_child(name: str, arguments: list[str], limit_s: float) -> dict[str, Any]:
    """One variant in a process of its own, ended at its limit; never raises for what it does.

    Its output goes to a file: the compiler's workers hold a pipe open after their parent's end.
    They are in this process group, and end themselves when their parent is gone.
    """
    if limit_s <= 0:
        return {"error": "the time was up"}
    command = [sys.executable, __file__, *arguments, "--variant", name]
    environment = dict(os.environ)
    if name.startswith("layout-"):  # read once, when the compiler is imported
        environment["TORCHINDUCTOR_FORCE_LAYOUT_OPT"] = "1"
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            status: int | str = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = f"ended after {limit_s:.0f} s"
        output.seek(0)
        text = output.read()
    if status != 0:
        return {"error": f"status {status}: {text.strip()[-800:]}"}
    found: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    return found


def measure_variant(name: str, flags: argparse.Namespace) -> dict[str, Any]:
    """First steps and samples of one variant."""
    device = harness.default_device()
    call = natural_step(name, flags, device)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    start = time.perf_counter()
    for _ in range(FIRST_STEPS):
        call()
    synchronize()
    first = time.perf_counter() - start
    times = harness.measure({name: call}, device=device, seconds=flags.seconds)[name]
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
    return {
        "compile_seconds": first,
        "images_per_second": flags.batch_size / times["median"],
        "peak_mib": peak,
        "seconds": times,
    }


def natural_step(
    name: str, flags: argparse.Namespace, device: torch.device
) -> Callable[[], object]:
    """One update on a fixed minibatch: autocast, scaled in fp16, SGD with momentum."""
    mode, _, precision = name.rpartition("-")
    torch.backends.cudnn.benchmark = True
    size, dtype = flags.image_size, PRECISIONS[precision]
    torch.manual_seed(0)
    plain = build_model(flags.arch, 1000, image_size=size)
    plain = plain.to(device, memory_format=torch.channels_last)
    net = plain
    if mode != "eager":
        net = torch.compile(plain, mode="reduce-overhead" if mode == "reduce-overhead" else None)
    optimizer = build_sgd(plain, lr=0.01, momentum=0.9, weight_decay=1e-4, decay="all")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    x = torch.randn(flags.batch_size, 3, size, size, device=device)
    x = x.to(dtype, memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (flags.batch_size,), device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            logits = net(x)
        scaler.scale(F.cross_entropy(logits.float(), labels)).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def report(name: str, entry: dict[str, Any]) -> None:
    """Prints one variant's line."""
    if "error" in entry:
        print(f"{name:22s} failed: {entry['error'][-200:]}", flush=True)
        return
    print(
        f"{name:22s}{entry['images_per_second']:9.1f} images/s"
        f"{entry['seconds']['median'] * 1e3:9.2f} ms  compile {entry['compile_seconds']:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
