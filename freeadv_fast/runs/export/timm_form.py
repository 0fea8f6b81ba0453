"""What timm reads of an export: the fields of config.json by which it builds and feeds a network.

``timm.create_model("local-dir:FOLDER", pretrained=True)`` builds ``architecture`` with
``model_args``, loads ``model.safetensors``, and says through ``pretrained_cfg`` how images are to
be resized, cropped and normalised (timm 1.0, `timm/models/_hub.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from freeadv_fast.models.own import is_own
from freeadv_fast.models.zoo import TIMM_PREFIX, build_model, library_options, network_source
from freeadv_fast.runs.foreign import first_misfit

# Logits of one network under two libraries' code; they differ in the order of sums at most.
TOLERANCE = 1e-4


def timm_fields(
    arch: str,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int,
    resize_size: int,
) -> dict[str, Any]:
    """The fields of config.json that timm reads.

    Args:
        arch: The network's name here.
        classes: Class names in the order of the logits.
        mean: Per-channel mean in [0, 1].
        std: Per-channel standard deviation.
        image_size: Side of the square images, in pixels.
        resize_size: Shorter side before the central crop, in pixels; 0 for images as stored.

    Returns:
        ``architecture`` (timm's name, and ours for a network that timm does not have),
        ``num_classes``, ``label_names``, ``pretrained_cfg``; of timm's also ``num_features``, and
        ``model_args`` where a transformer is built for one size.
    """
    pretrained: dict[str, Any] = {
        "num_classes": len(classes),
        "input_size": [3, image_size, image_size],
        "fixed_input_size": False,
        "interpolation": "bilinear",
        "crop_pct": image_size / (resize_size or image_size),
        "crop_mode": "center",
        "mean": list(mean),
        "std": list(std),
    }
    fields: dict[str, Any] = {
        "architecture": arch.removeprefix(TIMM_PREFIX),
        "num_classes": len(classes),
        "label_names": list(classes),
        "pretrained_cfg": pretrained,
    }
    known = timm_facts(arch, len(classes), image_size)
    if known is None:
        return fields
    num_features, layers = known
    pretrained |= layers
    options = library_options(TIMM_PREFIX + fields["architecture"], len(classes), image_size)
    del options["num_classes"]
    fields |= {"num_features": num_features}
    return fields | ({"model_args": options} if options else {})


@functools.cache
def timm_facts(arch: str, num_classes: int, image_size: int) -> tuple[int, dict[str, Any]] | None:
    """What timm says of its network of that name, where its weights mean the same in it.

    torchvision and timm share the code of ResNets in all but its place; of other networks only the
    name. So a torchvision network's logits are compared with timm's under the same random weights,
    on one image. That is a fact of the two libraries, found once.

    Args:
        arch: The network's name here. num_classes: Logits.
        image_size: Side of the square images, in pixels.

    Returns:
        The width before the classifier, and what of ``pretrained_cfg`` describes the network: its
        first and last layer, and whether it is built for one size. None where timm has no such
        network, or another one.
    """
    if is_own(arch) or network_source(arch) == "freeadv_fast":
        return None
    import timm  # a quarter of a second

    name = arch.removeprefix(TIMM_PREFIX)
    if not timm.is_model(name):
        return None
    with torch.random.fork_rng([]):
        twin: Any = build_model(TIMM_PREFIX + name, num_classes, image_size=image_size)
        if network_source(arch) == "torchvision":
            own = build_model(arch, num_classes, image_size=image_size)
            if first_misfit(twin.state_dict(), own.state_dict()):
                return None
            twin.load_state_dict(own.state_dict())
            if not _agree(own.eval(), twin.eval(), image_size):
                return None
    layers = {key: twin.pretrained_cfg.get(key) for key in ("first_conv", "classifier")}
    is_fixed = bool(twin.pretrained_cfg.get("fixed_input_size"))
    return twin.num_features, layers | {"fixed_input_size": is_fixed}


def _agree(one: nn.Module, other: nn.Module, image_size: int) -> bool:
    """Whether two networks, in eval mode, have the same logits on an image of noise."""
    pixels = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.allclose(one(pixels), other(pixels), rtol=TOLERANCE, atol=TOLERANCE)
