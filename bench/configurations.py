"""A thousand configurations at random: each trains two minibatches or is refused in one line.

python bench/configurations.py --number 1000 --out bench/results/cpu/configurations.json

Stops with a traceback at the first that does neither, or that takes more than a minute.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness import environment_record, write_json
from PIL import Image

TESTS = Path(__file__).resolve().parents[1] / "tests" / "integration"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--number", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(TESTS))
    from any_configuration import LIMIT_SECONDS, try_configurations

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder, "images"))
        with contextlib.redirect_stdout(io.StringIO()):
            trained, refused = try_configurations(flags.number, f"{folder}/images", folder)
    by_flag = collections.Counter(line.split()[0].rstrip(":") for line in refused)
    record = {
        "environment": environment_record(torch.device("cpu")),
        "configurations": len(trained) + len(refused),
        "trained": len(trained),
        "refused_in_one_line": len(refused),
        "limit_seconds_each": LIMIT_SECONDS,
        "seconds": round(time.monotonic() - started),
        "refusals_by_first_word": dict(by_flag.most_common()),
    }
    write_json(flags.out, record)
    print({key: record[key] for key in ("configurations", "trained", "refused_in_one_line")})


def make_images(root: Path) -> None:
    """An ImageFolder of three classes of 24x20 JPEG files: 114 for training, 18 for validation."""
    random = np.random.default_rng(0)
    for split, count in (("train", 38), ("val", 6)):
        for label in range(3):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8) // 2 + 60 * label
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.jpg")


if __name__ == "__main__":
    main()
