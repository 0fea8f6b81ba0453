"""Free training of detectors: Li et al. 2023, in the code of thu-ml/oddefense.

Theirs are eps and step 4/255, m 4, and six passes over the data. The rest is `detection`'s, and the
optimizer with it (theirs: AdamW); so is what moves the perturbation: the gradient of all that
trains the weights, from the one backward pass that makes it free. Theirs is a two-stage detector
whose perturbation ascends its head's losses alone, in a pass of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.recipes.detection import COCO

FREE: dict[str, Any] = {"method": "free", "m": 4, "eps": Perturbation.parse("4/255")}


def rows() -> dict[str, TrainConfig]:
    """24 epochs at m 4 are the six passes."""
    return {"coco-retinanet50-free-m4-eps4": replace(COCO, **FREE)}
