"""The precision under each corruption that is done, on disk: a killed evaluation goes on there.

Two hundred thousand images of COCO-C and more take hours. What the numbers hang on, weights, images
and objects, is in the file's name as a digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn

from freeadv_fast.data.coco.loader import DetectionLoader
from freeadv_fast.models.digest import digest_weights
from freeadv_fast.runs.json_file import read_json, write_json

DIGEST_LENGTH = 12


def digest_of(
    model: nn.Module,
    mean: Sequence[float],
    std: Sequence[float],
    loader: DetectionLoader,
    image_ids: Iterable[int],
) -> str:
    """Stands for all but the corruption that a precision hangs on.

    Args:
        model: The detector, without its normaliser. mean: Of the latter. std: Likewise.
        loader: Of the clean images: says what is in the whole split, and how large it is seen.
        image_ids: Those of its images that are evaluated, by all ranks.
    """
    annotations = loader.annotations
    objects = json.dumps(annotations.record)
    said = (
        repr(model), str((*mean, *std)), str(sorted(image_ids)), objects, annotations.roll.digest
    )  # fmt: skip
    hashed = hashlib.blake2b("\0".join(said).encode())
    for part in (loader.sizes.tobytes(), loader.canvases.tobytes(), digest_weights(model)):
        hashed.update(part)
    return hashed.hexdigest()[:DIGEST_LENGTH]


Precisions = dict[str, dict[int, float | None]]
"""Corruption's name to severity to AP."""


def read_ledger(path: Path | None) -> Precisions:
    """What an evaluation that was killed has left there; nothing where there is no such file."""
    if path is None or not path.is_file():
        return {}
    return {
        name: {int(severity): precision for severity, precision in row.items()}
        for name, row in read_json(path).items()
    }


def write_ledger(path: Path | None, found: Precisions) -> None:
    """Keeps all that is known; when this returns it stands under its name.

    A disk that is full costs the way back after a kill, not the evaluation.
    """
    if path is not None:
        with contextlib.suppress(OSError):
            write_json(path, found)
