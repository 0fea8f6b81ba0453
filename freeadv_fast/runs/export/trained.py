"""The export of a run: its network, and the card that says what it is worth."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.runs.export.card import Subject, model_card
from freeadv_fast.runs.export.claims import read_claims
from freeadv_fast.runs.export.folder import write_text
from freeadv_fast.runs.export.network import CONFIG, NORMALIZED, ONNX, PLAIN, export_model
from freeadv_fast.runs.export.onnx import export_onnx
from freeadv_fast.runs.json_file import read_json

CARD = "README.md"
# Ours, where the user's own card stays beside other weights or numbers.
NEW_CARD = "README.new.md"
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

    A card that the user has changed stays as it is; where ours would say something else by now, it
    becomes ``README.new.md`` beside it (`card_left_alone`).

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
    exported = read_json(folder / CONFIG)
    claims = read_claims(record, weights, config, classes, run_folder)
    subject = Subject(config, classes, weights, claims, record, exported)
    write_card(folder, model_card(subject))  # at once: ONNX may refuse these weights
    if onnx_network is not None:
        export_onnx(onnx_network, folder, config.image_size)
        write_card(folder, model_card(dataclasses.replace(subject, has_onnx=True)))
    return folder


def write_card(folder: Path, card: str) -> None:
    """Writes README.md, or README.new.md beside a card of the user's that is of another text."""
    own, new = folder / CARD, folder / NEW_CARD
    text = f"{card}\n{_mark(card)}"
    if is_ours(own):
        write_text(own, text)
    elif _mark(card) not in own.read_text(encoding="utf-8", errors="replace"):
        write_text(new, text)
        return
    if is_ours(new):
        new.unlink(missing_ok=True)


def card_left_alone(folder: Path) -> str | None:
    """A line for the user where an export has a card whose numbers may be of other weights."""
    own, new = folder / CARD, folder / NEW_CARD
    if not new.exists():
        return None
    return f"{own} is yours and stays; its numbers may be of other weights: see {new.name}"


def withdraw(folder: Path) -> None:
    """Removes an export that is outdated, and the folder with it if nothing else is in there.

    A card that the user has changed stays, and so does whatever we have not written.
    """
    if not any((folder / name).exists() for name in (NORMALIZED, PLAIN)):  # a detector's: PLAIN
        return
    for card in (CARD, NEW_CARD):
        if is_ours(folder / card):
            (folder / card).unlink(missing_ok=True)
    for name in (ONNX, CONFIG, PLAIN, NORMALIZED):  # last the one that marks an export
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def is_ours(card: Path) -> bool:
    """Whether a card may be written anew: there is none, or it is as we left it."""
    if not card.exists():
        return True
    body, _, rest = card.read_text(encoding="utf-8", errors="replace").rpartition(_MARK)
    return f"{_MARK}{rest}" == _mark(body.removesuffix("\n"))


def _mark(card: str) -> str:
    """The line below a card of ours; HTML that nobody sees."""
    return f"{_MARK}{hashlib.sha256(card.encode()).hexdigest()[:16]} -->\n"
