"""The names of images: the keys that are drawn from them, and names that are no image's."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence

import numpy as np

from freeadv_fast.data.stream import Keys

KEY_BYTES = 8
# What systems and NAS boxes leave in folders that they share, beside names that begin with a dot
# (.ipynb_checkpoints, .Trash-0, ._a.jpg of macOS). Lower case: Windows writes some in either.
LITTER = frozenset(
    {
        "__macosx",  # macOS, in its zip archives
        "$recycle.bin",  # Windows, as the next one
        "system volume information",
        "lost+found",  # ext4
        "@eadir",  # Synology, as the next three
        "#recycle",
        "#snapshot",
        "@tmp",
        "@recycle",  # QNAP, as the next one
        "@recently-snapshot",
        "~snapshot",  # NetApp
    }
)


def keys_of(names: Sequence[str]) -> Keys:
    """64 bits drawn from each name: (n,) uint64, the same on every machine and in every version.

    BLAKE2b takes 1.7 microseconds a name, 2.2 s for ImageNet's 1.28 million. Two of so many names
    share a key once in 20 million sets.
    """
    digests = (hashlib.blake2b(os.fsencode(name), digest_size=KEY_BYTES).digest() for name in names)
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is a system's own, not a part of a data set."""
    return name.startswith(".") or name.lower() in LITTER


def class_folders(folder: str) -> tuple[list[str], list[str]]:
    """What lies in a split's folder.

    Returns:
        The class folders, sorted; and the folders that are none: litter, and links to a parent.
    """
    with os.scandir(folder) as entries:
        folders = sorted(entry.name for entry in entries if entry.is_dir())
    above = set(map(_identity, _lineage(folder)))
    left_out = [
        name
        for name in folders
        if is_litter(name) or _identity(os.path.join(folder, name)) in above
    ]
    return [name for name in folders if name not in left_out], left_out


def walk(top: str, outside: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """The folders from `top` down, links followed.

    A folder that has been walked, or that `top` lies in, is not walked again: a link to a parent
    would bring every image of the data set into one class, forty times over.

    Args:
        top: A class folder. outside: The folder that it is in.

    Yields:
        A folder, the names of its files, and the names of files and folders in it left out.

    Raises:
        OSError: a folder cannot be read.
    """
    seen = {_identity(place) for base in (outside, top) for place in _lineage(base)}
    for place, folders, files in os.walk(top, followlinks=True, onerror=_refuse):
        left_out = [name for name in files if is_litter(name)]
        kept = []
        for name in sorted(folders):
            identity = _identity(os.path.join(place, name))
            if is_litter(name) or identity in seen:
                left_out.append(name)
            else:
                kept.append(name)
                seen.add(identity)
        folders[:] = kept
        yield place, [name for name in files if not is_litter(name)], left_out


def _refuse(error: OSError) -> None:
    """Raises what `os.walk` would pass over: a class without a part of its images."""
    raise error


def _lineage(folder: str) -> Iterator[str]:
    """A folder and all that it lies in, links resolved."""
    place = os.path.realpath(folder)
    while True:
        yield place
        if place == os.path.dirname(place):
            return
        place = os.path.dirname(place)


def _identity(folder: str) -> tuple[int, int]:
    """Device and inode: equal for two paths to one folder."""
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino
