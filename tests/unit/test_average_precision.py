"""COCO's numbers against pycocotools as its authors call it; what the house adds around it."""

from __future__ import annotations

import contextlib
import copy
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from coco_files import CATEGORIES, annotation, image_entry, write_annotations
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.detection import average_precision as module
from freeadv_fast.evaluation.detection.average_precision import (
    FASTER,
    NAMES,
    REFERENCE,
    Detections,
    average_precision,
)

IDS = sorted(CATEGORIES)
NOTHING = Detections(*(np.zeros(s, d) for s, d in (((0, 4), "f4"), (0, "f4"), (0, "i8"))))


@pytest.fixture
def crafted(tmp_path):
    """A record with objects of three sizes, crowds, an image and a class without objects."""
    random = np.random.default_rng(4)
    images = [image_entry(10 + 3 * n, f"{n}.jpg", (300, 400)) for n in range(7)]
    objects = []
    for image in images[:-1]:
        for _ in range(random.integers(1, 6)):
            width, height = (float(side) for side in random.choice([12, 30, 60, 150], 2))
            x, y = (float(place) for place in random.uniform(0, 140, 2))
            category = int(random.choice(IDS[:-1]))
            is_crowd = int(random.random() < 0.15)
            number = len(objects)  # the first is 0, as some files have it
            objects.append(
                annotation(number, image["id"], category, (x, y, width, height), is_crowd)
            )
    assert any(each["iscrowd"] for each in objects)
    path = write_annotations(tmp_path, "val", images, objects)
    return json.loads(path.read_text())


def scattered(record, seed=0):
    """Boxes near the objects, some of another class, some found twice, and some of nothing."""
    random, found = np.random.default_rng(seed), {}
    for image in record["images"]:
        boxes, categories = [], []
        for each in record["annotations"]:
            if each["image_id"] != image["id"]:
                continue
            for _ in range(random.integers(0, 3)):
                x, y, w, h = np.array(each["bbox"]) * random.normal(1, 0.04, 4)
                boxes.append((x, y, x + w, y + h))
                is_right = random.random() < 0.8
                categories.append(each["category_id"] if is_right else random.choice(IDS))
        for _ in range(random.integers(0, 3)):
            x, y, w, h = random.uniform(5, 90, 4)
            boxes.append((x, y, x + w, y + h))
            categories.append(random.choice(IDS))
        scores = random.choice([0.1, 0.4, 0.4, 0.7, 0.9], len(boxes))  # some are equal
        found[image["id"]] = Detections(
            np.array(boxes, "f4").reshape(-1, 4), scores.astype("f4"), np.array(categories, "i8")
        )
    return found


def as_its_authors_call_it(record, detections, image_ids, tmp_path):
    """The library's documented way, from files."""
    path = tmp_path / "truth.json"
    objects = [each | {"id": n} for n, each in enumerate(record["annotations"], 1)]
    path.write_text(json.dumps(record | {"annotations": objects}))
    results = [
        {
            "image_id": image_id,
            "category_id": int(category),
            "bbox": [float(x1), float(y1), float(x2 - x1), float(y2 - y1)],
            "score": float(score),
        }
        for image_id, found in detections.items()
        for (x1, y1, x2, y2), score, category in zip(*found, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("package", [FASTER, REFERENCE], ids=lambda package: package.evaluator)
@pytest.mark.parametrize("num_images", [7, 4])
def test_numbers_equal_pycocotools(crafted, package, num_images, tmp_path, capsys):
    """Over all images and over some; the objects of the others do not count as missed."""
    before, detections = copy.deepcopy(crafted), scattered(crafted)
    chosen = dict(list(detections.items())[:num_images])
    own = average_precision(crafted, chosen, package)
    assert capsys.readouterr().out == ""
    expected = as_its_authors_call_it(crafted, detections, chosen, tmp_path)
    assert len(set(np.round(expected.stats, 6))) > 8
    assert [own.numbers[name] for name in NAMES] == pytest.approx(expected.stats, abs=1e-9)
    assert crafted == before
    for row, (category, name) in enumerate(sorted(CATEGORIES.items())):
        precision = expected.eval["precision"][:, :, row, 0, 2]
        if category == IDS[-1]:  # no image holds one
            assert own.per_class[name] is None
        else:
            assert own.per_class[name] == pytest.approx(precision.mean(), abs=1e-9)


@pytest.mark.parametrize("package", [FASTER, REFERENCE], ids=lambda package: package.evaluator)
def test_nothing_found_and_nothing_to_find(crafted, package):
    """No detection scores 0; a number that no object defines is None, not -1."""
    ids = [image["id"] for image in crafted["images"]]
    nothing = average_precision(crafted, dict.fromkeys(ids, NOTHING), package)
    assert set(nothing.numbers.values()) == {0.0}
    assert nothing.per_class == {"red": 0.0, "green": 0.0, "blue": None}
    bare = average_precision(crafted, {ids[-1]: scattered(crafted)[ids[-1]]}, package)
    assert set(bare.numbers.values()) == set(bare.per_class.values()) == {None}
    small = [each for each in crafted["annotations"] if each["area"] < 32**2]
    measured = average_precision(
        crafted | {"annotations": small}, dict.fromkeys(ids, NOTHING), package
    )
    assert (measured.numbers["APs"], measured.numbers["APl"]) == (0.0, None)


def exact(record, shift=0.0):
    """Every object found where it is, or pixels to its right; crowds are not for finding."""
    found = {}
    for image in record["images"]:
        own = [
            each
            for each in record["annotations"]
            if each["image_id"] == image["id"] and not each["iscrowd"]
        ]
        boxes = [(x + shift, y, x + shift + w, y + h) for x, y, w, h in (e["bbox"] for e in own)]
        found[image["id"]] = Detections(
            np.array(boxes, "f4").reshape(-1, 4),
            np.ones(len(own), "f4"),
            np.array([each["category_id"] for each in own], "i8"),
        )
    return found


def test_perfect_detections_score_one_and_shifted_ones_less(crafted):
    perfect = average_precision(crafted, exact(crafted)).numbers
    shifted = average_precision(crafted, exact(crafted, shift=2.5)).numbers
    assert (perfect["AP"], perfect["AP50"], perfect["AR100"]) == pytest.approx((1, 1, 1), abs=1e-6)
    assert 0.3 < shifted["AP"] < 0.95
    assert shifted["AP50"] > shifted["AP75"]


def test_a_missing_package_is_named(crafted, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install faster-coco-eval"):
        average_precision(crafted, scattered(crafted))
