"""A run read back from its folder, and its network."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import cast

from torch import nn

from freeadv_fast.config.file import load_config
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.errors import UserError
from freeadv_fast.models.normalize import with_normalizer
from freeadv_fast.models.own import adopt, refuse_unnamed_network
from freeadv_fast.models.retinanet import Detector, build_detector
from freeadv_fast.models.zoo import build_model
from freeadv_fast.runs.checkpoint import BEST, LAST, load_checkpoint, load_weights
from freeadv_fast.runs.log import RunFolder

# The name of the averaged weights, which lie in the same file as the last ones.
AVERAGE = "average"


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """What a run left behind.

    Attributes:
        folder: Paths of the run.
        config: The config it was made with.
        checkpoint: The file that the weights are from.
        is_averaged: Whether they are the average that it holds, beside other weights.
        classes: Class names; a label is an index into this list.
        model: The network of normalised images, on the CPU, in training mode.
    """

    folder: RunFolder
    config: TrainConfig
    checkpoint: Path
    classes: list[str]
    model: nn.Module
    is_averaged: bool = False

    @property
    def weights(self) -> str:
        """What the weights are called: ``average``, or as their file: ``last.pt``, ``best.pt``.

        Of a checkpoint that is not in the run's own folder its whole path, for its accuracies are
        not the run's.
        """
        if not self.is_own:
            return str(self.checkpoint.resolve())
        return AVERAGE if self.is_averaged else self.checkpoint.name

    @property
    def is_own(self) -> bool:
        """Whether the weights are from the run's own checkpoints."""
        return self.checkpoint.parent.resolve() == self.folder.checkpoints.resolve()

    @property
    def network(self) -> nn.Module:
        """`model` behind its normaliser, in eval mode.

        (n, 3, H, W) float32 pixels in [0, 1] to (n, classes) float32 logits, or to a detector's
        `HeadOutputs`.
        """
        config = self.config
        return with_normalizer(self.model, config.pixel_mean, config.pixel_std).eval()

    @property
    def detector(self) -> Detector:
        """`model` of a run that trained a detector, in eval mode.

        It takes (n, 3, H, W) float32 images, normalised with `config.pixel_mean` and `pixel_std`,
        and then 0 outside of each image.

        Raises:
            UserError: the run trained a classifier.
        """
        if self.config.task != "detection":
            raise UserError(
                f"RUN {self.folder.root}: of a classifier, {self.config.arch}; this takes "
                "detectors only"
            )
        return cast(Detector, self.model.eval())


def refuse_detector(config: TrainConfig, origin: str, why: str) -> None:
    """Keeps detectors from what only classifiers have.

    Args:
        config: Of the run.
        origin: The flag, and the run or what else was asked for.
        why: What is for classifiers alone, or what to do instead.

    Raises:
        UserError: the run trained a detector.
    """
    if config.task == "detection":
        raise UserError(f"{origin}: of a detector, {config.arch}; {why}")


def is_run(subject: str | Path) -> bool:
    """Whether a path is a run's folder."""
    return RunFolder(Path(subject).expanduser()).config.is_file()


def load_run(
    run_folder: str | Path, checkpoint: str = "last", *, model: nn.Module | None = None
) -> SavedRun:
    """Rebuilds a run's network from its folder.

    Args:
        run_folder: The run's output folder.
        checkpoint: ``last``, whose accuracies are the run's result, ``best`` by the held-out
            images (each stands for the other where that is missing), ``average`` for the averaged
            weights beside the last ones, or the path of a checkpoint.
        model: Your own network where the run trained one: a module of the same class and shapes,
            of which a copy takes the weights.

    Returns:
        The run; its `network` takes pixels, the `detector` of one that detects normalised images.

    Raises:
        UserError: not a run's folder, no such checkpoint, a damaged or foreign one, or weights that
            belong to another network; a `ValueError` with one line.
    """
    folder = RunFolder(Path(run_folder).expanduser())
    if not is_run(run_folder):
        raise UserError(f"RUN {run_folder}: not a run's folder; it has no {folder.config.name}")
    config = load_config(folder.config)
    path = _checkpoint_path(folder, checkpoint)
    state = load_checkpoint(path, "--checkpoint")
    classes = state.get("classes")
    if not isinstance(classes, list):
        raise UserError(f"--checkpoint {path}: no class names; not a checkpoint of a run")
    is_averaged = checkpoint == AVERAGE
    if is_averaged:
        average = state.get("average")
        if average is None:
            raise UserError(
                f"--checkpoint average: {path} holds none, it was trained without --ema; use last "
                "or best"
            )
        state = average
    built = _build(config, len(classes), model)
    load_weights(built, state, config.arch, f"--checkpoint {path}")
    return SavedRun(folder, config, path, classes, built, is_averaged)


def _build(config: TrainConfig, num_classes: int, own: nn.Module | None) -> nn.Module:
    """The run's network, with any weights: the one that its config names, or a copy of `own`."""
    if config.task == "detection":
        if own is not None:
            raise UserError(
                f"model: the run trained {config.arch}, built by its name; leave it out"
            )
        return build_detector(config.arch, num_classes)
    standardize = config.normalization == "per-image"
    if own is not None:
        return adopt(
            own, num_classes, image_sizes=[config.image_size], per_image_standardize=standardize
        )
    refuse_unnamed_network(config.arch)
    return build_model(
        config.arch, num_classes, image_size=config.image_size, per_image_standardize=standardize
    )


def _checkpoint_path(folder: RunFolder, checkpoint: str) -> Path:
    """The file that ``best``, ``last``, ``average`` or a path means."""
    best, last = folder.checkpoints / BEST, folder.checkpoints / LAST
    if checkpoint == "best":
        return best if best.exists() else last
    if checkpoint == "last":
        return last if last.exists() else best
    if checkpoint == AVERAGE:
        return last
    return Path(checkpoint).expanduser()
