"""Calls with their bytes, timed in turn with a copy: GB/s and the share of the copy rate.

`bench_batch_norm` and `bench_stem` list their calls as rows; this file times them. A device's rates
are those of kernels: `copy_` in a CUDA graph is a memcpy node, which an H200 runs at 2.73 TB/s
where a batch-norm kernel moves 4.27.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import torch

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

# Twenty times the L2 of an H200 (60 MB), so that the copy is one of HBM.
GPU_COPY_BYTES = 1 << 30

Row = dict[str, Any]
Call = Callable[[], object]


def activations(device: torch.device) -> list[torch.dtype]:
    """What the trainer computes in: half precision on a GPU, fp32 on a CPU."""
    return [torch.float16, torch.bfloat16] if device.type == "cuda" else [torch.float32]


def copy_kernel(num_bytes: int, device: torch.device) -> Call:
    """A kernel that reads `num_bytes` and writes as many; on a CPU `copy_`."""
    if device.type != "cuda":
        source = torch.zeros(num_bytes, dtype=torch.uint8)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)
    return rate_kernels(num_bytes, device)["copy"][0]


def rate_kernels(num_bytes: int, device: torch.device) -> dict[str, tuple[Call, int]]:
    """Kernels whose rates a device's memory is known by, and the bytes that each moves.

    PyTorch's own, on tensors of `num_bytes`: a copy (a negation), a sum, which only reads, and an
    addition, which reads two and writes one.
    """
    a, b = (torch.randn(num_bytes // 2, device=device).to(torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    total = torch.empty((), dtype=torch.float32, device=device)
    return {
        "copy": (lambda: torch.neg(a, out=c), 2 * num_bytes),
        "read": (lambda: torch.sum(a, dtype=torch.float32, dim=None, out=total), num_bytes),
        "add": (lambda: torch.add(a, b, out=c), 3 * num_bytes),
    }


def time_rows(
    rows: list[tuple[Row, Callable[[], Call]]], device: torch.device, seconds: float
) -> dict[str, Any]:
    """Times every row and a copy in turn, with a cold L2 cache.

    Args:
        rows: Pairs of a row and a function that makes its call ready: warm, on a GPU captured as a
            graph. A row holds what names it and `bytes`, what its formula must read and write
            once.
        device: Where the calls run.
        seconds: Time for all rounds together.

    Returns:
        `copy` and `results`: each row with `seconds`, `gb_per_second` and `share_of_copy`, or with
        `error` where its call could not be made ready.
    """
    largest = max(row["bytes"] for row, _ in rows)
    num_bytes = GPU_COPY_BYTES if device.type == "cuda" else largest // 2
    calls = {"copy": harness.graphed(copy_kernel(num_bytes, device), device)}
    for index, (row, ready) in enumerate(rows):
        try:
            calls[str(index)] = ready()
        except Exception as error:  # one kernel that does not build must not cost the others
            row["error"] = f"{type(error).__name__}: {error}"[-500:]
    times = harness.measure(calls, device=device, seconds=seconds, flush=True)
    rate = 2 * num_bytes / times["copy"]["median"]
    for index, (row, _) in enumerate(rows):
        if "error" not in row:
            row["seconds"] = times[str(index)]
            row["gb_per_second"] = row["bytes"] / row["seconds"]["median"] / 1e9
            row["share_of_copy"] = row["gb_per_second"] * 1e9 / rate
    copy = {"bytes": 2 * num_bytes, "seconds": times["copy"], "gb_per_second": rate / 1e9}
    return {"copy": copy, "results": [row for row, _ in rows]}


def report(result: dict[str, Any], columns: list[str]) -> None:
    """Prints what `time_rows` returned as a table, with these columns as the rows' names."""
    print(f"copy {result['copy']['gb_per_second']:.1f} GB/s")
    for row in result["results"]:
        name = " ".join(f"{row[column]:14s}" for column in columns)
        if "error" in row:
            print(f"{name} failed: {row['error'].splitlines()[-1][:80]}")
            continue
        print(
            f"{name}{row['seconds']['median'] * 1e6:11.1f} us {row['gb_per_second']:8.1f} GB/s "
            f"{100 * row['share_of_copy']:6.1f} % of copy"
        )
