"""Where JPEGs are decoded on a machine with a GPU: what decides it, in numbers and in words.

A GPU that decodes has less time to train: ResNet-50 at 224 px made 7,300 natural passes a second on
an H200 that decoded its images, and 10,300 of images in memory (bench/results/h200/from-jpeg.json,
step-resnet50-224-products.json). The processor's threads take none of it, and free-m asks for an
m-th of the images only. So they decode, unless training would wait for them longer than for a GPU
that does both.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

Place = Literal["CPU", "GPU"]

# Minibatches that DALI decodes ahead.
QUEUE_DEPTH = 2

# Images a second that the threads must be able to decode, in those that training asks for. The H200
# that decoded made 0.80 of them (7,300 of 9,090, from-jpeg.json), and a tenth is what threads that
# are timed alone may lose to training's own threads, which launch kernels.
ENOUGH = 0.9


@dataclasses.dataclass(frozen=True)
class Choice:
    """Where a phase's training images are decoded, from which minibatch on, and why.

    Attributes:
        place: On the CPU, or on the GPU: by its JPEG engine where it has one, and its kernels.
        threads: Of each rank, that decode on the CPU. ranks: How many ranks.
        decoded: Images a second that a rank's threads decode, of the slowest rank.
        asked: Images a second that a rank's training takes, of the fastest rank.
        cores: Processors for each rank, of the machine that has fewest.
        epoch: Data epoch of the first minibatch that is decoded there; those before it were decoded
            on the CPU. minibatch: Its position in that epoch.
    """

    place: Place
    threads: int
    ranks: int
    decoded: int
    asked: int
    cores: int
    epoch: int
    minibatch: int

    def __str__(self) -> str:
        """Which, and why."""
        threads = "1 thread decodes" if self.threads == 1 else f"{self.threads} threads decode"
        threads = f"each rank's {threads}" if self.ranks > 1 else threads
        there = " on the CPU" if self.place == "GPU" else ""
        why = f"{threads} {self.decoded:,} images/s{there}, training asks for {self.asked:,}"
        enough = math.ceil(self.threads * self.asked / max(self.decoded, 1))
        if self.threads < enough <= self.cores:
            why += f" (--workers {enough} may do)"
        return f"on the {self.place}: {why}"

    def record(self) -> dict[str, Any]:
        """What result.json holds."""
        return {
            "place": self.place,
            "threads": self.threads,
            "cpu_images_per_second": self.decoded,
            "asked_images_per_second": self.asked,
        }


def place_for(decoded: float, asked: float) -> Place:
    """Where to decode.

    Args:
        decoded: Images a second that the threads decode on the CPU.
        asked: Images a second that training takes.
    """
    return "CPU" if decoded >= ENOUGH * asked else "GPU"
