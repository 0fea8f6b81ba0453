"""The user's cache folder: what is written once and read by every later run."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/freeadv_fast``, or ``~/.cache/freeadv_fast``; not created here."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "freeadv_fast"


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which other processes see whole at the end or not at all.

    Args:
        path: The file; its folder is created.

    Raises:
        OSError: the folder cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """`written_atomically` of bytes that are there."""
    with written_atomically(path) as file:
        file.write(content)
