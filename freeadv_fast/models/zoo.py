"""Networks by name: our own first, then torchvision's, then timm's."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import nn

from freeadv_fast.errors import UserError
from freeadv_fast.models.batch_norm import apply_bn_groups
from freeadv_fast.models.cifar_resnet import CifarResNet
from freeadv_fast.models.normalize import StandardizedNetwork
from freeadv_fast.models.preact_resnet import PreActResNet18
from freeadv_fast.models.wide_resnet import MadryWideResNet, WideResNet

OWN_NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "wrn-32-10": MadryWideResNet,
    "wrn-34-10": WideResNet,
    "wrn-28-10": lambda n: WideResNet(n, depth=28),
    "preact-resnet18": PreActResNet18,
    "preact-resnet18-gradalign": lambda n: PreActResNet18(n, variant="gradalign"),
    "cifar-resnet18": CifarResNet,
    "cifar-resnet50": lambda n: CifarResNet(n, depth=50),
}

TIMM_PREFIX = "timm/"

# These return a tuple of logits in training unless told otherwise.
AUXILIARY_LOGITS = ("googlenet", "inception_v3")


def build_model(
    arch: str,
    num_classes: int,
    *,
    image_size: int,
    per_image_standardize: bool = False,
    bn_group: int | None = None,
) -> nn.Module:
    """Builds a network with fresh weights, drawn from torch's global generator.

    Args:
        arch: One of `OWN_NETWORKS`, a torchvision classifier such as ``resnet50``, or a timm name;
            ``timm/resnet50`` asks for timm's where both have one.
        num_classes: Logits.
        image_size: Side of the square images it will see, in pixels.
        per_image_standardize: Whether the first layer standardises each image.
        bn_group: Images that share batch-norm statistics; None for the whole minibatch.

    Returns:
        A network of (N, 3, image_size, image_size) inputs and (N, num_classes) logits, on the CPU,
        in training mode. `normalize.plain_network` finds the one with torchvision's or timm's keys.

    Raises:
        UserError: no such name, or the network cannot take images of that size.
    """
    model = _build_plain(arch, num_classes, image_size)
    if bn_group is not None:
        apply_bn_groups(model, bn_group)
    if per_image_standardize:
        model = StandardizedNetwork(model)
    check_image_size(model, arch, num_classes, image_size)
    return model


def network_source(arch: str) -> str:
    """Which library defines `arch`: ``freeadv_fast``, ``torchvision`` or ``timm``.

    Raises:
        UserError: none of them; the message names the nearest names.
    """
    if arch in OWN_NETWORKS:
        return "freeadv_fast"
    if arch in _torchvision_names():
        return "torchvision"
    import timm  # a quarter of a second that most runs need not spend

    if timm.is_model(arch.removeprefix(TIMM_PREFIX)):
        return "timm"
    names = dict.fromkeys([*OWN_NETWORKS, *_torchvision_names(), *timm.list_models()])
    nearest = difflib.get_close_matches(arch.lower().removeprefix(TIMM_PREFIX), names, 3, 0.5)
    hint = "torchvision's and timm's names are known"
    if nearest:
        hint = f"did you mean {' or '.join(nearest)}?"
    raise UserError(f"--arch {arch}: no such network; {hint}")


def _torchvision_names() -> list[str]:
    """torchvision's classifiers; not its detectors, segmenters and video networks."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def library_options(arch: str, num_classes: int, image_size: int) -> dict[str, Any]:
    """Keyword arguments for ``torchvision.models.get_model`` or ``timm.create_model``.

    Some transformers are built for one image size; two old networks must be told to return nothing
    but logits.
    """
    options: dict[str, Any] = {"num_classes": num_classes}
    if network_source(arch) == "torchvision":
        if arch in AUXILIARY_LOGITS:
            options |= {"aux_logits": False, "init_weights": True}
        if arch.startswith("vit_"):
            options["image_size"] = image_size
        return options
    import timm

    known = timm.get_pretrained_cfg(arch.removeprefix(TIMM_PREFIX), allow_unregistered=True)
    if known is not None and known.fixed_input_size:
        options["img_size"] = image_size
    return options


def _build_plain(arch: str, num_classes: int, image_size: int) -> nn.Module:
    """The network under its library's own keys."""
    source = network_source(arch)
    if source == "freeadv_fast":
        return OWN_NETWORKS[arch](num_classes)
    options = library_options(arch, num_classes, image_size)
    try:
        if source == "torchvision":
            model: nn.Module = torchvision.models.get_model(arch, weights=None, **options)
        else:
            import timm

            model = timm.create_model(arch.removeprefix(TIMM_PREFIX), **options)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise _size_error(arch, image_size, error) from error
    return model


def check_image_size(model: nn.Module, arch: str, num_classes: int, image_size: int) -> None:
    """Runs one black image through the network in eval mode, which leaves no trace.

    Args:
        model: (N, 3, image_size, image_size) to (N, num_classes), in training mode.
        arch: Its name, for the message.
        num_classes: Logits.
        image_size: Side of the image in pixels.

    Raises:
        UserError: it does not take images of that size, or returns something else.
    """
    probe = torch.zeros(1, 3, image_size, image_size)
    model.eval()
    try:
        with torch.no_grad():
            logits = model(probe)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise _size_error(arch, image_size, error) from error
    finally:
        model.train()
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, num_classes):
        raise UserError(f"--arch {arch}: does not return one row of logits an image")


def _size_error(arch: str, image_size: int, error: Exception) -> UserError:
    """The one line for a network that cannot be built or run at this size."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(f"--image-size {image_size}: {arch} cannot take it ({reason})")
