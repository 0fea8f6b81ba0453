"""COCO's files: which images a split holds, and which objects are in them.

FOLDER/annotations/instances_train2017.json speaks of the images in FOLDER/train2017/, and so for
val2017; the year may be missing. Boxes are cut at the image's border; crowds and boxes thinner than
a pixel are none that a network trains on, as in torchvision's references
(references/detection/coco_utils.py). The evaluation sees all of them, as COCO's own does.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import zlib
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from freeadv_fast.data.coco.file import bytes_of_images, find_split, read_file
from freeadv_fast.data.coco.tables import ImageTable, ObjectTable, read_categories
from freeadv_fast.data.names import keys_of
from freeadv_fast.data.roll import Roll
from freeadv_fast.data.stream import Ints, Keys

# Of a box that is trained on, in stored pixels.
SMALLEST_SIDE = 1.0

Boxes = NDArray[np.float32]


@dataclasses.dataclass(frozen=True, eq=False)
class Annotations:
    """A split: its images, and the objects in each that a network learns.

    Attributes:
        folder: Of the images.
        classes: Names in the order of COCO's ids, which have gaps; a label is an index into them.
        category_ids: (C,) int64 COCO's ids.
        image_ids: (N,) int64 COCO's ids, in the file's order.
        files: (N) names of the images in `folder`.
        sizes: (N, 2) int64 height and width in stored pixels.
        num_bytes: (N,) int64 of each file.
        boxes: (N) arrays (k, 4) float32 x1, y1, x2, y2 in stored pixels.
        labels: (N) arrays (k,) int64.
        record: The file's images, annotations (crowds included, without masks) and categories, as
            COCO's evaluation reads them; empty of what is trained on.
        left_out: What the user should know about objects and images that are not there, a line
            each.
    """

    folder: str
    classes: list[str]
    category_ids: Ints
    image_ids: Ints
    files: list[str]
    sizes: Ints
    num_bytes: Ints
    boxes: list[Boxes]
    labels: list[Ints]
    record: dict[str, Any]
    left_out: tuple[str, ...] = ()

    def path(self, row: int) -> str:
        """The file of a row."""
        return os.path.join(self.folder, self.files[row])

    @functools.cached_property
    def keys(self) -> Keys:
        """(N,) what stands for each image in every draw."""
        return keys_of(self.files)

    @property
    def num_objects(self) -> int:
        """Objects of all images."""
        return sum(map(len, self.labels))

    @property
    def capacity(self) -> int:
        """K, the largest number of objects of an image, at least 1."""
        return max(1, *map(len, self.labels)) if self.labels else 1

    @property
    def roll(self) -> Roll:
        """Which images these are; a stamp changes with a file's bytes, its boxes and labels."""
        parts = zip(self.num_bytes, self.sizes, self.boxes, self.labels, strict=True)
        stamps = [zlib.crc32(b"".join(array.tobytes() for array in image)) for image in parts]
        return Roll(self.classes, self.files, np.array(stamps, np.uint32), "checksum", bad={})

    def with_objects(self) -> Annotations:
        """Without the images that hold no object: those have nothing to train on.

        Torchvision's references leave them out as well.
        """
        rows = [row for row, labels in enumerate(self.labels) if len(labels)]
        num_left_out = len(self.files) - len(rows)
        line = f"{num_left_out:,} training images without objects left out"
        return dataclasses.replace(
            self,
            image_ids=self.image_ids[rows],
            files=[self.files[row] for row in rows],
            sizes=self.sizes[rows],
            num_bytes=self.num_bytes[rows],
            boxes=[self.boxes[row] for row in rows],
            labels=[self.labels[row] for row in rows],
            record={},  # half a GB of COCO's, which no training reads
            left_out=self.left_out + ((line,) if num_left_out else ()),
        )


def read_annotations(data: str, split: Literal["train", "val"]) -> Annotations:
    """Reads and checks a split; COCO's training file, 450 MB, takes some 20 s and 1.2 GB.

    Args:
        data: The folder that holds annotations/ and the images' folders.
        split: Which half.

    Raises:
        UserError: anything wrong with the files, in one line.
    """
    path, folder = find_split(data, split)
    content = read_file(path)
    category_ids, classes = read_categories(path, content["categories"])
    images = ImageTable.read(path, content["images"])
    num_bytes = bytes_of_images(path, folder, images.files)
    objects = ObjectTable.read(path, content["annotations"], images, category_ids)
    boxes = objects.cut_boxes(images.sizes)
    is_thin = (boxes[:, 2:] - boxes[:, :2] < SMALLEST_SIDE).any(axis=1)
    rows, is_learnt = objects.rows, ~objects.is_crowd & ~is_thin
    order = np.flatnonzero(is_learnt)[np.argsort(rows[is_learnt], kind="stable")]
    cuts = np.searchsorted(rows[order], np.arange(1, len(images.files)))
    return Annotations(
        folder=folder,
        classes=classes,
        category_ids=category_ids,
        image_ids=images.ids,
        files=images.files,
        sizes=images.sizes,
        num_bytes=num_bytes,
        boxes=np.split(boxes[order].astype(np.float32), cuts),
        labels=np.split(objects.labels[order], cuts),
        record=content | {"annotations": objects.records},
        left_out=_left_out(
            path, int(objects.is_crowd.sum()), int((is_thin & ~objects.is_crowd).sum())
        ),
    )


def _left_out(path: str, num_crowds: int, num_thin: int) -> tuple[str, ...]:
    """A line about objects that are not trained on, where there are any."""
    if not num_crowds + num_thin:
        return ()
    counts = f"{num_crowds:,} crowds and {num_thin:,} boxes thinner than a pixel"
    return (
        f"{counts} of {os.path.basename(path)} are not trained on; COCO's evaluation reads them",
    )
