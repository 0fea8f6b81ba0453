"""Small folders in COCO's layout: coloured rectangles whose boxes are known, and 27 photographs."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

# Category ids have gaps, as COCO's 80 of 90; a class's rectangles are of its colour.
CATEGORIES = {1: "red", 3: "green", 7: "blue"}
COLOURS = {1: (220, 40, 40), 3: (40, 200, 60), 7: (50, 60, 220)}
SIZES = ((48, 64), (64, 48), (40, 64), (64, 64))
SAMPLE = Path(__file__).resolve().parents[3] / "shared" / "data"


def write_coco(
    folder, splits=("train", "val"), num_images=8, sizes=SIZES, num_objects=(1, 3), seed=0
):
    """Writes FOLDER/annotations/instances_SPLIT.json and FOLDER/SPLIT/*.jpg; returns the folder.

    Args:
        folder: Where.
        splits: Names of the splits; each has other images.
        num_images: Of each split, or one number a split.
        sizes: Height and width of the images, in turn.
        num_objects: Fewest and most rectangles of an image.
        seed: Of colours' noise and of places.
    """
    folder = Path(folder)
    counts = [num_images] * len(splits) if isinstance(num_images, int) else num_images
    for number, (split, count) in enumerate(zip(splits, counts, strict=True)):
        random = np.random.default_rng((seed, number))
        images, annotations = [], []
        (folder / split).mkdir(parents=True)
        for row in range(count):
            size = sizes[row % len(sizes)]
            boxes = _boxes(random, size, num_objects)
            name, image_id = f"{row:06d}.jpg", 100 * (number + 1) + 3 * row
            _drawn(random, size, boxes).save(folder / split / name, quality=95, subsampling=0)
            images.append(image_entry(image_id, name, size))
            for category, box in boxes:
                annotations.append(annotation(len(annotations) + 1, image_id, category, box))
        write_annotations(folder, split, images, annotations)
    return folder


def image_entry(image_id, name, size):
    """An image as COCO lists it; `size` is (height, width)."""
    return {"id": image_id, "file_name": name, "height": size[0], "width": size[1]}


def annotation(number, image_id, category, box, is_crowd=0):
    """An object as COCO lists it; `box` is x, y, width, height."""
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category,
        "bbox": list(box),
        "area": box[2] * box[3],
        "iscrowd": is_crowd,
    }


def write_annotations(folder, split, images, annotations, categories=CATEGORIES):
    """Writes FOLDER/annotations/instances_SPLIT.json; returns its path."""
    path = Path(folder) / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = [{"id": key, "name": name} for key, name in categories.items()]
    content = {"images": images, "annotations": annotations, "categories": kinds}
    path.write_text(json.dumps(content))
    return path


def _boxes(random, size, num_objects):
    """Category and x, y, width, height of an image's rectangles, a quarter to half a side each."""
    drawn = []
    for _ in range(random.integers(num_objects[0], num_objects[1] + 1)):
        height, width = (int(random.integers(side // 4, side // 2 + 1)) for side in size)
        y, x = (
            int(random.integers(0, side - length + 1))
            for side, length in zip(size, (height, width), strict=True)
        )
        drawn.append((int(random.choice(list(CATEGORIES))), (x, y, width, height)))
    return drawn


def _drawn(random, size, boxes):
    """Rectangles on noise, the later ones in front."""
    image = Image.fromarray(random.integers(90, 130, (*size, 3), dtype=np.uint8))
    pen = ImageDraw.Draw(image)
    for category, (x, y, width, height) in boxes:
        pen.rectangle((x, y, x + width - 1, y + height - 1), fill=COLOURS[category])
    return image


def sample_folder(tmp):
    """COCO's layout with 27 photographs of val2017 as both splits; skips without them.

    Args:
        tmp: Folder under which it is written.
    """
    archive = Path(os.environ.get("FREEADV_TEST_DATA", SAMPLE)) / "coco_val27" / "coco_val27.zip"
    if not archive.is_file():
        pytest.skip("FREEADV_TEST_DATA holds no coco_val27")
    folder = Path(tmp) / "coco27"
    annotations = (archive.parent / "instances_boxes.json").read_bytes()
    (folder / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (folder / split).mkdir()
        (folder / "annotations" / f"instances_{split}.json").write_bytes(annotations)
    with zipfile.ZipFile(archive) as files:
        for name in files.namelist():
            if name.startswith("images/") and name.endswith(".jpg"):
                first = folder / "train2017" / Path(name).name
                first.write_bytes(files.read(name))
                os.link(first, folder / "val2017" / first.name)
    return folder
