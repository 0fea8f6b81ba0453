"""The data sets that others have a name for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

CIFAR10 = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set by its names.

    Attributes:
        title: As people say it.
        hub: On the Hugging Face Hub; None where it is not there.
        robustbench: RobustBench's key; None where that has no leaderboard of it.
        num_test_images: Of the whole test or validation set; what RobustBench attacks of it.
    """

    title: str
    hub: str | None = None
    robustbench: str | None = None
    num_test_images: int | None = None


_KNOWN = {
    "cifar10": Dataset("CIFAR-10", "uoft-cs/cifar10", "cifar10", 10_000),
    "cifar100": Dataset("CIFAR-100", "uoft-cs/cifar100", "cifar100", 10_000),
    "svhn": Dataset("SVHN", "ufldl-stanford/svhn"),
    "digits": Dataset("scikit-learn's handwritten digits"),
    "synthetic": Dataset("random pixels"),
    "shapes": Dataset("synthetic shapes with boxes"),
    "coco": Dataset("images with COCO's 80 classes"),
    "imagenet": Dataset("ImageNet", "ILSVRC/imagenet-1k", "imagenet", 5_000),
}


def dataset_of(data: str, classes: Sequence[str]) -> Dataset:
    """The data set of a run.

    Args:
        data: What `--data` was. Folders are known by their classes: CIFAR-10's ten, ImageNet's
            thousand, in the order that everyone numbers them in. COCO's eighty have other images
            too, of which nothing here tells COCO's own.
        classes: Class names in the order of the logits.
    """
    kind = data.partition(":")[0]
    if kind not in _KNOWN and tuple(classes) == CIFAR10:
        kind = "cifar10"
    if kind not in _KNOWN and len(classes) == 1000:
        kind = "imagenet" if all(re.fullmatch(r"n\d{8}", name) for name in classes) else kind
    if kind == "imagenet" and len(classes) != 1000:
        kind = ""
    if kind == "coco" and (len(classes) != 80 or classes[0] != "person"):
        return Dataset(f"images with boxes of {len(classes)} classes")
    return _KNOWN.get(kind, Dataset(f"a folder of images of {len(classes)} classes"))
