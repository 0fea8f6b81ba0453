"""COCO's lists as arrays, each entry checked."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Sequence
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
        UserError: an entry without them, or an id or a name twice.
    """
    ids = _integers(path, "categories", entries, "id")
    _refuse_twice(path, "categories", ids)
    names = [str(name) for name in _column(path, "categories", entries, "name")]
    _refuse_twice(path, "categories", names)
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
        crowds = _optional(path, entries, "iscrowd", [0] * len(boxes), _is_flag, "0 or 1")
        box_areas = boxes[:, 2:].prod(axis=1).tolist()
        areas = _optional(path, entries, "area", box_areas, _is_number, "a number")
        columns = zip(entries, boxes.tolist(), areas, crowds, strict=True)
        # COCO's evaluation takes an annotation whose id is 0 for none.
        records = [
            entry | {"id": number, "bbox": box, "area": float(area), "iscrowd": int(crowd)}
            for number, (entry, box, area, crowd) in enumerate(columns, 1)
        ]
        return cls(rows, labels, boxes, np.array(crowds, np.bool_), records)

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
    for number, box in enumerate(values, 1):
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
            raise UserError(
                f"--data: {path}: the bbox of annotation {number:,} is {box!r}, not four numbers: "
                "x, y, width, height in pixels"
            )
    return np.array(values, np.float64)


def _optional(
    path: str,
    entries: list[Any],
    key: str,
    usual: Sequence[float],
    is_fit: Callable[[Any], bool],
    wanted: str,
) -> list[Any]:
    """A value of each annotation, what is usual of those without; UserError where one is unfit."""
    values = [entry.get(key, value) for entry, value in zip(entries, usual, strict=True)]
    for number, value in enumerate(values, 1):
        if not is_fit(value):
            raise UserError(
                f'--data: {path}: "{key}" of annotation {number:,} is {value!r}, not {wanted}; '
                "correct it, or take it out"
            )
    return values


def _is_number(value: Any) -> bool:
    """Whether it is a finite number of JSON's."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_flag(value: Any) -> bool:
    """Whether it is 0 or 1, or one of JSON's truth values."""
    return type(value) in (int, bool) and value in (0, 1)


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
