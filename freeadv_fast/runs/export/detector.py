"""A trained detector for use elsewhere: safetensors that torchvision's RetinaNet loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torchvision
from safetensors.torch import save

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.models.batch_norm import without_auxiliary
from freeadv_fast.models.retinanet import Detector
from freeadv_fast.runs.export.detector_card import DetectorSubject, detector_card
from freeadv_fast.runs.export.folder import claim, write_bytes, write_record
from freeadv_fast.runs.export.network import CONFIG, PLAIN, stored
from freeadv_fast.runs.export.trained import write_card

DETECTION = "torchvision.models.detection"


def export_detector(
    model: Detector,
    folder: Path,
    *,
    config: TrainConfig,
    classes: Sequence[str],
    record: Mapping[str, Any] | None,
    weights: str = "last",
    category_ids: Sequence[int] | None = None,
) -> Path:
    """Writes three files, each whole or not at all: the weights, config.json and a model card.

    ``model.safetensors`` has the keys of torchvision's `RetinaNet`; an auxiliary batch norm stays
    behind. torchvision resizes and normalises inside of the network, so that it takes pixels.

    Args:
        model: The detector, on any device; left as it is.
        folder: Made if missing, such as ``RUN/export``.
        config: Of the run.
        classes: Class names in the order of the logits; there is none for the background.
        record: What the run's result.json holds, None where there is none.
        weights: Which weights of the run these are: ``last``, ``average``, or a checkpoint's name,
            of which the result says nothing.
        category_ids: The data set's own id of each class, where they are known.

    Returns:
        The folder.

    Raises:
        UserError: a file, a folder that holds something else, or one that cannot be made.
    """
    claim(folder, PLAIN)
    tensors = {key: stored(v) for key, v in without_auxiliary(model.state_dict()).items()}
    write_bytes(folder / PLAIN, save(tensors, {"format": "pt"}))
    exported = describe_detector(config, classes, category_ids)
    write_record(folder / CONFIG, exported)
    write_card(folder, detector_card(DetectorSubject(config, classes, weights, record, exported)))
    return folder


def describe_detector(
    config: TrainConfig, classes: Sequence[str], category_ids: Sequence[int] | None
) -> dict[str, Any]:
    """What config.json says; arguments as `export_detector`'s."""
    return {
        "task": "detection",
        "arch": config.arch,
        "num_classes": len(classes),
        "class_names": list(classes),
        "category_ids": None if category_ids is None else list(category_ids),
        "mean": list(config.pixel_mean),
        "std": list(config.pixel_std),
        "input_range": [0.0, 1.0],
        "input_layout": "a list of (3, H, W) float32, RGB",
        "image_size": config.image_size,
        "longest_side": config.longest_side,
        "interpolation": "bilinear, antialiased (PIL)",
        "method": config.method,
        "eps": str(config.eps),
        "files": {
            PLAIN: "torchvision's RetinaNet, which resizes and normalises pixels in [0, 1] itself"
        },
        "load": {PLAIN: loading_lines(config, len(classes))},
    }


def loading_lines(config: TrainConfig, num_classes: int) -> list[str]:
    """The lines that load the file into torchvision's own code and detect objects in ``pixels``."""
    options = ", ".join(
        [
            f"min_size={config.image_size}",
            f"max_size={config.longest_side}",
            f"image_mean={list(config.pixel_mean)}",
            f"image_std={list(config.pixel_std)}",
        ]
    )
    return [
        *builder_lines(config.arch, num_classes, options),
        f"model.load_state_dict(safetensors.torch.load_file({PLAIN!r}))",
        "(found,) = model.eval()([pixels])",
    ]


def builder_lines(arch: str, num_classes: int, options: str) -> list[str]:
    """The lines that build torchvision's network.

    Args:
        arch: Its name here; torchvision has those with a ResNet-50, of others we have the parts.
        num_classes: Classes of objects.
        options: Further arguments of the network.
    """
    if hasattr(torchvision.models.detection, arch):
        return [
            f"model = {DETECTION}.{arch}(",
            f"    weights=None, weights_backbone=None, num_classes={num_classes},",
            f"    {options},",
            ")",
        ]
    return [
        f"parts = freeadv_fast.models.retinanet.build_detector({arch!r}, {num_classes})",
        f"model = {DETECTION}.RetinaNet(",
        f"    parts.backbone, {num_classes}, head=parts.head,",
        "    anchor_generator=parts.anchor_generator,",
        f"    {options},",
        ")",
    ]
