"""Average precision of a detector: clean, attacked and corrupted, the same on every rank."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from freeadv_fast.config.attack import Attack
from freeadv_fast.config.threat import AnyThreatModel
from freeadv_fast.data.coco.loader import DetectionLoader
from freeadv_fast.distributed.world import World
from freeadv_fast.evaluation.detection.attack import parse_attacks, perturb
from freeadv_fast.evaluation.detection.average_precision import (
    Precision,
    average_precision,
    find_package,
)
from freeadv_fast.evaluation.detection.corruptions import (
    is_benchmark,
    mean_precision,
    parse_corruptions,
    relative_precision,
)
from freeadv_fast.evaluation.detection.ledger import (
    Precisions,
    digest_of,
    read_ledger,
    write_ledger,
)
from freeadv_fast.evaluation.detection.predict import (
    Change,
    PixelDetector,
    detect,
    on_own_canvases,
)
from freeadv_fast.evaluation.detection.table import corruption_lines, percent, precision_table
from freeadv_fast.evaluation.evaluate import eval_mode, exact_arithmetic
from freeadv_fast.models.retinanet import Detector

# Corruption's name to severity to the images under it.
CorruptedLoaders = dict[str, dict[int, DetectionLoader]]


@dataclasses.dataclass(frozen=True)
class DetectionEvaluation:
    """What a detector comes to; fractions, None where no object defines a number.

    Attributes:
        clean: COCO's twelve numbers by name, see `average_precision.NAMES`.
        per_class: AP of each class by its name.
        attacks: Attack's name to the twelve numbers on the images that it made.
        corruptions: Corruption's name to severity to AP.
        num_images: Images of each of these, over all ranks.
        seconds: Wall time, images' decoding and corruption included.
        seed: Seed of the attacks.
        ledgers: Files of this rank's folder that make a killed evaluation go on; whoever keeps
            these numbers forgets them (`autoattack.ledger.forget`).
    """

    clean: dict[str, float | None]
    per_class: dict[str, float | None]
    attacks: dict[str, dict[str, float | None]]
    corruptions: Precisions
    num_images: int
    seconds: float
    seed: int = 0
    ledgers: tuple[Path, ...] = dataclasses.field(default=(), repr=False, compare=False)

    @property
    def mean_corrupted(self) -> float | None:
        """mPC: the mean AP under corruption; None where none was asked for."""
        return mean_precision(self.corruptions)

    @property
    def relative(self) -> float | None:
        """rPC: mPC as a share of the clean AP."""
        return relative_precision(self.mean_corrupted, self.clean["AP"])

    def record(self) -> dict[str, Any]:
        """What result.json holds of it."""
        return {
            "clean": self.clean,
            "per_class": self.per_class,
            "attacks": self.attacks,
            "corruptions": self.corruptions,
            "mean_corrupted": self.mean_corrupted,
            "relative": self.relative,
            "is_benchmark": is_benchmark(self.corruptions),
            "num_images": self.num_images,
            "seconds": round(self.seconds, 3),
            "seed": self.seed,
        }

    def lines(self, attack_step: str) -> list[str]:
        """Tables for the terminal; `attack_step` is the attacks' step, such as ``1/255``."""
        table = precision_table(self.clean, self.attacks, attack_step, self.num_images)
        return table + corruption_lines(self.corruptions, self.clean["AP"], self.num_images)


def evaluate_detector(
    model: Detector,
    loader: DetectionLoader,
    attacks: Sequence[Attack | str],
    threat: AnyThreatModel,
    corruptions: Mapping[str, Sequence[int]],
    *,
    world: World,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int = 0,
    progress: bool = True,
    label: str = "evaluate",
    folder: Path | None = None,
) -> DetectionEvaluation:
    """Measures average precision on clean, on attacked and on corrupted images.

    fp32 without TF32 or autocast, in eval mode; the model's modes are restored. Every rank calls
    it with its share of the images; no image counts twice. Random starts are a function of
    (seed, index of a batch's first image), the same for every attack.

    Args:
        model: Detector of normalised images, not wrapped by DDP, on `world.device`.
        loader: This rank's share of the images; read once for each attack and corruption.
        attacks: PGD's of any length, or their names; may be empty.
        threat: Radius and step of all attacks.
        corruptions: Name to severities, as `parse_corruptions` returns them; may be empty.
        world: The ranks.
        mean: Per-channel mean that the network's input was normalised with, in [0, 1].
        std: Per-channel standard deviation, likewise.
        seed: Seed of the random starts.
        progress: Draw a bar, on rank 0 of a terminal; elsewhere say a line a corruption.
        label: Text before the bar.
        folder: Where the precision under each corruption is kept until this returns, so that it
            goes on there once it was killed. None keeps nothing.

    Returns:
        The same numbers on every rank.

    Raises:
        ValueError: no images. As a `UserError` also an attack that detectors do not take, no
            package that computes average precision, or an image too small to be corrupted.
    """
    started = time.perf_counter()
    parsed = parse_attacks(attacks, threat)
    world.together(find_package)
    corrupted = world.together(lambda: corrupted_loaders(loader, corruptions))
    network = PixelDetector(model, mean, std, world.device)
    trial = _Trial(network, world, label, progress)
    with eval_mode(model), exact_arithmetic(world.device):
        clean = trial.measure(loader, "clean")
        attacked = {}
        for attack in parsed:
            change = partial(perturb, network, attack=attack, threat=threat, seed=seed)
            attacked[str(attack)] = trial.measure(loader, str(attack), change).precision.numbers
        path = None
        if folder is not None and corruptions and world.is_main:
            digest = digest_of(model, mean, std, loader, clean.image_ids)
            path = folder / f"corruptions-{digest}.json"
        precisions = trial.measure_corrupted(corrupted, path)
    return DetectionEvaluation(
        clean=clean.precision.numbers,
        per_class=clean.precision.per_class,
        attacks=attacked,
        corruptions=precisions,
        num_images=len(clean.image_ids),
        seconds=time.perf_counter() - started,
        seed=seed,
        ledgers=() if path is None else (path,),
    )


def refuse_unmeasurable(corruptions: Sequence[str], loader: DetectionLoader) -> None:
    """Refuses what a detector's evaluation could not do, before it is trained for hours.

    Args:
        corruptions: As --eval-corruptions names them.
        loader: Of the images that will be evaluated.

    Raises:
        UserError: no such corruption, an image too small for it, or a package that measures or
            corrupts is missing.
    """
    find_package()
    for name, severities in list(parse_corruptions(corruptions).items())[:1]:
        loader.corrupted(name, severities[0])


def corrupted_loaders(
    loader: DetectionLoader, corruptions: Mapping[str, Sequence[int]]
) -> CorruptedLoaders:
    """The images under each corruption, made when they are read.

    Args:
        loader: Of clean images. corruptions: Name to severities.

    Raises:
        UserError: the package that corrupts them is missing, or an image is too small.
    """
    return {
        name: {severity: loader.corrupted(name, severity) for severity in severities}
        for name, severities in corruptions.items()
    }


class _Measured(NamedTuple):
    """Precision, and the ids of the images that it is of."""

    precision: Precision
    image_ids: list[int]


class _Trial(NamedTuple):
    """One detector and the ranks that evaluate it."""

    network: PixelDetector
    world: World
    label: str
    is_shown: bool

    def measure(
        self, loader: DetectionLoader, doing: str, change: Change | None = None
    ) -> _Measured:
        """Precision on the images of all ranks; every rank calls it and returns the same.

        Args:
            loader: This rank's share. doing: Text of the bar.
            change: What is done to the images before.

        Raises:
            ValueError: no images.
        """
        is_silent = not (self.is_shown and self.world.is_main and sys.stderr.isatty())
        batches = tqdm(
            loader.epoch(0), f"{self.label}, {doing}", loader.num_batches,
            leave=False, disable=is_silent, unit="batch",
        )  # fmt: skip
        annotations = loader.annotations
        with batches:
            parts = on_own_canvases(batches, loader.canvases)
            found = detect(self.network, parts, annotations, self.world, change)
        image_ids = self.world.on_main(lambda: sorted(found))
        if not image_ids:
            raise ValueError("no images to evaluate")
        precision = self.world.on_main(lambda: average_precision(annotations.record, found))
        return _Measured(precision, image_ids)

    def measure_corrupted(self, loaders: CorruptedLoaders, path: Path | None) -> Precisions:
        """AP under each corruption; what the file at rank 0's `path` knows is not done again."""
        found = self.world.on_main(lambda: read_ledger(path))
        for name, by_severity in loaders.items():
            own = found.setdefault(name, {})
            for severity, loader in by_severity.items():
                if severity not in own:
                    measured = self.measure(loader, f"{name} {severity}")
                    own[severity] = measured.precision.numbers["AP"]
                    if self.world.is_main:
                        write_ledger(path, found)
            self.say(f"{name}: AP " + ", ".join(f"{percent(own[s])} at {s}" for s in by_severity))
        return {name: {s: found[name][s] for s in row} for name, row in loaders.items()}

    def say(self, text: str) -> None:
        """A line where no bar is drawn."""
        if self.is_shown and self.world.is_main and not sys.stderr.isatty():
            print(f"{self.label}: {text}", flush=True)
