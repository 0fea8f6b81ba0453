"""The list of a split's images: every file looked at once, remembered in the user's cache.

A scan walks the class folders in torchvision's order, checks each new or changed file by its
first and last bytes (`headers`), and keeps size, type and verdict by (path, bytes, mtime).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from freeadv_fast.data.cache import cache_folder, write_atomically
from freeadv_fast.data.headers import PASSING, BadImage, inspect_image
from freeadv_fast.data.stream import Ints
from freeadv_fast.errors import UserError

# torchvision.datasets.folder.IMG_EXTENSIONS: what counts as an image of the folder, good or bad.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Files wait for the disk, not for the processor: more threads than cores.
NUM_SCAN_THREADS = 16
# Files that a thread takes at a time.
PART_FILES = 64
# Above this many unknown files the user is told that a scan is under way.
ANNOUNCED_FILES = 20_000
NUM_NAMED = 3


class Entry(NamedTuple):
    """What is known of one file.

    Attributes:
        num_bytes: Size of the file.
        mtime_ns: Time of its last change.
        height: Height of the image in pixels, 0 for a bad file.
        width: Width of the image in pixels, 0 for a bad file.
        reason: Why the file is bad; empty for a good one.
    """

    num_bytes: int
    mtime_ns: int
    height: int
    width: int
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class ImageIndex:
    """The good images of one split.

    Attributes:
        folder: Absolute path of the split.
        classes: Class folders, sorted; a label is an index into them.
        files: (N) paths relative to `folder`, in torchvision's order.
        labels: (N,) int64.
        sizes: (N, 2) int64 height and width in pixels as stored.
        num_bad: Files left out.
        bad_list: Text file that names them and says why; None when there is none.
    """

    folder: str
    classes: list[str]
    files: list[str]
    labels: Ints
    sizes: Ints
    num_bad: int
    bad_list: Path | None

    def path(self, row: int) -> str:
        """Absolute path of the image in `row`."""
        return os.path.join(self.folder, self.files[row])


def index_images(
    folder: str, max_bad_fraction: float, announce: Callable[[str], None]
) -> ImageIndex:
    """Lists the images of a split, without the bad ones.

    Args:
        folder: A split: one folder a class.
        max_bad_fraction: Largest share of bad files that is left out silently.
        announce: Called with a line for the user when many files have to be read.

    Raises:
        UserError: class folders without images, or too many bad files.
    """
    folder = os.path.abspath(folder)
    cache = _cache_file(folder)
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    with concurrent.futures.ThreadPoolExecutor(NUM_SCAN_THREADS) as threads:
        listings = list(threads.map(lambda name: _list_files(folder, name), classes))
        _refuse_empty_classes(folder, classes, [len(listing) for listing in listings])
        known = _load_cache(cache)
        found = {file: stat for listing in listings for file, stat in listing.items()}
        news = [file for file, stat in found.items() if known.get(file, ())[:2] != stat]
        if len(news) >= ANNOUNCED_FILES:
            announce(f"checking {len(news):,} image files of {folder} (once; the result is kept)")
        parts = [news[start : start + PART_FILES] for start in range(0, len(news), PART_FILES)]
        entries = {file: known[file] for file in found if file in known}
        for checked in threads.map(lambda part: _check_files(folder, part, found), parts):
            entries.update(checked)
    bad = {file: entries[file].reason for file in found if entries[file].reason}
    bad_list = cache.with_suffix(".bad.txt")
    if news or len(known) != len(found) or bool(bad) != bad_list.exists():
        _save_cache(cache, entries)
        _save_bad_list(bad_list, folder, bad)
    _refuse_too_many_bad(folder, bad, len(found), max_bad_fraction)
    good = [file for file in found if file not in bad]
    labels = np.repeat(np.arange(len(classes)), [len(listing) for listing in listings])
    labels = labels[[file not in bad for file in found]]
    _refuse_empty_classes(folder, classes, np.bincount(labels, minlength=len(classes)).tolist())
    sizes = np.array([entries[file][2:4] for file in good], np.int64).reshape(-1, 2)
    return ImageIndex(
        folder, classes, good, labels, sizes, len(bad), bad_list if bad_list.exists() else None
    )


def is_image_name(name: str) -> bool:
    """Whether a file name ends as an image's does, in any case of letters."""
    return name.lower().endswith(EXTENSIONS)


def _list_files(folder: str, class_name: str) -> dict[str, tuple[int, int]]:
    """Image files of a class folder and its subfolders in torchvision's order: (bytes, mtime)."""
    files: dict[str, tuple[int, int]] = {}
    for place, _, names in sorted(os.walk(os.path.join(folder, class_name), followlinks=True)):
        inside = os.path.relpath(place, folder)
        for name in sorted(filter(is_image_name, names)):
            try:
                stat = os.stat(os.path.join(place, name))
                files[os.path.join(inside, name)] = (stat.st_size, stat.st_mtime_ns)
            except OSError:  # a dangling link: inspected, found bad and listed
                files[os.path.join(inside, name)] = (0, 0)
    return files


def _check_files(
    folder: str, files: list[str], found: dict[str, tuple[int, int]]
) -> dict[str, Entry]:
    """Looks into some of the files that were `found`."""
    entries: dict[str, Entry] = {}
    for file in files:
        try:
            height, width = inspect_image(os.path.join(folder, file))
            entries[file] = Entry(*found[file], height, width, "")
        except BadImage as bad:
            entries[file] = Entry(*found[file], 0, 0, str(bad))
    return entries


def _refuse_empty_classes(folder: str, classes: list[str], counts: list[int]) -> None:
    """Raises UserError where a class has no image."""
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if empty:
        raise UserError(
            f"--data: {len(empty)} class folders without images in {folder}: "
            f"{shortened(empty)}; fill or remove them"
        )


def _refuse_too_many_bad(
    folder: str, bad: dict[str, str], num_files: int, max_bad_fraction: float
) -> None:
    """Raises UserError where more files are bad than the user allows."""
    if len(bad) <= max_bad_fraction * num_files:
        return
    named = shortened([f"{file} ({reason})" for file, reason in bad.items()])
    raise UserError(
        f"--max-bad-fraction {max_bad_fraction:g}: {len(bad)} of {num_files} files in {folder} "
        f"are not whole images: {named}; repair or remove them, or raise --max-bad-fraction"
    )


def shortened(names: list[str]) -> str:
    """The first few of many names, for one line of text."""
    rest = [f"and {len(names) - NUM_NAMED} more"] if len(names) > NUM_NAMED else []
    return ", ".join(names[:NUM_NAMED] + rest)


def _cache_file(folder: str) -> Path:
    """Where the index of a split is kept."""
    key = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:16]
    return cache_folder() / f"index-{key}.npz"


def _load_cache(path: Path) -> dict[str, Entry]:
    """The remembered entries; none when the cache is absent, damaged or of another layout."""
    try:
        with np.load(path) as arrays:
            numbers = arrays["numbers"].tolist()
            names, reasons = (
                os.fsdecode(arrays[key].tobytes()).split("\0") for key in ("names", "reasons")
            )
        return {
            name: Entry(num_bytes, mtime_ns, height, width, reason)
            for name, (num_bytes, mtime_ns, height, width), reason in zip(
                names, numbers, reasons, strict=True
            )
        }
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return {}


def _save_cache(path: Path, entries: dict[str, Entry]) -> None:
    """Remembers the entries; a cache folder that cannot be written is done without."""
    entries = {file: e for file, e in entries.items() if not e.reason.startswith(PASSING)}
    buffer = io.BytesIO()
    np.savez(
        buffer,
        names=np.frombuffer(os.fsencode("\0".join(entries)), np.uint8),
        reasons=np.frombuffer(os.fsencode("\0".join(e.reason for e in entries.values())), np.uint8),
        numbers=np.array([entry[:4] for entry in entries.values()], np.int64),
    )
    try:
        write_atomically(path, buffer.getvalue())
    except OSError:
        return


def _save_bad_list(path: Path, folder: str, bad: dict[str, str]) -> None:
    """Writes one line a bad file, path and reason; removes the list when there is none."""
    lines = [f"{os.path.join(folder, file)}\t{reason}\n" for file, reason in bad.items()]
    try:
        if lines:
            write_atomically(path, os.fsencode("".join(lines)))
        else:
            path.unlink(missing_ok=True)
    except OSError:
        return
