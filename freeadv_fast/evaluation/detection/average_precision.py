"""COCO's twelve numbers, computed by the benchmark's own code or its faster twin.

Source: Lin et al. 2014, "Microsoft COCO"; pycocotools' `COCOeval`, of which faster-coco-eval is a
translation to C++ with the same numbers.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from freeadv_fast.errors import UserError

# In the order of `COCOeval.stats`. AP and AR are means over IoU thresholds .50 to .95; AR1, AR10
# and AR100 allow so many detections an image; small is below 32^2 pixels, large from 96^2.
NAMES = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"
)  # fmt: skip


class Package(NamedTuple):
    """Where a package that computes average precision keeps it.

    Attributes:
        coco: Module of the class ``COCO``.
        evaluation: Module of the evaluator.
        evaluator: Its class.
    """

    coco: str
    evaluation: str
    evaluator: str

    @property
    def is_installed(self) -> bool:
        """Whether it can be imported."""
        return importlib.util.find_spec(self.coco.partition(".")[0]) is not None


FASTER = Package("faster_coco_eval.core", "faster_coco_eval.core", "COCOeval_faster")
REFERENCE = Package("pycocotools.coco", "pycocotools.cocoeval", "COCOeval")


class Detections(NamedTuple):
    """What was found in one image.

    Attributes:
        boxes: (k, 4) float32, x1, y1, x2, y2 in pixels of the stored image.
        scores: (k,) float32.
        category_ids: (k,) int64, as the annotations number them.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    category_ids: NDArray[np.int64]


class Precision(NamedTuple):
    """COCO's numbers, fractions; None where no object defines one.

    Attributes:
        numbers: Those of `NAMES`.
        per_class: AP of each class by its name.
    """

    numbers: dict[str, float | None]
    per_class: dict[str, float | None]


def find_package() -> Package:
    """The faster of those that are installed.

    Raises:
        UserError: there is none.
    """
    for package in (FASTER, REFERENCE):
        if package.is_installed:
            return package
    raise UserError(
        "evaluating a detector needs COCO's own measure: pip install faster-coco-eval (or "
        "pycocotools)"
    )


def average_precision(
    record: Mapping[str, Any],
    detections: Mapping[int, Detections],
    package: Package | None = None,
) -> Precision:
    """Compares detections with the objects of those images, and of no others.

    Args:
        record: COCO's ``images``, ``annotations`` and ``categories``, crowds included; unchanged.
        detections: By image id; one for each image that was evaluated, though it be empty.
        package: Default: `find_package`'s.

    Raises:
        UserError: as `find_package`.
    """
    package = package or find_package()
    coco = importlib.import_module(package.coco).COCO
    evaluator = getattr(importlib.import_module(package.evaluation), package.evaluator)
    images = [image for image in record["images"] if image["id"] in detections]
    truth, found = coco(), coco()
    truth.dataset = {
        "images": images,
        "annotations": _objects(record, detections),
        "categories": record["categories"],
    }
    found.dataset = truth.dataset | {"annotations": _as_annotations(detections)}
    with contextlib.redirect_stdout(io.StringIO()):  # the packages talk
        truth.createIndex()
        found.createIndex()
        evaluation = evaluator(truth, found, iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    numbers = map(_defined, evaluation.stats[: len(NAMES)])
    return Precision(dict(zip(NAMES, numbers, strict=True)), _by_class(record, evaluation))


def _objects(record: Mapping[str, Any], images: Container[int]) -> list[dict[str, Any]]:
    """The annotations of some images, as copies: evaluators write into them.

    They are numbered from 1, for to an evaluator the number 0 means no match.
    """
    own = (each for each in record["annotations"] if each["image_id"] in images)
    return [each | {"id": number} for number, each in enumerate(own, 1)]


def _as_annotations(detections: Mapping[int, Detections]) -> list[dict[str, Any]]:
    """Detections in COCO's form: x, y, width, height, and an area to sort them by."""
    listed: list[dict[str, Any]] = []
    for image_id, (boxes, scores, category_ids) in detections.items():
        corners, sides = boxes[:, :2].tolist(), (boxes[:, 2:] - boxes[:, :2]).tolist()
        rows = zip(corners, sides, scores.tolist(), category_ids.tolist(), strict=True)
        for corner, (width, height), score, category_id in rows:
            listed.append(
                {
                    "id": len(listed) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": [*corner, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                    "score": score,
                }
            )
    return listed


def _by_class(record: Mapping[str, Any], evaluation: Any) -> dict[str, float | None]:
    """AP of each class, by its name, in the order of the categories' ids."""
    names = {category["id"]: str(category["name"]) for category in record["categories"]}
    precision = evaluation.eval["precision"]  # IoU thresholds, recalls, classes, areas, detections
    per_class = {}
    for row, category_id in enumerate(evaluation.params.catIds):
        own = precision[:, :, row, 0, -1]
        own = own[own > -1]
        per_class[names[category_id]] = float(own.mean()) if own.size else None
    return per_class


def _defined(number: float) -> float | None:
    """A number of the evaluator's, which says -1 where there is none."""
    return None if number < 0 else float(number)
