"""Which validation images an evaluation takes, and how, where its config does not say it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np

from freeadv_fast.data.index import ImageIndex, image_name, shortened
from freeadv_fast.data.preprocessing import Preprocessing, find_preprocessing
from freeadv_fast.data.stream import Ints
from freeadv_fast.errors import UserError


@dataclasses.dataclass(frozen=True)
class ImageList:
    """A fixed choice of images, such as RobustBench's 5,000 of ImageNet.

    Attributes:
        path: The file that lists them.
        names: Each once, as ``n01440764/ILSVRC2012_val_00000293.JPEG``.
        digest: SHA-256 of the file, in hexadecimal digits.
    """

    path: str
    names: tuple[str, ...]
    digest: str


@dataclasses.dataclass(frozen=True)
class View:
    """What an evaluation sees of a split.

    Attributes:
        preprocessing: A name of `PREPROCESSINGS`; None for the config's resize and central crop.
        image_list: The images; None for all of the split.
    """

    preprocessing: str | None = None
    image_list: ImageList | None = None

    @property
    def way(self) -> Preprocessing | None:
        """What the preprocessing's name stands for."""
        return None if self.preprocessing is None else find_preprocessing(self.preprocessing)


AS_CONFIGURED = View()


def read_image_list(path: str | Path) -> ImageList:
    """Reads a list of images: CLASS/FILE, a line each, in any order.

    Raises:
        UserError: no such file, no text, nothing in it, or an image twice.
    """
    origin = f"--image-list {path}"
    try:
        content = Path(path).expanduser().read_bytes()
        lines = content.decode("utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{origin}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{origin}: not a text file; it lists CLASS/FILE, a line each") from None
    names = [line.strip().removeprefix("./") for line in lines if line.strip()]
    if not names:
        raise UserError(f"{origin}: lists no images; it needs CLASS/FILE, a line each")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{origin}: lists {len(twice):,} images twice ({shortened(twice)})")
    return ImageList(str(path), tuple(names), hashlib.sha256(content).hexdigest())


def listed_rows(images: ImageList, index: ImageIndex) -> Ints:
    """Rows of the listed images in a split, ascending: the order of a list does not matter.

    Raises:
        UserError: some are not there, or are bad files.
    """
    rows = {name: row for row, name in enumerate(index.names)}
    missing = [name for name in images.names if image_name(name) not in rows]
    if missing:
        bad = {image_name(file): reason for file, reason in index.bad.items()}
        named = [f"{name} ({bad[name]})" if name in bad else name for name in missing]
        raise UserError(
            f"--image-list {images.path}: {len(missing):,} of its {len(images.names):,} images are "
            f"not in {index.folder} ({shortened(named)})"
        )
    return np.sort(np.array([rows[image_name(name)] for name in images.names], np.int64))


def refuse_other_sizes(image_size: int, index: ImageIndex, rows: Ints) -> None:
    """Refuses images that would have to be resized, where nothing resizes them.

    Args:
        image_size: Side that the network takes, in pixels. index: The split.
        rows: Of the images that are evaluated.

    Raises:
        UserError: names the first image that is of another size.
    """
    others = np.flatnonzero((index.sizes[rows] != image_size).any(axis=1))
    if len(others):
        row = rows[others[0]]
        height, width = index.sizes[row]
        raise UserError(
            f"--preprocessing none: {index.names[row]} is {width} x {height} pixels, and images "
            f"stay as they are stored, {image_size} x {image_size}; give --image-size or another "
            "preprocessing"
        )


def refuse_files_only(view: View, data: str) -> None:
    """Refuses what only images in files can be asked for.

    Raises:
        UserError: `data` are no folder of images, and the view lists or resizes some.
    """
    if view.image_list is not None:
        raise UserError(
            f"--image-list {view.image_list.path}: {data} holds no image files; leave it out"
        )
    if view.preprocessing not in (None, "none"):
        raise UserError(
            f"--preprocessing {view.preprocessing}: {data} is not resized; use none, or leave it "
            "out"
        )
