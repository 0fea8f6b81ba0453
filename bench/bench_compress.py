"""Bytes and time of compressed gradients against all-reduces, and a model of larger machines.

Every rank holds the gradients of a ResNet-18. `bucket` and `paper` are the codecs of --compress:
encode, all-to-all, average and encode, all-gather, decode. `gather` is what the authors of DAT
do (quantization.py, main.py): everybody's bytes to everybody, averaged there. Ranks are processes
on this machine, over gloo without a GPU and over NCCL with one for each; what a rank sends is
counted by the formula and, over gloo, at the loopback interface. On one GPU the codecs' kernels
are timed against the rate of a copy.

    python bench/bench_compress.py --out bench/results/cpu/compress.json
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_shuffle import loopback_bytes
from torch import Tensor
from torchvision.models import resnet18

from freeadv_fast import ops
from freeadv_fast.distributed.codec import (
    Codec,
    Piece,
    RandomStream,
    Stage,
    decode_gradients,
    encode_gradients,
    encode_mean,
    lay_out,
    number_blocks,
)
from freeadv_fast.distributed.compress import BucketAverage

CODECS: tuple[Codec, ...] = ("bucket", "paper")

# The model. ResNet-50; 25.6 million elements; DAT-PGD with 4 steps is 2 passes and 4 of the input's
# gradient alone, 0.66 of a pass each (products).
ELEMENTS = 25_557_032
STEP_PASSES = 2 + 4 * 0.66
# Free passes a second of an H200, measured (bench/results/h200/step-resnet50-224.json).
PASSES_PER_SECOND = 7701
IMAGES_PER_GPU = 85
# Bytes a second in each direction. NVLink: between GPUs without all-reduce (sjeaugey,
# NVIDIA/nccl-tests issue 212); of a network 90 % of the line.
NVLINK = 370e9
NETWORKS = {"NVLink": NVLINK, "100 Gbit/s": 0.9 * 12.5e9, "10 Gbit/s": 0.9 * 1.25e9}
# Copy rate of our kernels on an H200, measured: 4.27 TB/s. Encoding and decoding read and write
# 4 bytes an element three times over.
CODEC_SECONDS = 3 * 8 * ELEMENTS / 4.27e12
# Machines, and GPUs in each.
MACHINES = ((6, 6), (8, 8), (16, 8), (6, 1), (128, 1))


def main() -> None:
    """Parses the flags, measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="calls of each candidate")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    flags = parser.parse_args()
    num_gpus = torch.cuda.device_count()
    sizes = [size for size in (2, 4, 8) if size <= num_gpus] if num_gpus else [2, 4]
    record = {
        "benchmark": "compress",
        "environment": harness.environment_record(harness.default_device()),
        "settings": {
            "elements": sum(gradient_sizes()),
            "process_group": "nccl" if num_gpus else "gloo",
            "implementation": ops.codec_backend("cuda" if num_gpus else "cpu"),
            "threads_per_rank": 1,
            "rounds": flags.rounds,
        },
        "codecs": measure_codecs(flags.rounds),
        "ranks": {str(size): measure_ranks(size, flags.rounds) for size in sizes},
        "model": network_model(),
    }
    for name, row in record["codecs"].items():
        print(f"{name:24s}{row['median'] * 1e3:8.2f} ms, {row['time_over_copy']['median']:.2f} "
              "times a copy of the gradients")  # fmt: skip
    for size, result in record["ranks"].items():
        for name, row in result.items():
            wire = row["loopback_bytes_per_rank"]
            measured = f"{wire / 1e6:7.2f} MB measured" if wire is not None else "not measured"
            print(f"{size} ranks  {name:18s}{row['bytes_per_rank'] / 1e6:7.2f} MB a rank, "
                  f"{measured}, {row['median'] * 1e3:7.1f} ms "
                  f"({row['p20'] * 1e3:.1f} to {row['p80'] * 1e3:.1f})")  # fmt: skip
    for row in record["model"]["rows"]:
        times = ", ".join(f"{name} {ms:.1f}" for name, ms in row["milliseconds"].items())
        print(f"model: {row['machines']:8s}{row['network']:11s} step {row['step_ms']:.0f} ms, "
              f"then {times} ms")  # fmt: skip
    if flags.out:
        harness.write_json(flags.out, record)


def gradient_sizes() -> list[int]:
    """Elements of each gradient."""
    return [parameter.numel() for parameter in resnet18().parameters()]


def pieces_of(sizes: list[int]) -> list[Piece]:
    """All gradients end to end in one bucket."""
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    firsts = number_blocks(sizes)
    return [Piece(*piece) for piece in zip(firsts, starts[:-1], sizes, strict=True)]


def measure_codecs(rounds: int) -> dict[str, Any]:
    """Encoding and decoding on this device, each against a copy of the gradients."""
    device = harness.default_device()
    sizes = gradient_sizes()
    gradients = torch.randn(sum(sizes), device=device)
    target = torch.empty_like(gradients)
    update = torch.zeros(1, dtype=torch.int64, device=device)
    candidates: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(gradients)}
    for codec in CODECS:
        layout = lay_out(pieces_of(sizes), codec=codec, rank=0, num_ranks=1, device=device)
        message = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device)
        mean = torch.zeros_like(message)
        own, again = (RandomStream(0, update, 0, stage) for stage in Stage)
        encode_gradients(gradients, layout.blocks, own, message)
        candidates |= {
            f"{codec}: encode": lambda b=layout.blocks, s=own, m=message: encode_gradients(
                gradients, b, s, m
            ),
            f"{codec}: mean of 4": lambda b=layout.own, s=again, m=message, t=mean: encode_mean(
                m.expand(4, -1).contiguous(), b, s, t
            ),
            f"{codec}: decode": lambda b=layout.blocks, m=message: decode_gradients(m, b, target),
        }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = harness.measure(candidates, device=device, rounds=rounds)
    torch.set_num_threads(threads)
    for row in times.values():
        row["time_over_copy"] = harness.pairwise_ratio(row, times["copy"])
    return times


def measure_ranks(size: int, rounds: int) -> dict[str, Any]:
    """Starts that many ranks on this machine; what rank 0 measured."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (size, rounds, folder), nprocs=size)
        result: dict[str, Any] = torch.load(Path(folder, "result.pt"), weights_only=False)
    return result


def run_rank(rank: int, size: int, rounds: int, folder: str) -> None:
    """One rank: all candidates in turn, all ranks in step."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = dist.FileStore(str(Path(folder, "store")), size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    candidates, num_bytes = build_candidates(rank, size, device)
    times = harness.measure(candidates, device=device, rounds=rounds)
    result = {}
    for name, function in candidates.items():
        wire = loopback_bytes(function, size) if backend == "gloo" else None
        row = times[name]
        row["bytes_per_rank"] = num_bytes[name]
        row["loopback_bytes_per_rank"] = wire
        row["time_over_float32"] = harness.pairwise_ratio(row, times["all-reduce float32"])
        result[name] = row
    if rank == 0:
        torch.save(result, Path(folder, "result.pt"))
    dist.destroy_process_group()


def build_candidates(
    rank: int, size: int, device: torch.device
) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """What to time, and the bytes that leave a rank in each."""
    sizes = gradient_sizes()
    count = sum(sizes)
    gradients = torch.randn(count, device=device)
    halves = gradients.bfloat16()
    update = torch.zeros(1, dtype=torch.int64, device=device)
    ring = 2 * (size - 1) / size
    candidates: dict[str, Callable[[], object]] = {
        "all-reduce float32": lambda: dist.all_reduce(gradients),
        "all-reduce bfloat16": lambda: dist.all_reduce(halves),
    }
    num_bytes = {"all-reduce float32": ring * 4 * count, "all-reduce bfloat16": ring * 2 * count}
    for codec in CODECS:
        average = BucketAverage(
            pieces_of(sizes), codec, rank=rank, size=size, seed=0, update=update,
            group=dist.group.WORLD,
        )  # fmt: skip
        candidates[codec] = lambda average=average: average.average_(gradients)
        num_bytes[codec] = average.bytes_sent
    gather, num_bytes["gather (one-sided)"] = build_gather(sizes, rank, size, update)
    candidates["gather (one-sided)"] = lambda: gather(gradients)
    return candidates, num_bytes


def build_gather(
    sizes: list[int], rank: int, size: int, update: Tensor
) -> tuple[Callable[[Tensor], None], float]:
    """The authors' exchange in our bytes: everybody's whole message to everybody."""
    layout = lay_out(pieces_of(sizes), codec="paper", rank=0, num_ranks=1, device=update.device)
    own = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=update.device)
    everybodys = torch.zeros(size * layout.num_bytes, dtype=torch.uint8, device=update.device)
    stream = RandomStream(0, update, rank, Stage(0))

    def gather(gradients: Tensor) -> None:
        encode_gradients(gradients, layout.blocks, stream, own)
        dist.all_gather_into_tensor(everybodys, own)
        total, part = torch.zeros_like(gradients), torch.empty_like(gradients)
        for message in everybodys.view(size, -1):
            decode_gradients(message, layout.blocks, part)
            total += part
        gradients.copy_(total.div_(size))

    return gather, (size - 1) * layout.num_bytes


def network_model() -> dict[str, Any]:
    """Seconds that an update waits for its gradients if nothing hides them; calculated.

    GPUs of a machine share one network card. An all-reduce or all-gather along a ring enters and
    leaves a machine once, whatever its GPUs. `compressed` averages float32 over NVLink within a
    machine first, of which each GPU sends its share to its peers; `compressed, flat` is an
    all-to-all of all GPUs in its place, so that what crosses the card grows with those behind it.
    Over NVLink alone, as if one switch held all machines, each GPU has a link of its own.
    """
    step_ms = STEP_PASSES * IMAGES_PER_GPU / PASSES_PER_SECOND * 1e3
    rows = []
    for machines, gpus in MACHINES:
        world = machines * gpus
        for network, rate in NETWORKS.items():
            has_switch = network == "NVLink"
            ring = (world - 1) / world * ELEMENTS
            within = 2 * 4 * (gpus - 1) / gpus * ELEMENTS / NVLINK
            # Bytes over one link: of a GPU to the switch, or of a machine to the network.
            to_peers = (machines - 1) / machines * ELEMENTS / (gpus if has_switch else 1)
            to_all = ring if has_switch else (world - gpus) / world * ELEMENTS * gpus
            seconds = {
                "all-reduce float32": 2 * 4 * ring / rate,
                "all-reduce bfloat16": 2 * 2 * ring / rate,
                "compressed": within + (to_peers + ring) / rate + CODEC_SECONDS,
                "compressed, flat": (to_all + ring) / rate + CODEC_SECONDS,
                "gather (one-sided)": (world - 1) * ELEMENTS / rate + CODEC_SECONDS,
            }
            rows.append({
                "machines": f"{machines} x {gpus}",
                "network": network,
                "step_ms": step_ms,
                "milliseconds": {what: 1e3 * value for what, value in seconds.items()},
                "pays": seconds["compressed"] < seconds["all-reduce bfloat16"],
            })  # fmt: skip
    return {
        "kind": "calculated, not measured",
        "elements": ELEMENTS,
        "step_passes": STEP_PASSES,
        "images_per_gpu": IMAGES_PER_GPU,
        "passes_per_second": PASSES_PER_SECOND,
        "bytes_per_second": NETWORKS,
        "codec_ms": 1e3 * CODEC_SECONDS,
        "left_out": "latency, overlap with the backward pass, other traffic",
        "rows": rows,
    }


if __name__ == "__main__":
    main()
