"""Whether a run's network classifies or detects, and which fields only one of the two reads."""

from __future__ import annotations

from typing import Literal

from freeadv_fast.config.method_names import Method
from freeadv_fast.config.phases import Phases

TaskName = Literal["classification", "detection"]

# So torchvision's and our detectors are called; its classifiers never are.
DETECTOR_PREFIX = "retinanet_"

# Methods whose files say all that they do in losses and gradients, whatever these are of. The
# others speak of logits: of distances between predictions, of other classes as targets.
DETECTING: tuple[Method, ...] = (
    "natural", "free", "fgsm", "fgsm-rs", "n-fgsm", "pgd", "fast-advprop",
)  # fmt: skip

# Fields that say something to one task only; one that is in neither is both's.
_OF_DETECTION = ("attack_loss", "eval_corruptions")
_OF_CLASSIFICATION = (
    "mix",
    "mix_alpha",
    "label_smoothing",
    "norm",
    "unlabelled",
    "unlabelled_fraction",
    "max_bad_fraction",
    "phases",
    "phase_data",
    "resize_size",
    "crop_padding",
    "holdout_images",
    "guard_every",
    "guard_images",
    "on_collapse",
    "export",
)
TASK_READERS: dict[str, TaskName] = {
    **{name: "detection" for name in _OF_DETECTION},
    **{name: "classification" for name in _OF_CLASSIFICATION},
}

# What a run of the other task may say nevertheless: what it does anyway.
TASK_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attack_loss": ("sum",),
    "eval_corruptions": ((), ("none",)),
    "mix": ("none",),
    "label_smoothing": (0.0,),
    "norm": ("linf",),
    "unlabelled": (None,),
    "phases": (Phases(),),
    "holdout_images": (None, 0),
    "on_collapse": ("stop",),
    "export": ("last",),
}


def task_of(arch: str) -> TaskName:
    """What a network of this name is for."""
    return "detection" if arch.startswith(DETECTOR_PREFIX) else "classification"


def has_boxes(data: str) -> bool:
    """Whether --data names images with boxes."""
    return data == "shapes" or data.startswith("coco:")
