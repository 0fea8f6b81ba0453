"""A network of the user's own: what is asked of it, and the copy of it that is trained.

The user's module keeps its class, device, memory format and mode. Training fuses layers, moves and
wraps what it trains, so it does that to a copy; `hand_back` then puts the trained weights into the
module itself, as any training loop of PyTorch would have left them there.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from freeadv_fast.errors import UserError
from freeadv_fast.models.batch_norm import apply_bn_groups, without_auxiliary
from freeadv_fast.models.normalize import StandardizedNetwork, plain_network

_CUSTOM = "custom ("


def arch_of(own: nn.Module) -> str:
    """What a run records as the name of such a network: ``custom (Net)``."""
    return f"{_CUSTOM}{type(own).__name__})"


def is_own(arch: str) -> bool:
    """Whether a recorded name stands for a network of the user's own."""
    return arch.startswith(_CUSTOM)


def class_of(arch: str) -> str:
    """The class of such a network, ``Net`` of ``custom (Net)``."""
    return arch.removeprefix(_CUSTOM).removesuffix(")")


def refuse_unnamed_network(arch: str) -> None:
    """Refuses a recorded name from which no network can be built.

    Raises:
        UserError: it stands for a network of the user's own, which has to be handed over again.
    """
    if is_own(arch):
        raise UserError(
            f"--arch {arch}: a network of your own; hand it over from Python, with model=..."
        )


def adopt(
    own: nn.Module,
    num_classes: int,
    *,
    image_sizes: Sequence[int],
    per_image_standardize: bool = False,
    bn_group: int | None = None,
) -> nn.Module:
    """A copy of the user's network, ready to be trained or to take a run's weights.

    Args:
        own: (n, 3, H, W) float32 images to (n, `num_classes`) float32 logits; left as it is.
        num_classes: Of the data.
        image_sizes: Sides in pixels of the square images that it will see.
        per_image_standardize: Whether a layer before it standardises each image.
        bn_group: Images that share batch-norm statistics; None for the whole minibatch.

    Returns:
        The copy on the CPU in training mode, as `zoo.build_model` returns its networks.

    Raises:
        UserError: it is wrapped, compiled, in half precision, has nothing to train, or does not
            turn such images into logits.
    """
    name = type(own).__name__
    refuse_wrappings(own, name)
    try:
        model = copy.deepcopy(own).cpu()
    except Exception as error:  # whatever the user's own attributes raise
        raise UserError(f"model {name}: cannot be copied ({first_line(error)})") from None
    model.eval()  # so that the checks leave no trace
    for size in image_sizes:
        check_logits(model, name, num_classes, size)
    if bn_group is not None:
        apply_bn_groups(model, bn_group)
    return (StandardizedNetwork(model) if per_image_standardize else model).train()


def refuse_wrappings(own: nn.Module, name: str) -> None:
    """Refuses a network that something else has already prepared for training.

    Raises:
        UserError: names what is in the way, and what to hand over instead.
    """
    for path, module in own.named_modules():
        inner = f"model.{path}".rstrip(".")
        if isinstance(module, nn.DataParallel | DistributedDataParallel):
            raise UserError(
                f"model {name}: is in {type(module).__name__}; ranks are torchrun's here, hand "
                f"over {inner}.module"
            )
        if hasattr(module, "_orig_mod"):
            raise UserError(f"model {name}: is compiled; hand over {inner}._orig_mod")
    for key, parameter in own.named_parameters():
        if parameter.dtype != torch.float32:
            raise UserError(
                f"model {name}: {key} is {str(parameter.dtype).removeprefix('torch.')}; hand over "
                "model.float(), --precision chooses the arithmetic"
            )
    if not any(parameter.requires_grad for parameter in own.parameters()):
        raise UserError(f"model {name}: none of its parameters requires a gradient")


def check_logits(
    model: nn.Module,
    name: str,
    num_classes: int,
    image_size: int,
    device: torch.device | None = None,
) -> None:
    """Runs two black images through a network, which must be in eval mode.

    Args:
        model: The network. name: Its class, for the message.
        num_classes: Of the data. image_size: Side of the images in pixels.
        device: Where it is; the CPU by default.

    Raises:
        UserError: it does not take images of that size, or returns something else than logits.
    """
    shape = (2, 3, image_size, image_size)
    try:
        with torch.no_grad():
            logits = model(torch.zeros(shape, device=device))
    except Exception as error:  # whatever the user's own code raises
        raise UserError(
            f"model {name}: cannot take images of shape {shape} ({first_line(error)})"
        ) from None
    if not isinstance(logits, torch.Tensor):
        raise UserError(
            f"model {name}: returns {type(logits).__name__}; hand over a module that returns the "
            f"logits alone, (n, {num_classes})"
        )
    if logits.shape != (2, num_classes):
        raise UserError(
            f"model {name}: returns {tuple(logits.shape)} for two images; the data have "
            f"{num_classes} classes, so (2, {num_classes}) is needed"
        )
    if logits.dtype != torch.float32:
        dtype = str(logits.dtype).removeprefix("torch.")
        raise UserError(f"model {name}: returns {dtype}; logits must be float32")


def refuse_probabilities(outputs: torch.Tensor, origin: str) -> None:
    """Refuses a network that ends in a softmax, under which attacks overstate its robustness.

    Gradients vanish behind it, and what is left of them is the softmax's. Logarithms of
    probabilities are logits like any others.

    Args:
        outputs: (n, classes) float32, what it returns for any images.
        origin: What the complaint begins with.

    Raises:
        UserError: all outputs are at least 0, and those of each image add up to 1.
    """
    sums = outputs.sum(1)
    if outputs.min() >= 0 and torch.allclose(sums, torch.ones_like(sums), atol=1e-4):
        raise UserError(
            f"{origin}: the network returns probabilities, not logits, whose gradients vanish; "
            "leave out its softmax"
        )


def freeze_unused(model: nn.Module, image_size: int) -> list[str]:
    """Keeps parameters that are not in the output out of the training, where ranks wait for them.

    No gradient would ever reach them, so that on one rank they stay as they are anyway.

    Args:
        model: What `adopt` returned.
        image_size: Side of the square images, in pixels.

    Returns:
        Their names.
    """
    probe = copy.deepcopy(model)
    with torch.random.fork_rng([]), torch.enable_grad():
        probe(torch.rand(2, 3, image_size, image_size)).sum().backward()
    unused = [key for key, p in probe.named_parameters() if p.requires_grad and p.grad is None]
    for key in unused:
        model.get_parameter(key).requires_grad_(False)
    return unused


def hand_back(model: nn.Module, own: nn.Module) -> None:
    """Puts the weights and statistics of the trained copy into the user's module."""
    own.load_state_dict(without_auxiliary(plain_network(model).state_dict()))


def first_line(error: BaseException) -> str:
    """An exception in a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
