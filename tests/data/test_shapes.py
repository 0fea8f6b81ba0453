"""The embedded set of drawn shapes."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from PIL import Image

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.build import build_loaders
from freeadv_fast.data.coco import shapes
from freeadv_fast.data.coco.shapes import CLASSES, draw_image, shapes_folder
from freeadv_fast.errors import UserError


@pytest.fixture
def few(monkeypatch):
    """A set that is drawn in a moment."""
    monkeypatch.setattr(shapes, "NUM_IMAGES", {"train": 20, "val": 6})


def test_it_is_written_once_and_is_always_the_same(few, cache):
    folder = shapes_folder()
    assert folder == str(cache / "shapes-1")
    before = {
        split: open(f"{folder}/{split}/000003.jpg", "rb").read() for split in ("train", "val")
    }
    stamp = os.stat(folder).st_mtime_ns
    assert shapes_folder() == folder
    assert os.stat(folder).st_mtime_ns == stamp
    assert before["train"] != before["val"]
    os.rename(folder, cache / "first")
    shapes_folder()
    for split, content in before.items():
        assert open(f"{folder}/{split}/000003.jpg", "rb").read() == content
    assert sorted(entry for entry in os.listdir(cache) if "shapes" in entry) == ["shapes-1"]


def test_it_is_coco_of_several_shapes_and_says_that_it_is_synthetic(few, world):
    content = json.load(open(f"{shapes_folder()}/annotations/instances_train.json"))
    assert "synthetic" in content["info"]["description"]
    config = TrainConfig(
        data="shapes", arch="retinanet_resnet10_fpn_64", method="natural", m=1, image_size=128,
        batch_size=4, augment="flip", workers=0,
    )  # fmt: skip
    loaders = build_loaders(config, world)
    assert (loaders.train.num_images, loaders.val.num_images) == (20, 6)
    assert loaders.train.classes == list(CLASSES)
    annotations = loaders.train.annotations
    assert annotations.num_objects == len(content["annotations"])
    assert {len(boxes) for boxes in annotations.boxes} <= {1, 2, 3, 4}
    ratios = annotations.sizes[:, 0] / annotations.sizes[:, 1]
    assert ratios.min() < 1 < ratios.max()
    for batch in loaders.train.epoch(0):
        assert all(side in (128, 160, 192) for side in batch.images.shape[1:3])


def test_boxes_enclose_what_was_drawn():
    for seed in range(30):
        picture, objects = draw_image(np.random.default_rng(seed))
        # The last shape is in front: all of it is of one colour, its pixels are where its box is.
        x, y, width, height = objects[-1]["bbox"]
        assert 0 <= x
        assert 0 <= y
        assert x + width <= picture.width
        assert y + height <= picture.height
        assert 12 <= min(width, height) <= max(width, height) <= 72
        pixels = np.asarray(picture).astype(int)
        colour = pixels[int(y + height / 2), int(x + width / 2)]
        is_shape = (pixels == colour).all(axis=2)
        rows, columns = (np.flatnonzero(is_shape.any(axis=axis)) for axis in (1, 0))
        found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        # Corners thin out below a whole pixel.
        assert np.abs(np.array(found) - (x, y, x + width, y + height)).max() < 4
        area = objects[-1]["area"]
        assert is_shape.sum() <= area <= is_shape.sum() + 2 * (width + height)
        share = (np.pi / 4, None, None)[objects[-1]["category_id"] - 1]
        assert share is None or area == pytest.approx(share * width * height, rel=0.01)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME to a folder that can"):
        shapes_folder()


def test_a_kill_while_it_is_written_leaves_no_half_of_it(few, cache, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shapes_folder()
    assert not list(cache.iterdir())
    shapes_folder()
