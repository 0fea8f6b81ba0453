"""Bytes and time of the shuffle exchange against gather-everything, and a model for more GPUs.

Every rank holds 16 adversarial images of 224x224x3, as Fast AdvProp at batch 80 does. `shuffle` is
`World.shuffle`; `gather` is what MoCo and the authors of Fast AdvProp do: all_gather of float32
images and of labels, one permutation from a shared seed, each rank takes every W-th row. Ranks are
processes on this machine, over gloo without a GPU and over NCCL with one for each.

    python bench/bench_shuffle.py --out bench/results/cpu/shuffle.json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from freeadv_fast import ops
from freeadv_fast.distributed.world import World

ROWS, SHAPE = 16, (224, 224, 3)
VALUES = ROWS * 224 * 224 * 3
LABEL_BYTES = 8

# The model: a rank's payload over the rate that NCCL reaches between GPUs without all-reduce
# (NVLink 4: sjeaugey, NVIDIA/nccl-tests issue 212; the others are assumed shares of the links).
GB_PER_SECOND = {"H100 NVLink": 370, "A100 NVLink": 230, "V100 NVLink": 130, "PCIe 3": 12}
MODEL_BATCH, MODEL_SHARE = 256, 0.2
# 256 images of ResNet-50 at about 7,100 a second, MLPerf's rate of one H100.
H100_STEP_MS = 36


def main() -> None:
    """Parses the flags, measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60, help="calls of each candidate")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    flags = parser.parse_args()
    num_gpus = torch.cuda.device_count()
    sizes = [size for size in (1, 2, 4, 8) if size <= num_gpus] if num_gpus else [2, 4]
    record = {
        "benchmark": "shuffle",
        "environment": harness.environment_record(harness.default_device()),
        "settings": {
            "rows_per_rank": ROWS,
            "row_shape": SHAPE,
            "process_group": "nccl" if num_gpus else "gloo",
            "implementation": ops.exchange_backend("cuda" if num_gpus else "cpu"),
            "threads_per_rank": 1,
            "rounds": flags.rounds,
        },
        "ranks": {str(size): measure_ranks(size, flags.rounds) for size in sizes},
        "model": cost_model(),
    }
    for size, result in record["ranks"].items():
        for name, row in result.items():
            wire = row["loopback_bytes_per_rank"]
            measured = f"{wire / 1e6:7.2f} MB measured" if wire is not None else "not measured"
            print(f"{size} ranks  {name:15s}{row['bytes_per_rank'] / 1e6:7.2f} MB a rank, "
                  f"{measured}, {row['median'] * 1e3:7.2f} ms "
                  f"({row['p20'] * 1e3:.2f} to {row['p80'] * 1e3:.2f})")  # fmt: skip
    for row in record["model"]["rows"]:
        times = ", ".join(f"{link} {ms:.3f}" for link, ms in row["milliseconds"].items())
        print(
            f"model: {row['gpus']} GPUs  {row['name']:15s}{row['megabytes']:7.1f} MB, ms: {times}"
        )
    if flags.out:
        harness.write_json(flags.out, record)


def measure_ranks(size: int, rounds: int) -> dict[str, Any]:
    """Starts that many ranks on this machine; what rank 0 measured."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (size, rounds, folder), nprocs=size)
        return torch.load(Path(folder, "result.pt"), weights_only=False)


def run_rank(rank: int, size: int, rounds: int, folder: str) -> None:
    """One rank: all candidates in turn, all ranks in step."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = dist.FileStore(str(Path(folder, "store")), size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    candidates, num_bytes = build_candidates(World(rank, size, device), device)
    times = harness.measure(candidates, device=device, rounds=rounds)
    result = {}
    for name, function in candidates.items():
        wire = loopback_bytes(function, size) if backend == "gloo" else None
        row = times[name]
        row["bytes_per_rank"] = num_bytes[name]
        row["loopback_bytes_per_rank"] = wire
        row["time_over_gather"] = harness.pairwise_ratio(row, times["gather-float32"])
        result[name] = row
    if rank == 0:
        torch.save(result, Path(folder, "result.pt"))
    dist.destroy_process_group()


def build_candidates(
    world: World, device: torch.device
) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """The exchanges to time, and the bytes that a rank receives from others in each."""
    images = torch.randint(0, 256, (ROWS, *SHAPE), dtype=torch.uint8, device=device)
    labels = torch.arange(ROWS, device=device)
    candidates: dict[str, Callable[[], object]] = {}
    num_bytes = {}
    for dtype in (torch.uint8, torch.float16):
        name = f"shuffle-{str(dtype).removeprefix('torch.')}"
        rows = images.to(dtype)
        candidates[name] = lambda rows=rows: world.shuffle(rows, labels, seed=0, step=1).wait()
        exchange = world.shuffle(rows, labels, seed=0, step=1)
        exchange.wait()
        num_bytes[name] = exchange.bytes_sent
    floats = images.float()
    candidates["gather-float32"] = lambda: gather_everything(world, floats, labels)
    num_bytes["gather-float32"] = (world.size - 1) * (4 * VALUES + LABEL_BYTES * ROWS)
    return candidates, num_bytes


def gather_everything(
    world: World, images: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row to every rank, each of which keeps its share of one permutation."""
    all_images = [torch.empty_like(images) for _ in range(world.size)]
    all_labels = [torch.empty_like(labels) for _ in range(world.size)]
    dist.all_gather(all_images, images)
    dist.all_gather(all_labels, labels)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(world.size * ROWS, generator=generator)[world.rank :: world.size]
    order = order.to(images.device)
    return torch.cat(all_images)[order], torch.cat(all_labels)[order]


def loopback_bytes(function: Callable[[], object], size: int) -> float:
    """What one call moves over the loopback interface, a rank: median of 9, headers included."""
    moved = []
    for _ in range(9):
        dist.barrier()
        before = loopback_counter()
        dist.barrier()  # nobody sends before the slowest has read
        function()
        dist.barrier()
        moved.append((loopback_counter() - before) / size)
    return statistics.median(moved)


def loopback_counter() -> int:
    """Bytes that the loopback interface has received since the machine started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    raise RuntimeError("/proc/net/dev has no interface lo")


def cost_model() -> dict[str, Any]:
    """Received bytes over link rate, for GPUs that this machine does not have."""
    rows = round(MODEL_BATCH * MODEL_SHARE)
    table = []
    for gpus in (4, 8):
        for name, value_bytes, share in (
            ("shuffle-uint8", 1, (gpus - 1) / gpus),
            ("shuffle-float16", 2, (gpus - 1) / gpus),
            ("gather-float32", 4, gpus - 1),
        ):
            moved = share * rows * (value_bytes * VALUES / ROWS + LABEL_BYTES)
            times = {link: moved / rate / 1e6 for link, rate in GB_PER_SECOND.items()}
            table.append(
                {
                    "gpus": gpus,
                    "name": name,
                    "megabytes": moved / 1e6,
                    "milliseconds": times,
                    "share_of_h100_step": times["H100 NVLink"] / H100_STEP_MS,
                }
            )
    return {
        "kind": "calculated, not measured",
        "formula": "shuffle: (W-1)/W * rows * row_bytes; gather: (W-1) * rows * row_bytes; "
        "time = bytes / rate, latency and overlap left out",
        "adversarial_rows_per_gpu": rows,
        "gb_per_second": GB_PER_SECOND,
        "h100_step_ms": H100_STEP_MS,
        "rows": table,
    }


if __name__ == "__main__":
    main()
