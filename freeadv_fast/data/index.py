"""The list of a split's images: every file looked at once, remembered in the user's cache.

A scan walks the class folders in torchvision's order, checks each new or changed file by its
first and last bytes (`headers`), and keeps size, type and verdict by (path, bytes, mtime).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from freeadv_fast.data.cache import cache_folder, write_atomically
from freeadv_fast.data.formats.picture_file import BadImage
from freeadv_fast.data.headers import PASSING, RULES, inspect_image
from freeadv_fast.data.names import class_folders, keys_of, walk
from freeadv_fast.data.stream import Ints, Keys
from freeadv_fast.errors import UserError

# Browsers name some JPEGs .jfif.
JPEG_EXTENSIONS = (".jpg", ".jpeg", ".jfif")
# torchvision.datasets.folder.IMG_EXTENSIONS and .jfif: an image of the folder, good or bad.
EXTENSIONS = (*JPEG_EXTENSIONS, ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
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


class TooManyBad(UserError):
    """More files of a split are bad than may be left out.

    Attributes:
        found: How many, and which.
        max_bad_fraction: The share that may be left out.
    """

    def __init__(self, found: str, max_bad_fraction: float) -> None:
        """Keeps both."""
        super().__init__(found, max_bad_fraction)  # as ranks hand it over
        self.found, self.max_bad_fraction = found, max_bad_fraction

    def __str__(self) -> str:
        """The line for who trains on the split."""
        return (
            f"--max-bad-fraction {self.max_bad_fraction:g}: {self.found}; repair or remove them, "
            "or raise --max-bad-fraction"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class ImageIndex:
    """The good images of one split.

    Attributes:
        folder: Absolute path of the split.
        classes: Class folders, sorted; a label is an index into them.
        files: (N) paths relative to `folder`, in torchvision's order.
        labels: (N,) int64.
        sizes: (N, 2) int64 height and width in pixels as stored.
        num_bytes: (N,) int64 sizes of the files.
        bad: Files that are no whole images, and why; they are left out.
        foreign: Files and folders left out by their name, or because they are links to a parent.
        bad_list: Text file that names them and says why; None when there is none.
    """

    folder: str
    classes: list[str]
    files: list[str]
    labels: Ints
    sizes: Ints
    num_bytes: Ints
    bad: dict[str, str]
    foreign: list[str]
    bad_list: Path | None

    @functools.cached_property
    def names(self) -> list[str]:
        """(N) what the images are called, in every copy of the data."""
        return [image_name(file) for file in self.files]

    @functools.cached_property
    def keys(self) -> Keys:
        """(N,) what stands for the images in every draw."""
        return keys_of(self.names)

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
    classes, foreign = class_folders(folder)
    with concurrent.futures.ThreadPoolExecutor(NUM_SCAN_THREADS) as threads:
        walks = list(threads.map(lambda name: _list_files(folder, name), classes))
        listings = [files for files, _ in walks]
        foreign += [path for _, left_out in walks for path in left_out]
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
    if len(bad) > max_bad_fraction * len(found):
        raise TooManyBad(_describe_bad(folder, bad, len(found), bad_list), max_bad_fraction)
    good = [file for file in found if file not in bad]
    labels = np.repeat(np.arange(len(classes)), [len(listing) for listing in listings])
    labels = labels[[file not in bad for file in found]]
    _refuse_empty_classes(folder, classes, np.bincount(labels, minlength=len(classes)).tolist())
    numbers = np.array([entries[file][:4] for file in good], np.int64).reshape(-1, 4)
    return ImageIndex(
        folder, classes, good, labels, numbers[:, 2:], numbers[:, 0], bad, foreign,
        bad_list if bad_list.exists() else None,
    )  # fmt: skip


def is_image_name(name: str) -> bool:
    """Whether a file name ends as an image's does, in any case of letters."""
    return name.lower().endswith(EXTENSIONS)


def image_name(file: str) -> str:
    """What an image is called: the file's path in the split, without what a copy adds to it.

    A smaller copy of a file that is not named as a JPEG has .jpg after its name (`resize.copies`).
    """
    if not file.endswith(".jpg"):
        return file
    original = file.removesuffix(".jpg")
    is_copy = is_image_name(original) and not original.lower().endswith(JPEG_EXTENSIONS)
    return original if is_copy else file


def _list_files(folder: str, class_name: str) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Image files of a class folder and its subfolders in torchvision's order: (bytes, mtime).

    Beside them, what was left out: folders, and files that are named as images.
    """
    files: dict[str, tuple[int, int]] = {}
    foreign: list[str] = []
    for place, names, left_out in sorted(walk(os.path.join(folder, class_name), folder)):
        inside = os.path.relpath(place, folder)
        foreign += [
            os.path.join(inside, name)
            for name in left_out
            if is_image_name(name) or os.path.isdir(os.path.join(place, name))
        ]
        for name in sorted(filter(is_image_name, names)):
            try:
                stat = os.stat(os.path.join(place, name))
                files[os.path.join(inside, name)] = (stat.st_size, stat.st_mtime_ns)
            except OSError:  # a dangling link: inspected, found bad and listed
                files[os.path.join(inside, name)] = (0, 0)
    return files, foreign


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


def _describe_bad(folder: str, bad: dict[str, str], num_files: int, bad_list: Path) -> str:
    """How many files are bad, and the first of them; where all are listed, if they are."""
    named = shortened([f"{file} ({reason})" for file, reason in bad.items()])
    listed = f", all in {bad_list}" if len(bad) > NUM_NAMED and bad_list.exists() else ""
    return f"{len(bad)} of {num_files} files in {folder} cannot be used: {named}{listed}"


def shortened(names: list[str]) -> str:
    """The first few of many names, for one line of text."""
    rest = [f"and {len(names) - NUM_NAMED} more"] if len(names) > NUM_NAMED else []
    return ", ".join(names[:NUM_NAMED] + rest)


def _cache_file(folder: str) -> Path:
    """Where the index of a split is kept."""
    key = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:16]
    return cache_folder() / f"index-{key}.npz"


def _load_cache(path: Path) -> dict[str, Entry]:
    """The remembered entries; none when the cache is absent, damaged or of other rules."""
    try:
        with np.load(path) as arrays:
            if arrays["rules"] != RULES:
                return {}
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
        rules=RULES,
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
