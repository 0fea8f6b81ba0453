"""Validation images and the objects that are found on them, clean, corrupted and attacked."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from freeadv_fast.config.attack import Attack
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.loader import Batch
from freeadv_fast.distributed.world import World
from freeadv_fast.evaluation.detection.attack import perturb
from freeadv_fast.evaluation.detection.evaluate import DetectionEvaluation
from freeadv_fast.evaluation.detection.predict import PixelDetector
from freeadv_fast.evaluation.detection.table import percent
from freeadv_fast.evaluation.evaluate import eval_mode, exact_arithmetic
from freeadv_fast.evaluation.page.wording import corruption_title
from freeadv_fast.evaluation.pictures.corruptions import plot_corruptions
from freeadv_fast.evaluation.pictures.panels import Panel, plot_boxes
from freeadv_fast.models.normalize import unit_images
from freeadv_fast.models.retinanet import Detector
from freeadv_fast.step.objects import Objects

NUM_IMAGES = 4
# Boxes of a lower score are not drawn, and no more than so many on an image.
LOWEST_SCORE, MOST_BOXES = 0.3, 15
# Shown where the run was evaluated on none, as long as the package that makes them is installed.
SHOWN_CORRUPTIONS = {"gaussian_noise": (3,), "fog": (3,)}
SHOWN_ATTACK = "pgd-10"


def draw_detection(
    plots_folder: Path,
    *,
    model: Detector,
    loader: Any,
    config: TrainConfig,
    evaluation: DetectionEvaluation,
    world: World,
) -> list[Path]:
    """Draws ``corruptions.png`` where corruptions were evaluated, and ``boxes.png``.

    Args:
        plots_folder: Of the run.
        model: The detector; its modes are restored.
        loader: The validation images, a `DetectionLoader`.
        config: Of the run.
        evaluation: What was measured.
        world: This process; rank 0 draws.

    Returns:
        The files written.
    """
    boxes, written = plots_folder / "boxes.png", []
    if evaluation.corruptions:
        written.append(plots_folder / "corruptions.png")
        plot_corruptions({"": evaluation.record()}, written[0])
    with eval_mode(model), exact_arithmetic(world.device):
        network = PixelDetector(model, config.pixel_mean, config.pixel_std, world.device)
        columns = look(network, loader, config, evaluation)
    plot_boxes(columns, loader.classes, boxes, title=title_of(config, evaluation))
    return [*written, boxes]


def look(
    network: PixelDetector, loader: Any, config: TrainConfig, evaluation: DetectionEvaluation
) -> dict[str, list[Panel]]:
    """What is found on the first images that hold an object, by what was done to them.

    Where none of the first minibatch does, on its first images.
    """
    batch = next(iter(loader.epoch(0)))
    has_objects = Objects.of(batch.labels).is_object.any(1)
    if not has_objects.any():
        has_objects = ~has_objects
    rows = has_objects.nonzero()[:NUM_IMAGES, 0]
    clean = rows_of(batch, rows)
    images = unit_images(clean.images)
    columns = {
        "truth": true_panels(images, clean.labels),
        "clean": found_panels(network, images, clean.labels),
    }
    for name, severities in corruptions_to_show(evaluation).items():
        severity = severities[len(severities) // 2]
        corrupted = rows_of(next(iter(loader.corrupted(name, severity).epoch(0))), rows)
        panels = found_panels(network, unit_images(corrupted.images), clean.labels)
        columns[f"{corruption_title(name)}, severity {severity}"] = panels
    if config.eps.levels:
        attack = Attack.parse(next(iter(evaluation.attacks), SHOWN_ATTACK))
        attacked = perturb(
            network,
            images,
            clean,
            attack=attack,
            threat=config.evaluation_threat,
            seed=config.seed,
        )
        columns[f"{attack} within {config.eps}"] = found_panels(network, attacked, clean.labels)
    return columns


def corruptions_to_show(evaluation: DetectionEvaluation) -> dict[str, Sequence[int]]:
    """Two of the corruptions that were evaluated, far apart, or two others; with severities."""
    evaluated = {name: sorted(row) for name, row in evaluation.corruptions.items()}
    if evaluated:
        names = list(evaluated)
        return {name: evaluated[name] for name in dict.fromkeys((names[0], names[-1]))}
    is_installed = importlib.util.find_spec("imagecorruptions") is not None
    return dict(SHOWN_CORRUPTIONS) if is_installed else {}


def title_of(config: TrainConfig, evaluation: DetectionEvaluation) -> str:
    """What the pictures are."""
    return (
        f"{config.arch}, {config.method}: boxes with a score of at least {LOWEST_SCORE:g}. "
        f"AP {percent(evaluation.clean['AP'])} on clean images."
    )


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    """Some images of a minibatch."""
    return Batch(batch.images[rows], batch.labels[rows], len(rows), batch.indices[rows.cpu()])


def true_panels(images: Tensor, targets: Tensor) -> list[Panel]:
    """Images without their padding, and their objects.

    Args:
        images: (n, 3, H, W) pixels in [0, 1]. targets: Theirs, packed.
    """
    objects = Objects.of(targets)
    return [
        Panel(
            cut_out(image, size),
            boxes[is_object].cpu().numpy(),
            classes[is_object].cpu().numpy(),
        )
        for image, size, boxes, classes, is_object in zip(
            images, *objects, objects.is_object, strict=True
        )
    ]


def found_panels(network: PixelDetector, images: Tensor, targets: Tensor) -> list[Panel]:
    """Images without their padding, and what the detector finds there; as `true_panels`."""
    panels = []
    found = network.predictions(images, targets)
    for image, size, own in zip(images, Objects.of(targets).sizes, found, strict=True):
        boxes, labels, scores = (own[key].cpu().numpy() for key in ("boxes", "labels", "scores"))
        shown = np.flatnonzero(scores >= LOWEST_SCORE)[:MOST_BOXES]
        panels.append(Panel(cut_out(image, size), boxes[shown], labels[shown], scores[shown]))
    return panels


def cut_out(image: Tensor, size: Tensor) -> NDArray[np.float32]:
    """(h, w, 3) pixels of a padded (3, H, W) image of this height and width."""
    height, width = size.tolist()
    picture: NDArray[np.float32] = image[:, :height, :width].permute(1, 2, 0).cpu().numpy()
    return picture
