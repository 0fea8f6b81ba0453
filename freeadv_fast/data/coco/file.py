"""Finds COCO's files and reads them as JSON."""

from __future__ import annotations

import json
import os
from typing import Any, Literal

import numpy as np

from freeadv_fast.data.index import shortened
from freeadv_fast.data.names import class_folders
from freeadv_fast.data.stream import Ints
from freeadv_fast.errors import UserError

# COCO's own splits carry it.
YEARS = ("2017", "")
PARTS = ("images", "annotations", "categories")


def find_split(data: str, split: Literal["train", "val"]) -> tuple[str, str]:
    """The JSON of a split, and the folder of its images.

    Args:
        data: The folder of the user. split: Which half.

    Raises:
        UserError: one of them is not there, or the folder is a classifier's.
    """
    origin = f"--data coco:{data}"
    if not os.path.isdir(data):
        raise UserError(f"{origin}: no such folder")
    for year in YEARS:
        path = os.path.join(data, "annotations", f"instances_{split}{year}.json")
        folder = os.path.join(data, split + year)
        if os.path.isfile(path) and not os.path.isdir(folder):
            raise UserError(f"{origin}: no folder {split}{year}/, whose images {path} describes")
        if os.path.isfile(path):
            return path, folder
    if os.path.isdir(os.path.join(data, split)) and class_folders(os.path.join(data, split))[0]:
        raise UserError(
            f"{origin}: {split}/ holds a folder a class and no boxes; use --data {data} with a "
            "classifier, such as --arch resnet50"
        )
    raise UserError(
        f"{origin}: no annotations/instances_{split}{YEARS[0]}.json in it, nor "
        f"annotations/instances_{split}.json; the images lie beside them, in {split}{YEARS[0]}/ or "
        f"{split}/"
    )


def read_file(path: str) -> dict[str, Any]:
    """The lists of COCO's images, annotations and categories; masks are let go while it is read.

    Raises:
        UserError: not JSON, another structure, or nothing annotated.
    """
    origin = f"--data: {path}"
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file, object_hook=_without_mask)
    except OSError as error:
        raise UserError(f"{origin} cannot be read ({error.strerror})") from None
    except ValueError as error:  # of JSON and of UTF-8
        raise UserError(f"{origin} is not JSON ({error}); download or write it anew") from None
    if not isinstance(content, dict):
        raise UserError(f"{origin} holds no JSON object with the lists {', '.join(PARTS)}")
    for part in PARTS:
        if not isinstance(content.get(part), list):
            raise UserError(f'{origin} has no list "{part}", as COCO\'s instances_*.json have')
        if not content[part]:
            raise UserError(f'{origin}: its list "{part}" is empty, there is nothing to detect')
    return {part: content[part] for part in PARTS}


def _without_mask(entry: dict[str, Any]) -> dict[str, Any]:
    """A JSON object without its polygons, which are most of COCO's bytes."""
    entry.pop("segmentation", None)
    return entry


def bytes_of_images(path: str, folder: str, files: list[str]) -> Ints:
    """Size of each file in bytes: (N,) int64.

    Args:
        path: The JSON that names them, for the error. folder, files: Where they are.

    Raises:
        UserError: some are not there.
    """
    found = {name: os.path.join(folder, name) for name in files}
    missing = [name for name, file in found.items() if not os.path.isfile(file)]
    if missing:
        raise UserError(
            f"--data: {len(missing):,} of the {len(files):,} images of {path} are not in {folder} "
            f"({shortened(missing)}); copy them there, or take them out of the file"
        )
    return np.array([os.path.getsize(file) for file in found.values()], np.int64)
