"""Images a second of the two decoders, DALI and torchvision, on one folder of JPEGs.

Training crops (RandomResizedCrop to 224 pixels, flip), both decoders in turn, so that another
user of the machine disturbs both alike. What is timed is what training waits for: the interval
between minibatches on the device, after the first of each turn.

    python bench/bench_loader.py --data /imagenet --seconds 60 --out bench/results/cpu/loader.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from freeadv_fast.config import TrainConfig
from freeadv_fast.data.folder import Backend, FolderLoader, build_decoder, split_folder
from freeadv_fast.data.index import ImageIndex, index_images
from freeadv_fast.data.stream import Stream

BACKENDS: tuple[Backend, ...] = ("dali", "torchvision")
IMAGE_SIZE = 224
BATCH_SIZE = 64
NUM_ROUNDS = 5
# Each sample image appears under so many names, so that an epoch outlasts a turn.
NUM_COPIES = 64
REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    """Parses the flags, measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="ImageFolder; default: 200 ImageNet photographs")
    parser.add_argument("--seconds", type=float, default=40, help="time for all turns together")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        data = flags.data or sample_folder(Path(temporary))
        config = TrainConfig(
            data=data, image_size=IMAGE_SIZE, batch_size=BATCH_SIZE, workers=flags.workers
        )
        index = index_images(split_folder(data, "train"), config.max_bad_fraction, print)
        samples = measure(index, config, flags.seconds)
    result = {
        "benchmark": "loader",
        "command": f"python bench/bench_loader.py {' '.join(sys.argv[1:])}".strip(),
        "data": flags.data or "imagenet_sample200",
        "environment": environment(),
        "settings": {
            "batch_size": BATCH_SIZE,
            "image_size": IMAGE_SIZE,
            "workers": flags.workers,
            "mean_megapixels": float(index.sizes.prod(axis=1).mean() / 1e6),
        },
        "results": {name: summary(rates, flags.workers) for name, rates in samples.items()},
    }
    for name, row in result["results"].items():
        print(
            f"{name:12s} {row['images_per_second']:8.1f} images/s "
            f"({row['lowest']:.1f} to {row['highest']:.1f}), {row['per_core']:.1f} a core"
        )
    if flags.out:
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        flags.out.write_text(json.dumps(result, indent=2) + "\n")


def measure(index: ImageIndex, config: TrainConfig, seconds: float) -> dict[str, list[float]]:
    """Images a second of each decoder and round, the decoders in turn."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    rows = np.arange(len(index.files))
    loaders = {
        name: FolderLoader(
            index,
            Stream(rows, config.batch_size, rank=0, world_size=1, seed=0),
            build_decoder(name, index, config, device),
            config,
            device,
        )
        for name in BACKENDS
    }
    rates: dict[str, list[float]] = {name: [] for name in BACKENDS}
    for turn in range(NUM_ROUNDS):
        order = BACKENDS if turn % 2 == 0 else BACKENDS[::-1]
        for name in order:
            rates[name].append(one_turn(loaders[name], turn, seconds / NUM_ROUNDS / len(order)))
    return rates


def one_turn(loader: FolderLoader, epoch: int, seconds: float) -> float:
    """Images a second over about `seconds`, from the first minibatch's arrival on."""
    batches = loader.epoch(epoch)
    next(batches)
    start, num_images = time.perf_counter(), 0
    for batch in batches:
        num_images += len(batch.images)
        if time.perf_counter() - start >= seconds:
            break
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    batches.close()
    return num_images / elapsed


def summary(rates: list[float], workers: int) -> dict[str, object]:
    """Median and spread; `per_core` divides by the cores that the decoder can use."""
    cores = min(max(workers, 1), len(os.sched_getaffinity(0)))
    return {
        "images_per_second": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "per_core": statistics.median(rates) / cores,
        "samples": rates,
    }


def sample_folder(place: Path) -> str:
    """The test data's 200 ImageNet photographs as train/, under NUM_COPIES names each."""
    shared = Path(os.environ.get("FREEADV_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    archive = shared / "imagenet_sample200" / "imagenet_sample200.zip"
    if not archive.is_file():
        sys.exit("error: --data: name an ImageFolder, or set FREEADV_TEST_DATA")
    with zipfile.ZipFile(archive) as files:
        names = [name for name in files.namelist() if name.endswith(".JPEG")]
        files.extractall(place / "files", names)
    for name in names:
        folder = place / "train" / Path(name).stem
        folder.mkdir(parents=True)
        for copy in range(NUM_COPIES):
            (folder / f"{copy:02d}.JPEG").symlink_to(place / "files" / name)
    return str(place)


def environment() -> dict[str, object]:
    """Hardware, versions and commit."""
    names = ("torch", "torchvision", "nvidia-dali-cuda130", "pillow", "numpy")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True
    )
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "cpu": cpu[0].partition(": ")[2] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in names},
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
