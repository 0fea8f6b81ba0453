"""Hours of free training on ImageNet, projected from measured passes a second.

    python bench/bench_cost.py bench/results/h200/step-resnet50-224.json
    python bench/bench_cost.py bench/results/h200/ladder.json --out bench/results/h200/cost.json
    python bench/bench_cost.py --passes-per-second 7000

A projection, not a measurement: nobody trained for these hours. It divides the passes of a run by
the rate of a `bench_step` (alone or in a ladder) that was measured on a GPU, at 224 px, on
pixels resident there. A rate typed in (`--passes-per-second`) makes a table that says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import harness
import torch
from floors import Floors, markdown

ARCHS = ("resnet50", "resnet101", "resnet152")
IMAGE_SIZE = 224
# The training images of ILSVRC 2012.
NUM_IMAGES = 1_281_167
# ceil(90 / 4) passes over the data, as the paper's code rounds (main_free.py, line 47).
M, EPOCHS = 4, 23
PASSES = NUM_IMAGES * EPOCHS * M
# Plan of `floors.py` whose bytes scale a rate from one network to another.
PLAN = "B2"


@dataclasses.dataclass(frozen=True)
class Rate:
    """Free training's image passes a second on one GPU.

    Attributes:
        passes_per_second: The rate. device: The GPU's name, or none.
        origin: File, batch size and precision that it comes from, or how it was derived.
    """

    passes_per_second: float
    device: str
    origin: str


def main() -> None:
    """Reads rates, prints the projected hours and writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, help="JSON of bench_step.py or run_gpu.py")
    parser.add_argument(
        "--passes-per-second", type=float, help="ResNet-50's on one GPU, where none is measured"
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument(
        "--efficiency",
        type=float,
        nargs="+",
        default=[1.0, 0.98, 0.97],
        help="rate of n GPUs over n times the rate of one, for each of --gpus",
    )
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    flags = parser.parse_args()
    if len(flags.gpus) != len(flags.efficiency):
        parser.error(f"--efficiency: give one for each of --gpus {flags.gpus}")
    measured = measured_rates(flags.results)
    if not measured:
        files = ", ".join(map(str, flags.results)) or "any file, for none was named"
        print(f"nothing was measured: no free training at {IMAGE_SIZE} px on a GPU in {files}")
        if flags.passes_per_second is None:
            parser.exit(1, "name a rate with --passes-per-second, or a file that holds one\n")
        # The other networks' rates follow from it.
        measured = {ARCHS[0]: Rate(flags.passes_per_second, "none", "typed, not measured")}
    if len({rate.device for rate in measured.values()}) > 1:
        parser.error("the files hold rates of different devices; name those of one")
    rates = all_rates(measured)
    efficiency = dict(zip(flags.gpus, flags.efficiency, strict=True))
    record = {
        "benchmark": "cost",
        "kind": "projection",
        "environment": harness.environment_record(torch.device("cpu")),
        "assumptions": assumptions(efficiency),
        "rates": {arch: dataclasses.asdict(rate) for arch, rate in rates.items()},
        "hours": [
            {"arch": arch, "gpus": gpus, "hours": hours(rate.passes_per_second, gpus, share)}
            for arch, rate in rates.items()
            for gpus, share in efficiency.items()
        ],
    }
    report(record)
    if flags.out:
        harness.write_json(flags.out, record)


def hours(passes_per_second: float, gpus: int, efficiency: float) -> float:
    """Hours of a whole run on `gpus` of them, at one's rate and this scaling efficiency."""
    return PASSES / (passes_per_second * gpus * efficiency) / 3600


def measured_rates(files: list[Path]) -> dict[str, Rate]:
    """The best measured rate of each network, over the files' batch sizes and precisions.

    Only free training on a GPU at 224 px counts.
    """
    found: dict[str, Rate] = {}
    for file in files:
        record = json.loads(file.read_text())
        device = record["environment"]["device"]
        for step in (record, *record.get("sections", {}).values()):
            settings = step.get("settings", {})
            row = step.get("results", {}).get("free") if step.get("benchmark") == "step" else None
            arch = settings.get("arch")
            if not row or device == "cpu" or settings["image_size"] != IMAGE_SIZE:
                continue
            rate = row["image_passes_per_second"]
            if arch in ARCHS and (arch not in found or rate > found[arch].passes_per_second):
                origin = f"{file}, batch {settings['batch_size']}, {settings['precision']}"
                found[arch] = Rate(rate, device, origin)
    return found


def all_rates(known: dict[str, Rate]) -> dict[str, Rate]:
    """Rates of all three networks: what is not known follows from the smallest known network.

    By the floors' bytes, for all three are bound by memory.
    """
    base = next(arch for arch in ARCHS if arch in known)
    moved = {arch: bytes_of(arch) for arch in ARCHS}
    rates = {}
    for arch in ARCHS:
        ratio = moved[arch] / moved[base]
        origin = f"{base}'s divided by {ratio:.2f}, the floors' bytes (plan {PLAN})"
        scaled = Rate(known[base].passes_per_second / ratio, known[base].device, origin)
        rates[arch] = known.get(arch, scaled)
    return rates


def bytes_of(arch: str) -> float:
    """Bytes of a free pass over one image."""
    return Floors.of_arch(arch, IMAGE_SIZE).bytes(PLAN, image_gradient=True)


def assumptions(efficiency: dict[int, float]) -> list[str]:
    """What the projection takes for granted."""
    scaling = ", ".join(f"{gpus}: {share:g}" for gpus, share in efficiency.items())
    return [
        f"Free-{M}: {EPOCHS} data epochs x {M} replays x {NUM_IMAGES:,} images = "
        f"{PASSES / 1e6:.1f} M passes at {IMAGE_SIZE} px",
        f"scaling efficiency by GPUs: {scaling}; stated, not measured (notes, performance.md "
        "section 7, expects 0.97 to 0.99 of data parallelism)",
        "the rate on resident pixels holds for the whole run: no loading, checkpoint, validation "
        "or evaluation",
    ]


def report(record: dict[str, Any]) -> None:
    """Prints the projection as a table of hours."""
    found = {(row["arch"], row["gpus"]): row["hours"] for row in record["hours"]}
    counts = list(dict.fromkeys(gpus for _, gpus in found))
    rows = []
    for arch, rate in record["rates"].items():
        cells = [f"{found[arch, gpus]:.2f}" for gpus in counts]
        rows.append([arch, f"{rate['passes_per_second']:,.0f}", *cells, rate["origin"]])
    header = ["network", "passes/s", *(f"hours on {n} GPU" for n in counts), "rate from"]
    devices = {rate["device"] for rate in record["rates"].values()}
    print(f"PROJECTION of Free-{M} on ImageNet, not measured. Device: {', '.join(sorted(devices))}")
    print(markdown(header, rows))
    for line in record["assumptions"]:
        print(f"- {line}")


if __name__ == "__main__":
    main()
