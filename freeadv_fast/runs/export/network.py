"""A trained network for use elsewhere: safetensors under stock keys, and what to feed it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from freeadv_fast.errors import UserError
from freeadv_fast.models.batch_norm import without_auxiliary
from freeadv_fast.models.normalize import (
    InputNormalizer,
    StandardizedNetwork,
    plain_network,
    with_normalizer,
)
from freeadv_fast.models.own import adopt, class_of, is_own, refuse_unnamed_network
from freeadv_fast.models.zoo import TIMM_PREFIX, build_model, library_options, network_source
from freeadv_fast.runs.export.folder import claim, write_bytes, write_record
from freeadv_fast.runs.export.timm_form import timm_fields
from freeadv_fast.runs.foreign import first_misfit, printable

PLAIN, NORMALIZED, CONFIG, ONNX = (
    "model.safetensors",
    "model_with_normalizer.safetensors",
    "config.json",
    "model.onnx",
)


def export_model(
    model: nn.Module,
    folder: str | Path,
    *,
    arch: str,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int,
    resize_size: int,
) -> Path:
    """Writes three files, each whole or not at all; config.json, written last, explains the others.

    It is timm's config.json too: see `timm_form`.

    ``model.safetensors`` has the keys of torchvision, timm or `freeadv_fast.models`, whichever
    defines the network, and takes normalised images; an auxiliary batch norm stays behind.
    ``model_with_normalizer.safetensors`` has the same tensors under ``model.`` beside
    ``normalize.mean`` and ``normalize.std`` (1, 3, 1, 1), the layout of RobustBench, and takes
    pixels in [0, 1]. A ``model.onnx`` of earlier weights is taken away.

    Args:
        model: What `zoo.build_model` returned, on any device; left as it is.
        folder: Made if missing, such as ``RUN/export``.
        arch: The network's name, ``custom (Net)`` for a network of the user's own.
        classes: Class names in the order of the logits.
        mean: Per-channel mean that training subtracted, in [0, 1].
        std: Per-channel standard deviation that it divided by.
        image_size: Side of the square images, in pixels.
        resize_size: Shorter side before the central crop, in pixels; 0 for images as stored.

    Returns:
        The folder.

    Raises:
        UserError: a file, a folder that holds something else, or one that cannot be made.
    """
    folder = Path(folder)
    claim(folder, NORMALIZED)
    (folder / ONNX).unlink(missing_ok=True)
    plain = without_auxiliary(plain_network(model).state_dict())
    weights = {key: stored(value) for key, value in plain.items()}
    normalizer = InputNormalizer(mean, std).state_dict()
    wrapped = {f"normalize.{key}": value for key, value in normalizer.items()}
    wrapped |= {f"model.{key}": value for key, value in weights.items()}
    metadata = {"format": "pt"}
    write_bytes(folder / NORMALIZED, save(wrapped, metadata))
    write_bytes(folder / PLAIN, save(weights, metadata))
    data = (classes, mean, std, image_size, resize_size)
    per_image = isinstance(model, StandardizedNetwork)
    config = timm_fields(arch, *data) | describe(arch, *data, per_image=per_image)
    write_record(folder / CONFIG, config)
    return folder


def load_export(folder: str | Path, *, model: nn.Module | None = None) -> nn.Module:
    """Rebuilds an exported network.

    Args:
        folder: What `export_model` wrote, such as ``RUN/export``.
        model: Your own network where the run trained one: a module of the same class and shapes,
            of which a copy takes the weights.

    Returns:
        The network in eval mode, on the CPU: (N, 3, H, W) float32 pixels in [0, 1] to (N, classes)
        float32 logits. Children `normalize` and `model`.

    Raises:
        UserError: the folder holds no export, a damaged one, or one of another network or of a
            detector; a `ValueError` with one line.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        refuse_detector_export(config, folder)
        weights = load_file(folder / NORMALIZED)
        arch = config.get("arch", config["architecture"])  # version 0.2.0 had no timm's name
        num_classes, size = config["num_classes"], config["image_size"]
        mean, std, standardize = (config[k] for k in ("mean", "std", "per_image_standardization"))
    except UserError:  # of a detector
        raise
    except OSError as error:
        raise UserError(f"{folder}: not an export ({error.strerror or error})") from None
    except (ValueError, SafetensorError) as error:  # no UTF-8, no JSON, no tensors
        raise UserError(f"{folder}: damaged export ({printable(str(error))})") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: {CONFIG} is not an export's ({printable(str(error))})"
        ) from None
    if model is None:
        refuse_unnamed_network(arch)
        built = build_model(arch, num_classes, image_size=size, per_image_standardize=standardize)
    else:
        built = adopt(model, num_classes, image_sizes=[size], per_image_standardize=standardize)
    plain = {key.removeprefix("model."): weights[key] for key in weights if key[:6] == "model."}
    misfit = first_misfit(plain_network(built).state_dict(), plain)
    if misfit:
        raise UserError(f"{folder}: holds the weights of {arch}, another network ({misfit})")
    plain_network(built).load_state_dict(plain)
    return with_normalizer(built, mean, std).eval()


def refuse_detector_export(config: Mapping[str, Any], folder: Path) -> None:
    """Sends who has the export of a detector to torchvision.

    Args:
        config: What config.json says. folder: Where it lies.

    Raises:
        UserError: it is of a detector.
    """
    if config.get("task") == "detection":
        raise UserError(
            f"{folder}: the export of a detector, which torchvision loads by the lines in its "
            "README.md"
        )


def describe(
    arch: str,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int,
    resize_size: int,
    *,
    per_image: bool,
) -> dict[str, Any]:
    """What config.json says beside timm's fields; arguments as `export_model`'s."""
    standardize = " Between them each image is standardised by its own statistics." * per_image
    return {
        "arch": arch,
        "architecture_source": "custom" if is_own(arch) else network_source(arch),
        "class_names": list(classes),
        "mean": list(mean),
        "std": list(std),
        "input_range": [0.0, 1.0],
        "input_layout": "(N, 3, H, W) float32, RGB",
        "image_size": image_size,
        "resize_size": resize_size,
        "interpolation": "bilinear",
        "per_image_standardization": per_image,
        "files": {
            PLAIN: "the network alone; it takes (pixels - mean) / std." + standardize,
            NORMALIZED: "normalize.mean, normalize.std and the network under model.; it takes "
            "pixels in [0, 1]." + standardize,
        },
        "load": {
            PLAIN: [
                _build_line(arch, len(classes), image_size),
                f"model.load_state_dict(safetensors.torch.load_file({PLAIN!r}))",
                f"logits = model.eval()({_input_line(per_image)})",
            ],
            NORMALIZED: [
                "import freeadv_fast",
                *([_build_line(arch, len(classes), image_size)] if is_own(arch) else []),
                f"model = freeadv_fast.load_export('.'{', model=model' if is_own(arch) else ''})",
                "logits = model(pixels)",
            ],
        },
    }


def _build_line(arch: str, num_classes: int, image_size: int) -> str:
    """The line that builds the network of ``model.safetensors``."""
    if is_own(arch):
        return f"# model: the module that was trained, your own {class_of(arch)}"
    source, name = network_source(arch), arch.removeprefix(TIMM_PREFIX)
    if source == "freeadv_fast":
        return (
            f"model = freeadv_fast.models.zoo.build_model({name!r}, {num_classes}, {image_size=})"
        )
    function = {"torchvision": "torchvision.models.get_model", "timm": "timm.create_model"}[source]
    options = library_options(arch, num_classes, image_size)
    return f"model = {function}({name!r}, {', '.join(f'{k}={v!r}' for k, v in options.items())})"


def _input_line(per_image: bool) -> str:
    """The expression that turns pixels in [0, 1] into the input of ``model.safetensors``."""
    if per_image:
        return "freeadv_fast.models.normalize.PerImageStandardizer()(pixels)"
    return "(pixels - mean) / std"


def stored(tensor: Tensor) -> Tensor:
    """A tensor as safetensors wants it: on the CPU, contiguous, sharing no memory."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
