"""A run read back from its folder: its network, and its export once more."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import nn

from freeadv_fast.config.file import load_config
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.errors import UserError
from freeadv_fast.models.normalize import with_normalizer
from freeadv_fast.models.own import adopt, refuse_unnamed_network
from freeadv_fast.models.zoo import build_model
from freeadv_fast.runs.checkpoint import BEST, LAST, load_checkpoint, load_weights
from freeadv_fast.runs.export import export_model
from freeadv_fast.runs.log import RunFolder


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """What a run left behind.

    Attributes:
        folder: Paths of the run.
        config: The config it was made with.
        checkpoint: The file that the weights are from.
        classes: Class names; a label is an index into this list.
        model: The network of normalised images, on the CPU, in training mode.
    """

    folder: RunFolder
    config: TrainConfig
    checkpoint: Path
    classes: list[str]
    model: nn.Module

    @property
    def network(self) -> nn.Module:
        """`model` behind its normaliser, in eval mode.

        (n, 3, H, W) float32 pixels in [0, 1] to (n, classes) float32 logits.
        """
        config = self.config
        return with_normalizer(self.model, config.pixel_mean, config.pixel_std).eval()


def load_run(
    run_folder: str | Path, checkpoint: str = "last", *, model: nn.Module | None = None
) -> SavedRun:
    """Rebuilds a run's network from its folder.

    Args:
        run_folder: The run's output folder.
        checkpoint: ``last``, whose accuracies are the run's result, ``best`` by the held-out
            images (each stands for the other where that is missing), or the path of a checkpoint.
        model: Your own network where the run trained one: a module of the same class and shapes,
            of which a copy takes the weights.

    Returns:
        The run; its `network` takes pixels.

    Raises:
        UserError: not a run's folder, no such checkpoint, a damaged or foreign one, or weights that
            belong to another network; a `ValueError` with one line.
    """
    folder = RunFolder(Path(run_folder).expanduser())
    if not folder.config.is_file():
        raise UserError(f"RUN {run_folder}: not a run's folder; it has no {folder.config.name}")
    config = load_config(folder.config)
    path = _checkpoint_path(folder, checkpoint)
    state = load_checkpoint(path, "--checkpoint")
    classes = state.get("classes")
    if not isinstance(classes, list):
        raise UserError(f"--checkpoint {path}: no class names; not a checkpoint of a run")
    built = _build(config, len(classes), model)
    load_weights(built, state, config.arch, f"--checkpoint {path}")
    return SavedRun(folder, config, path, classes, built)


def _build(config: TrainConfig, num_classes: int, own: nn.Module | None) -> nn.Module:
    """The run's network, with any weights: the one that its config names, or a copy of `own`."""
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
    """The file that ``best``, ``last`` or a path means."""
    best, last = folder.checkpoints / BEST, folder.checkpoints / LAST
    if checkpoint == "best":
        return best if best.exists() else last
    if checkpoint == "last":
        return last if last.exists() else best
    return Path(checkpoint).expanduser()


def export_run(
    run_folder: str | Path,
    output_dir: str | Path | None = None,
    checkpoint: str = "last",
    *,
    model: nn.Module | None = None,
) -> Path:
    """Exports a run's network again.

    Args:
        run_folder: The run's output folder.
        output_dir: Folder to write; ``export`` in the run's folder by default.
        checkpoint: ``last``, ``best`` or a path.
        model: Your own network where the run trained one, as for `load_run`.

    Returns:
        The folder written.

    Raises:
        UserError: no such run or checkpoint.
    """
    run = load_run(run_folder, checkpoint, model=model)
    return export_model(
        run.model,
        run.folder.export if output_dir is None else Path(output_dir).expanduser(),
        arch=run.config.arch,
        classes=run.classes,
        mean=run.config.pixel_mean,
        std=run.config.pixel_std,
        image_size=run.config.image_size,
        resize_size=run.config.evaluation_resize,
    )
