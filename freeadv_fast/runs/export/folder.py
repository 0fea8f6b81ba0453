"""Folders that others take away: ours to write, or left as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from freeadv_fast.errors import UserError
from freeadv_fast.runs.whole_file import renamed_when_whole


def claim(folder: Path, mark: str) -> None:
    """Makes a folder, or takes one that an earlier export wrote.

    Args:
        folder: Made if missing, with its parents.
        mark: The file that is written first, under a name that nobody else uses: a folder with it
            is an export, whole or interrupted.

    Raises:
        UserError: a file, a folder that holds something else, or one that cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output-dir {folder}: a file; name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise UserError(f"--output-dir {folder}: {error.strerror or error}") from None
    if names and not {mark, f".{mark}.partial"} & set(names):  # the latter: an interrupted one
        raise UserError(
            f"--output-dir {folder}: holds {sorted(names)[0]} and no export; name a new folder"
        )


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    with renamed_when_whole(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Writes a file in UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_record(path: Path, record: Mapping[str, Any], *, indent: int = 2) -> None:
    """Writes a JSON object that ends with a line break, whole or not at all."""
    write_text(path, json.dumps(record, indent=indent) + "\n")
