"""Bandwidth of the elementwise kernels against the copy rate of the same machine and run.

    python bench/bench_kernels.py --seconds 60 --out bench/results/MACHINE/kernels.json

A kernel's bytes are those that its formula must read and write once; what an implementation moves
beyond them (the eager chain's temporaries) counts against it. In rows named `packed` the network's
input and its gradient have the layout of kernels/space_to_depth.py. Its padding channels count, for
they share 32-byte sectors with values; its border does where it is written.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from bandwidth import copy_kernel
from torch import Tensor

from freeadv_fast import ops
from freeadv_fast.ops import dispatch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STEP = 4.0
NAMES = {
    torch.int8: "int8",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}


def main() -> None:
    """Parses the flags, measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=4, metavar=("N", "H", "W", "C"))
    parser.add_argument("--seconds", type=float, default=60, help="time for all turns together")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    flags = parser.parse_args()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    device = harness.default_device()
    num = 256 if device.type == "cuda" else 16
    shape = tuple(flags.shape or (num, 224, 224, 3))
    record = {
        "benchmark": "kernels",
        "environment": harness.environment_record(device),
        "settings": {"shape": shape, "backend": dispatch.backend(device)},
        **run(shape, device, flags.seconds),
    }
    print(f"copy {record['copy']['gb_per_second']:.1f} GB/s")
    for row in record["results"]:
        print(
            f"{row['op']:24s} {row['provider']:7s} delta {row['delta']:5s} {row['dtype']:5s}"
            f"{row['seconds']['median'] * 1e6:11.1f} us {row['gb_per_second']:8.1f} GB/s "
            f"{100 * row['share_of_copy']:6.1f} % of copy"
        )
    if flags.out:
        harness.write_json(flags.out, record)


def run(shape: tuple[int, ...], device: torch.device, seconds: float) -> dict[str, Any]:
    """Copy rate and one row per op, provider, delta dtype and activation dtype."""
    is_gpu = device.type == "cuda"
    values = torch.Size(shape).numel()
    # As many bytes as the ops move, so that caches help the copy no more than them.
    num_bytes = max(values * 2, (1 << 30) if is_gpu else 0)
    calls: dict[str, Callable[[], object]] = {
        "copy": harness.graphed(copy_kernel(num_bytes, device), device)
    }
    rows: list[dict[str, Any]] = []
    activations = [torch.bfloat16, torch.float16, torch.float32] if is_gpu else [torch.float32]
    for storage in (torch.int8, torch.float32):
        for dtype in activations:
            for row, call in candidates(shape, storage, dtype, device):
                rows.append(row)
                calls[str(len(rows))] = harness.graphed(call, device)
    times = harness.measure(calls, device=device, seconds=seconds, flush=True)
    copy_bytes = 2 * num_bytes
    rate = copy_bytes / times["copy"]["median"]
    for index, row in enumerate(rows, 1):
        row["seconds"] = times[str(index)]
        row["gb_per_second"] = row["bytes"] / row["seconds"]["median"] / 1e9
        row["share_of_copy"] = row["gb_per_second"] * 1e9 / rate
    copy = {"bytes": copy_bytes, "seconds": times["copy"], "gb_per_second": rate / 1e9}
    return {"copy": copy, "results": rows}


def candidates(
    shape: tuple[int, ...], storage: torch.dtype, dtype: torch.dtype, device: torch.device
) -> list[tuple[dict[str, Any], Callable[[], object]]]:
    """The ops, plain and packed, and two eager chains, with the bytes that they must move."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, shape, generator=generator).to(torch.uint8).to(device)
    unit = STEP if storage is torch.int8 else 1.0
    delta = torch.zeros(shape, dtype=storage, device=device)
    mean, std = (torch.tensor(v, device=device) for v in (MEAN, STD))
    nonfinite = torch.zeros((), dtype=torch.int64, device=device)
    sizes = {"step": STEP, "eps": STEP, "unit": unit}
    values = images.numel()
    stored = values * storage.itemsize

    def row(op: str, provider: str, num_bytes: int) -> dict[str, Any]:
        names = {"delta": NAMES[storage], "dtype": NAMES[dtype]}
        return {"op": op, "provider": provider, **names, "bytes": num_bytes}

    def ours(packed: bool) -> list[tuple[dict[str, Any], Callable[[], object]]]:
        def normalize() -> Tensor:
            return ops.perturb_normalize(
                images, delta, mean, std, unit=unit, dtype=dtype, space_to_depth=packed
            )

        x = normalize()
        grad = torch.randn(x.permute(0, 2, 3, 1).shape, generator=generator)
        grad = grad.to(dtype).to(device).permute(0, 3, 1, 2)
        # Blocks of 2x2 pixels take 16 channels where 12 hold values.
        inside = math.prod((shape[0], 16, *(-(-side // 2) for side in shape[1:3])))
        touched = (inside if packed else values) * dtype.itemsize
        name = " packed" if packed else ""
        return [
            (row(f"perturb_normalize{name}", "ours", values + stored + x.nbytes), normalize),
            (
                row(f"sign_ascent_{name}", "ours", values + 2 * stored + touched),
                lambda: ops.sign_ascent_(delta, grad, images, nonfinite, **sizes),
            ),
            (
                row(f"ascend_normalize_{name}", "ours", values + 2 * stored + 2 * touched),
                lambda: ops.ascend_normalize_(
                    delta, x, grad, images, mean, std, nonfinite, **sizes
                ),
            ),
        ]

    found = ours(False) + ours(True)
    if storage is torch.float32:  # an eager chain has no other delta
        eager = eager_chain(images, mean, std, dtype)
        found += [
            (row("perturb_normalize", "eager", found[0][0]["bytes"]), eager[0]),
            (row("sign_ascent_", "eager", found[1][0]["bytes"]), eager[1]),
        ]
    return found


def eager_chain(
    images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The same two steps as one writes them in PyTorch: float images in [0, 1], fp32 delta.

    The clip's mask comes from autograd there; here it is computed, as its backward would.
    """
    pixels = images.permute(0, 3, 1, 2).float() / 255
    delta = torch.zeros_like(pixels)
    grad = torch.randn_like(pixels).to(dtype)
    step = STEP / 255
    mean, std = mean.view(-1, 1, 1), std.view(-1, 1, 1)

    def normalize() -> Tensor:
        return ((pixels + delta).clamp(0, 1) - mean).div(std).to(dtype)

    def ascend() -> Tensor:
        s = pixels + delta
        masked = grad.float() / std * ((s >= 0) & (s <= 1))
        return delta.add_(step * torch.sign(masked)).clamp_(-step, step)

    return normalize, ascend


if __name__ == "__main__":
    main()
