"""Files that stand whole under their name or not at all, whatever interrupts the writer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def renamed_when_whole(path: Path) -> Iterator[Path]:
    """Gives a name to write to beside `path`; the file takes `path` only if nothing was raised.

    The name is always the same, so that what a killed process left there is overwritten and does
    not pile up; it ends in ``.partial``, so that no reader takes it for an image.

    Args:
        path: The file; its folder exists.

    Raises:
        OSError: the folder cannot be written; nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):  # gone already, or the reason why we are here
            partial.unlink()
