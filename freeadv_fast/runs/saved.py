"""A run read back from its folder: its network, and its export once more."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import nn

from freeadv_fast.config.file import load_config
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.errors import UserError
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
        model: The network, on the CPU, in training mode.
    """

    folder: RunFolder
    config: TrainConfig
    checkpoint: Path
    classes: list[str]
    model: nn.Module


def load_run(run_folder: str | Path, checkpoint: str = "best") -> SavedRun:
    """Rebuilds a run's network from its folder.

    Args:
        run_folder: The run's output folder.
        checkpoint: ``best`` (``last`` where no held-out images selected one), ``last``, or the
            path of a checkpoint.

    Raises:
        UserError: not a run's folder, no such checkpoint, or a damaged or foreign one.
    """
    folder = RunFolder(Path(run_folder))
    if not folder.config.is_file():
        raise UserError(f"RUN {run_folder}: not a run's folder; it has no {folder.config.name}")
    config = load_config(folder.config)
    path = _checkpoint_path(folder, checkpoint)
    state = load_checkpoint(path, "--checkpoint")
    classes = state.get("classes")
    if not isinstance(classes, list):
        raise UserError(f"--checkpoint {path}: no class names; not a checkpoint of a run")
    model = build_model(
        config.arch,
        len(classes),
        image_size=config.image_size,
        per_image_standardize=config.normalization == "per-image",
    )
    load_weights(model, state, config.arch, f"--checkpoint {path}")
    return SavedRun(folder, config, path, classes, model)


def _checkpoint_path(folder: RunFolder, checkpoint: str) -> Path:
    """The file that ``best``, ``last`` or a path means."""
    best, last = folder.checkpoints / BEST, folder.checkpoints / LAST
    if checkpoint == "best":
        return best if best.exists() else last
    return last if checkpoint == "last" else Path(checkpoint)


def export_run(
    run_folder: str | Path, output_dir: str | Path | None = None, checkpoint: str = "best"
) -> Path:
    """Exports a run's network again.

    Args:
        run_folder: The run's output folder.
        output_dir: Folder to write; ``export`` in the run's folder by default.
        checkpoint: ``best``, ``last`` or a path.

    Returns:
        The folder written.

    Raises:
        UserError: no such run or checkpoint.
    """
    run = load_run(run_folder, checkpoint)
    return export_model(
        run.model,
        output_dir or run.folder.export,
        arch=run.config.arch,
        classes=run.classes,
        mean=run.config.pixel_mean,
        std=run.config.pixel_std,
        image_size=run.config.image_size,
        resize_size=run.config.evaluation_resize,
    )
