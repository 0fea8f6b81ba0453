"""Images a second of the two decoders, DALI and torchvision, on one folder of JPEGs.

Training crops (RandomResizedCrop to 224 pixels, flip), all decoders in turn, so that another user
of the machine disturbs them alike. What is timed is what training waits for: the interval between
minibatches on the device, after the first of each turn. On a GPU DALI decodes there (`dali`), and
on the CPU into the GPU's memory (`dali_on_cpu`): of this rate a run needs nine tenths of what
training asks for to leave the GPU alone.

    python bench/bench_loader.py --data /imagenet --seconds 60 --out bench/results/cpu/loader.json
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.decoding import Place
from freeadv_fast.data.folder import Backend, FolderLoader, build_decoder, split_folder
from freeadv_fast.data.index import ImageIndex, index_images
from freeadv_fast.data.stream import Stream

# The decoders by name: which library, and what decodes where minibatches live on a GPU.
DECODERS: dict[str, tuple[Backend, Place]] = {
    "dali": ("dali", "GPU"),
    "dali_on_cpu": ("dali", "CPU"),
    "torchvision": ("torchvision", "CPU"),
}
IMAGE_SIZE = 224
BATCH_SIZE = 64
NUM_ROUNDS = 5
# Each sample image appears under so many names, so that an epoch outlasts a turn.
NUM_COPIES = 64


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
        rates = measure(index, config, flags.seconds)
    results = {name: summary(samples, flags.workers) for name, samples in rates.items()}
    for name, row in results.items():
        print(
            f"{name:12s}{row['median']:9.1f} images/s ({row['p20']:.1f} to {row['p80']:.1f}), "
            f"{row['per_core']:.1f} a core"
        )
    record = {
        "benchmark": "loader",
        "environment": harness.environment_record(harness.default_device()),
        "settings": {
            "data": flags.data or "imagenet_sample200",
            "batch_size": BATCH_SIZE,
            "image_size": IMAGE_SIZE,
            "workers": flags.workers,
            "mean_megapixels": float(index.sizes.prod(axis=1).mean() / 1e6),
        },
        "images_per_second": results,
    }
    if flags.out:
        harness.write_json(flags.out, record)


def measure(index: ImageIndex, config: TrainConfig, seconds: float) -> dict[str, list[float]]:
    """Images a second of each decoder and round, the decoders in turn."""
    device = harness.default_device()
    rows = np.arange(len(index.files))
    # Without a GPU there is one place only.
    names = [name for name in DECODERS if name != "dali_on_cpu" or device.type == "cuda"]
    loaders = {}
    for name in names:
        backend, place = DECODERS[name]
        stream = Stream(rows, config.batch_size, rank=0, world_size=1, seed=0)
        decoder = build_decoder(backend, index, config, device, place=place)
        loaders[name] = FolderLoader(index, stream, decoder, config, device)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(NUM_ROUNDS):
        for name in names if turn % 2 == 0 else names[::-1]:
            rates[name].append(one_turn(loaders[name], turn, seconds / NUM_ROUNDS / len(names)))
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


def summary(rates: list[float], workers: int) -> dict[str, Any]:
    """Median and spread; `per_core` divides by the cores that the decoder can use."""
    cores = min(max(workers, 1), len(os.sched_getaffinity(0)))
    found = harness.summarize(rates)
    return {**found, "per_core": found["median"] / cores, "samples": rates}


def sample_folder(place: Path) -> str:
    """The test data's 200 ImageNet photographs as train/, under NUM_COPIES names each."""
    shared = Path(
        os.environ.get("FREEADV_TEST_DATA", harness.REPOSITORY.parent / "shared" / "data")
    )
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


if __name__ == "__main__":
    main()
