"""Synthetic images of discs, squares and triangles with their boxes, in the user's cache.

The embedded set of detectors: drawn, not photographed, so that a figure on it says whether training
works and nothing about photographs. It lies there in COCO's layout and is read as COCO is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageStat

from freeadv_fast.data.cache import embedded_folder

NUM_IMAGES = {"train": 1200, "val": 200}
CLASSES = ("disc", "square", "triangle")
# Height and width.
SIZES = ((96, 128), (128, 96), (112, 128), (128, 128))
MOST_OBJECTS = 4
# Of the circle around a shape, in pixels.
DIAMETERS = (24, 72)
# The largest part of a box that another may cover.
MOST_COVERED = 0.3
# Of an image's shape, until one is visible and free; it has one less where none is.
NUM_TRIES = 20
# Levels by which a colour differs from its background in some channel.
LEAST_CONTRAST = 80
# Edges are drawn so many times as large, and averaged.
OVERSAMPLING = 4
JPEG_QUALITY = 95
DESCRIPTION = "synthetic: coloured shapes drawn by freeadv_fast, no photographs"
# A new name when the files' content changes.
FOLDER_NAME = "shapes-1"

# (n, 2) x and y.
Corners = NDArray[np.float64]
Box = tuple[float, float, float, float]


def shapes_folder() -> str:
    """The folder of the shapes in COCO's layout, written on first use.

    Raises:
        UserError: the cache folder cannot be written.
    """
    return embedded_folder(FOLDER_NAME, "--data shapes", _write_splits)


def _write_splits(folder: Path) -> None:
    """Writes train and val, the same for ever."""
    for split in NUM_IMAGES:
        _write_split(folder, split)


def _write_split(folder: Path, split: str) -> None:
    """Draws a split's images, each from a seed of its own, and their annotations."""
    (folder / split).mkdir()
    (folder / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for row in range(NUM_IMAGES[split]):
        random = np.random.default_rng((list(NUM_IMAGES).index(split), row))
        picture, objects = draw_image(random)
        name = f"{row:06d}.jpg"
        picture.save(folder / split / name, quality=JPEG_QUALITY, subsampling="4:4:4")
        size = {"height": picture.height, "width": picture.width}
        images.append({"id": row + 1, "file_name": name} | size)
        for entry in objects:
            numbers = {"id": len(annotations) + 1, "image_id": row + 1, "iscrowd": 0}
            annotations.append(numbers | entry)
    content = {
        "info": {"description": DESCRIPTION},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": place, "name": name} for place, name in enumerate(CLASSES, 1)],
    }
    path = folder / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(content), encoding="utf-8")


def draw_image(random: Generator) -> tuple[Image.Image, list[dict[str, Any]]]:
    """An image of 1 to 4 shapes, and category_id, bbox (x, y, width, height) and area of each."""
    height, width = SIZES[random.integers(len(SIZES))]
    picture = _background(random, height, width)
    boxes: list[Box] = []
    objects = []
    for _ in range(random.integers(1, MOST_OBJECTS + 1)):
        kind = int(random.integers(len(CLASSES)))
        outline = _free_outline(random, kind, (height, width), boxes)
        if outline is None:
            continue
        mask = _mask(outline, (height, width))
        picture.paste(_colour(random, picture, mask), mask=mask)
        boxes.append(_extent(outline))
        x1, y1, x2, y2 = (round(number, 2) for number in boxes[-1])
        area = round(float(np.asarray(mask, np.float64).sum()) / 255, 2)
        bbox = [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)]
        objects.append({"category_id": kind + 1, "bbox": bbox, "area": area})
    return picture, objects


def _background(random: Generator, height: int, width: int) -> Image.Image:
    """Smooth coloured patches under noise."""
    patches = random.integers(0, 256, (int(random.integers(2, 7)),) * 2 + (3,), dtype=np.uint8)
    smooth = Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)
    noise = random.normal(0, random.uniform(2, 16), (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8))


def _outline(random: Generator, kind: int, size: tuple[int, int]) -> Corners:
    """Corners of a shape inside an image of `size`, (n, 2) x and y; a disc has 64 of them."""
    num_corners = (64, 4, 3)[kind]
    radius = random.uniform(*DIAMETERS) / 2
    angles = random.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(num_corners) / num_corners
    corners = radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    low, high = corners.min(axis=0), corners.max(axis=0)
    outline: Corners = corners + random.uniform(-low, np.array(size[::-1]) - high)
    return outline


def _free_outline(
    random: Generator, kind: int, size: tuple[int, int], boxes: list[Box]
) -> Corners | None:
    """An outline that covers little of the boxes that are there; None where none was found."""
    for _ in range(NUM_TRIES):
        outline = _outline(random, kind, size)
        if all(_covered(_extent(outline), box) <= MOST_COVERED for box in boxes):
            return outline
    return None


def _extent(outline: Corners) -> Box:
    """The box around an outline: x1, y1, x2, y2."""
    (x1, y1), (x2, y2) = outline.min(axis=0), outline.max(axis=0)
    return float(x1), float(y1), float(x2), float(y2)


def _covered(one: Box, other: Box) -> float:
    """What two boxes share, as a part of the smaller one."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return max(width, 0) * max(height, 0) / min(areas)


def _mask(outline: Corners, size: tuple[int, int]) -> Image.Image:
    """How much of each pixel of an image of `size` a shape covers, 0 to 255."""
    corner, end = np.floor(outline.min(axis=0)), np.ceil(outline.max(axis=0))
    width, height = (end - corner).astype(int).tolist()
    large = Image.new("L", (OVERSAMPLING * width, OVERSAMPLING * height))
    # PIL draws the pixels whose middles lie on the outline as well: half a pixel outwards.
    corners = OVERSAMPLING * (outline - corner) - 0.5
    ImageDraw.Draw(large).polygon(corners.ravel().tolist(), fill=255)
    mask = Image.new("L", size[::-1])
    mask.paste(large.resize((width, height), Image.Resampling.BOX), tuple(corner.astype(int)))
    return mask


def _colour(random: Generator, picture: Image.Image, mask: Image.Image) -> tuple[int, int, int]:
    """A colour that stands out from the mean of what a mask touches."""
    under = np.array(ImageStat.Stat(picture, mask).mean)
    while True:
        red, green, blue = random.integers(0, 256, 3).tolist()
        if np.abs(under - (red, green, blue)).max() >= LEAST_CONTRAST:
            return red, green, blue
