"""The export of a run: its network, and the card that says what it is worth."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.runs.export.card import Subject, model_card
from freeadv_fast.runs.export.claims import read_claims
from freeadv_fast.runs.export.folder import write_text
from freeadv_fast.runs.export.network import CONFIG, export_model
from freeadv_fast.runs.export.onnx import export_onnx
from freeadv_fast.runs.log import read_json

CARD = "README.md"
# By its checksum a card that the user has changed is known, which is theirs and stays.
_MARK = "<!-- written by freeadv_fast; checksum "


def export_trained(
    model: nn.Module,
    folder: Path,
    *,
    config: TrainConfig,
    classes: Sequence[str],
    record: Mapping[str, Any] | None,
    weights: str,
    run_folder: Path | None = None,
    onnx_network: nn.Module | None = None,
) -> Path:
    """Exports what a run trained, as `network.export_model` does, and writes its card.

    A card that the user has changed stays as it is.

    Args:
        model: With the weights to export; left as it is.
        folder: Made if missing, such as ``RUN/export``.
        config: Of the run.
        classes: Class names in the order of the logits.
        record: What the run's result.json holds, None where there is none.
        weights: Which weights of the run these are: ``last``, ``best``, ``average``, or a
            checkpoint's name, of which the result says nothing.
        run_folder: The run's, whose evaluation-*.json the card then knows too.
        onnx_network: What ``model.onnx`` is to be made of (`onnx.export_onnx`); None for no such
            file.

    Returns:
        The folder.

    Raises:
        UserError: the folder is a file, holds something else, or cannot be written; or there can
            be no ``model.onnx``.
    """
    export_model(
        model,
        folder,
        arch=config.arch,
        classes=classes,
        mean=config.pixel_mean,
        std=config.pixel_std,
        image_size=config.image_size,
        resize_size=config.evaluation_resize,
    )
    if onnx_network is not None:
        export_onnx(onnx_network, folder, config.image_size)
    exported = read_json(folder / CONFIG)
    claims = read_claims(record, weights, config, classes, run_folder)
    card = model_card(
        Subject(config, classes, weights, claims, record, exported, onnx_network is not None)
    )
    if is_ours(folder / CARD):
        write_text(folder / CARD, f"{card}\n{_mark(card)}")
    return folder


def is_ours(card: Path) -> bool:
    """Whether a card may be written anew: there is none, or it is as we left it."""
    if not card.exists():
        return True
    body, _, rest = card.read_text(encoding="utf-8", errors="replace").rpartition(_MARK)
    return f"{_MARK}{rest}" == _mark(body.removesuffix("\n"))


def _mark(card: str) -> str:
    """The line below a card of ours; HTML that nobody sees."""
    return f"{_MARK}{hashlib.sha256(card.encode()).hexdigest()[:16]} -->\n"
