"""Which runs a detector refuses, and which a classifier: one line that names flag and fix."""

import dataclasses

import pytest

from freeadv_fast.config.fields import RunFields
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.task_fields import DETECTING, TASK_NEUTRAL, TASK_READERS, task_of
from freeadv_fast.errors import UserError
from freeadv_fast.models.zoo import OWN_NETWORKS

DETECTOR = {
    "arch": "retinanet_resnet18_fpn", "data": "shapes", "method": "natural", "m": 1,
    "augment": "flip", "eval_attacks": ("pgd-10",),
}  # fmt: skip


def test_a_detector_is_known_by_its_name():
    assert TrainConfig(**DETECTOR).task == "detection"
    assert TrainConfig(**DETECTOR, image_size=800).longest_side == 1333
    assert {task_of(name) for name in (*OWN_NETWORKS, "resnet50")} == {"classification"}


def test_tables_name_fields():
    names = {field.name for field in dataclasses.fields(RunFields)}
    assert set(TASK_READERS) <= names
    assert set(TASK_NEUTRAL) <= set(TASK_READERS)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": "/some/folder"}, "--data /some/folder: holds no boxes"),
        ({"method": "trades"}, "--method trades: trains classifiers only"),
        ({"augment": "random-resized-crop"}, "--augment random-resized-crop: cuts images"),
        ({"normalization": "per-image"}, "--normalization per-image: padding"),
        ({"method": "free", "m": 4, "attack_loss": "box"}, "--attack-loss box: not for free"),
        ({"eval_attacks": ("cw-10",)}, "--eval-attacks cw-10: a detector is attacked by pgd"),
        ({"eval_attacks": ("pgd-10-5",)}, "--eval-attacks pgd-10-5"),
        ({"eval_attacks": ("autoattack",)}, "--eval-attacks autoattack"),
        ({"mix": "mixup"}, "--mix mixup: not for a detector"),
        ({"label_smoothing": 0.1}, "--label-smoothing 0.1: not for a detector"),
        ({"holdout_images": 100}, "--holdout-images 100: not for a detector"),
        ({"method": "pgd", "norm": "l2"}, "--norm l2: not for a detector"),
        ({"export": "best"}, "--export best: not for a detector"),
        ({"phases": "0-90:128:64"}, "--phases 0-90:128:64: not for a detector"),
    ],
)  # fmt: skip
def test_what_a_detector_refuses(changes, says):
    with pytest.raises(UserError, match=says) as refusal:
        TrainConfig(**DETECTOR | changes)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": "coco:/data/coco"}, "--data coco:/data/coco: holds boxes"),
        ({"data": "shapes"}, "--data shapes: holds boxes"),
        ({"attack_loss": "box"}, "--attack-loss box: not for a classifier"),
        ({"eval_corruptions": "fog"}, "--eval-corruptions fog: not for a classifier"),
        ({"augment": "flip"}, "--augment flip: is a detector's"),
    ],
)
def test_what_a_classifier_refuses(changes, says):
    with pytest.raises(UserError, match=says):
        TrainConfig(**changes)


@pytest.mark.parametrize("method", DETECTING)
def test_methods_that_detect(method):
    TrainConfig(**DETECTOR | {"method": method, "batch_size": 20, "aux_bn_group": 2})
