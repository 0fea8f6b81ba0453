"""The user's cache folder: what is written once and read by every later run."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from freeadv_fast.errors import UserError


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


def embedded_folder(name: str, flag: str, write: Callable[[Path], None]) -> str:
    """A folder of the cache that is written on first use, whole or not at all.

    Args:
        name: Of the folder; another one when its content changes.
        flag: What asks for it, for the message.
        write: Fills an empty folder. Of two that start at once, one wins.

    Raises:
        UserError: the cache folder cannot be written.
    """
    folder = cache_folder() / name
    try:
        if not folder.is_dir():
            _fill_once(folder, write)
    except OSError as error:
        raise UserError(
            f"{flag}: {folder} cannot be written ({error.strerror}); "
            "set XDG_CACHE_HOME to a folder that can"
        ) from None
    return str(folder)


def _fill_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Fills a temporary folder and renames it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-")
    try:
        write(Path(temporary))
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
