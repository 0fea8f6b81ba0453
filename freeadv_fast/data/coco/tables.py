"""COCO's lists as arrays, each entry checked."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from freeadv_fast.data.index import shortened
from freeadv_fast.data.stream import Floats, Ints
from freeadv_fast.errors import UserError

# Pixels by which a box may miss its image, for rounding; it is empty then.
SLACK = 1.0


def read_categories(path: str, entries: list[Any]) -> tuple[Ints, list[str]]:
    """Ids and names of the categories, in order of id.

    Raises:
        UserError: an entry without them, or an id twice.
    """
    ids = _integers(path, "categories", entries, "id")
    _refuse_twice(path, "categories", ids)
    names = [str(name) for name in _column(path, "categories", entries, "name")]
    order = np.argsort(ids)
    return ids[order], [names[place] for place in order]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageTable:
    """The images.

    Attributes:
        ids: (N,) int64. files: (N) names. sizes: (N, 2) int64 height and width in pixels.
    """

    ids: Ints
    files: list[str]
    sizes: Ints

    @classmethod
    def read(cls, path: str, entries: list[Any]) -> ImageTable:
        """Checks a file's list of images.

        Raises:
            UserError: an entry lacks something, or two are the same.
        """
        ids = _integers(path, "images", entries, "id")
        files = [str(name) for name in _column(path, "images", entries, "file_name")]
        _refuse_twice(path, "images", ids)
        _refuse_twice(path, "images", files)
        sides = [_integers(path, "images", entries, side) for side in ("height", "width")]
        sizes = np.stack(sides, axis=1)
        empty = np.flatnonzero((sizes < 1).any(axis=1))
        if len(empty):
            raise UserError(f"--data: {path}: {files[empty[0]]} has no pixels by its size there")
        return cls(ids, files, sizes)


@dataclasses.dataclass(frozen=True, eq=False)
class ObjectTable:
    """The objects of all images, crowds included.

    Attributes:
        rows: (M,) int64 row of each one's image. labels: (M,) int64 its category's place.
        corners: (M, 4) float64 x, y, width, height in pixels.
        is_crowd: (M,) bool. records: (M) entries as COCO's evaluation reads them, without masks.
    """

    rows: Ints
    labels: Ints
    corners: Floats
    is_crowd: NDArray[np.bool_]
    records: list[dict[str, Any]]

    @classmethod
    def read(
        cls, path: str, entries: list[Any], images: ImageTable, category_ids: Ints
    ) -> ObjectTable:
        """Checks a file's list of annotations.

        Raises:
            UserError: an entry lacks something, its image or category is unknown, or its box lies
                outside its image.
        """
        rows = _places(
            path, _integers(path, "annotations", entries, "image_id"), images.ids, "image"
        )
        categories = _integers(path, "annotations", entries, "category_id")
        labels = _places(path, categories, category_ids, "category")
        boxes = _read_boxes(path, entries)
        _refuse_outside(path, boxes, images, rows)
        is_crowd = np.array([bool(entry.get("iscrowd", 0)) for entry in entries])
        # COCO's evaluation takes an annotation whose id is 0 for none.
        records = [
            {"iscrowd": 0, "area": float(box[2] * box[3])} | entry | {"id": number}
            for number, (entry, box) in enumerate(zip(entries, boxes, strict=True), 1)
        ]
        return cls(rows, labels, boxes, is_crowd, records)

    def cut_boxes(self, sizes: Ints) -> Floats:
        """(M, 4) float64 x1, y1, x2, y2, cut at the borders of images of `sizes`, (N, 2)."""
        corners = np.concatenate(
            [self.corners[:, :2], self.corners[:, :2] + self.corners[:, 2:]], axis=1
        )
        limits = np.tile(sizes[self.rows, ::-1], 2)
        boxes: Floats = np.clip(corners, 0, limits)
        return boxes


def _column(path: str, part: str, entries: list[Any], key: str) -> list[Any]:
    """A value of each entry of a list; UserError where one lacks it."""
    try:
        return [entry[key] for entry in entries]
    except (KeyError, TypeError):
        number = next(
            number
            for number, entry in enumerate(entries, 1)
            if not isinstance(entry, dict) or key not in entry
        )
        raise UserError(f'--data: {path}: entry {number:,} of "{part}" has no "{key}"') from None


def _integers(path: str, part: str, entries: list[Any], key: str) -> Ints:
    """A column of whole numbers: (n,) int64."""
    values = _column(path, part, entries, key)
    others = [value for value in values if type(value) is not int]
    if others:
        raise UserError(f'--data: {path}: "{key}" in "{part}" is {others[0]!r}, no whole number')
    return np.array(values, np.int64)


def _read_boxes(path: str, entries: list[Any]) -> Floats:
    """(M, 4) float64 x, y, width, height; UserError where they are no four numbers."""
    values = _column(path, "annotations", entries, "bbox")
    try:
        boxes = np.array(values, np.float64)
    except (TypeError, ValueError):
        boxes = np.empty(0)
    if boxes.shape == (len(values), 4) and np.isfinite(boxes).all():
        return boxes
    number = next(number for number, box in enumerate(values) if not _is_box(box))
    raise UserError(
        f"--data: {path}: the bbox of annotation {number + 1:,} is {values[number]!r}, not four "
        "numbers: x, y, width, height in pixels"
    )


def _is_box(value: Any) -> bool:
    """Whether it is a list of four finite numbers."""
    if not isinstance(value, list) or len(value) != 4:
        return False
    return all(isinstance(number, int | float) and np.isfinite(number) for number in value)


def _places(path: str, ids: Ints, known: Ints, kind: str) -> Ints:
    """The place of each annotation's id among the known ones; UserError where it is unknown."""
    places = {key: place for place, key in enumerate(known.tolist())}
    unknown = sorted({key for key in ids.tolist() if key not in places})
    if unknown:
        listed = "images" if kind == "image" else "categories"
        raise UserError(
            f'--data: {path}: annotations name {len(unknown):,} {kind} ids that "{listed}" lacks '
            f"({shortened([str(key) for key in unknown])}); add or remove them"
        )
    return np.array([places[key] for key in ids.tolist()], np.int64)


def _refuse_twice(path: str, part: str, values: Ints | list[str]) -> None:
    """Raises UserError where ids or names are listed twice."""
    twice = [str(value) for value, count in Counter(list(values)).items() if count > 1]
    if twice:
        raise UserError(f'--data: {path}: "{part}" lists {shortened(twice)} twice; remove one')


def _refuse_outside(path: str, boxes: Floats, images: ImageTable, rows: Ints) -> None:
    """Raises UserError where boxes lie wholly outside their images, being of other ones."""
    limits = images.sizes[rows, ::-1]
    is_before = (boxes[:, :2] + boxes[:, 2:] < -SLACK).any(axis=1)
    is_outside = is_before | (boxes[:, :2] > limits + SLACK).any(axis=1)
    if is_outside.any():
        first = np.flatnonzero(is_outside)[0]
        width, height = limits[first]
        raise UserError(
            f"--data: {path}: {int(is_outside.sum()):,} boxes lie outside their images, the first "
            f"at {boxes[first].tolist()} (x, y, width, height) of {images.files[rows[first]]} of "
            f"{width} x {height} pixels; correct or remove them"
        )
