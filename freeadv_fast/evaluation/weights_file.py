"""A file of weights as a network of pixels: which network it is, and what normalises its input."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from freeadv_fast.config.file import config_from_dict
from freeadv_fast.config.presets import PIXEL_STATISTICS
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.task_fields import task_of
from freeadv_fast.errors import UserError
from freeadv_fast.models.normalize import plain_network, with_normalizer
from freeadv_fast.models.own import adopt, refuse_unnamed_network
from freeadv_fast.models.zoo import TIMM_PREFIX, build_model, network_source
from freeadv_fast.runs.checkpoint import load_checkpoint, load_weights
from freeadv_fast.runs.foreign import (
    find_statistics,
    find_weights,
    named_as,
    other_head,
    printable,
    without_spare,
)


@dataclasses.dataclass(frozen=True)
class Normalization:
    """What is subtracted from pixels and what divides them, per channel.

    Attributes:
        mean: In [0, 1]. std: Above 0.
        source: Whose they are, for the line that says it.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str

    def __str__(self) -> str:
        """The line."""
        mean, std = (", ".join(f"{value:.4g}" for value in part) for part in (self.mean, self.std))
        return f"normalisation: {self.source} (mean {mean}; std {std})"


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """A file of weights, read and not yet in a network.

    Attributes:
        path: As the user named it.
        state: What the file holds. weights: Its tensors.
        config: Of the run of ours that wrote it; None for a file from elsewhere.
        arch: The network's name; None where the user hands over the module.
        own: That module.
    """

    path: Path
    state: dict[str, Any]
    weights: dict[str, Tensor]
    config: TrainConfig | None
    arch: str | None
    own: nn.Module | None

    @property
    def origin(self) -> str:
        """The file in a complaint."""
        return f"SUBJECT {self.path}"

    @property
    def title(self) -> str:
        """The file and its network, for the table."""
        return f"{self.path.name} ({self.arch or type(self.own).__name__})"

    @property
    def image_size(self) -> int | None:
        """Side of the images that the network was made for, in pixels, where something says it."""
        if self.config is not None:
            return self.config.image_size
        return None if self.arch is None else fixed_image_size(self.arch)

    def build(self, num_classes: int, image_size: int, data: str) -> nn.Module:
        """The network with the file's weights, in eval mode, on the CPU, of normalised images.

        Args:
            num_classes: Of the data. image_size: Side of the images in pixels.
            data: What --data named, for complaints.

        Raises:
            UserError: the weights are another network's, or of other classes.
        """
        standardize = self.config is not None and self.config.normalization == "per-image"
        options = {"per_image_standardize": standardize}
        if self.own is not None:
            model = adopt(self.own, num_classes, image_sizes=[image_size], **options)
        else:
            assert self.arch is not None
            model = build_model(self.arch, num_classes, image_size=image_size, **options)
        own = plain_network(model).state_dict()
        weights = without_spare(own, named_as(own.keys(), self.weights))
        if head := other_head(own, weights):
            raise UserError(
                f"{self.origin}: a network of {len(weights[head[0]]):,} classes; --data {data} has "
                f"{num_classes:,}"
            )
        load_weights(model, self.state, self.arch or type(self.own).__name__, self.origin)
        return model.eval()


def read_weights_file(path: Path, arch: str | None, own: nn.Module | None) -> WeightsFile:
    """Reads a file of weights; nothing in it is executed.

    Args:
        path: A checkpoint, a state dict or safetensors. arch: Its network's name, if it was typed.
        own: The user's module that takes the weights, in place of a name.

    Raises:
        UserError: the file cannot be read or holds code, nothing says which network it is of, or
            that is a detector.
    """
    state = load_checkpoint(path, "SUBJECT")
    weights = find_weights(state)
    if not weights:
        raise UserError(f"SUBJECT {path}: holds no weights")
    config = None
    if isinstance(saved := state.get("config"), dict) and isinstance(state.get("classes"), list):
        config = config_from_dict(saved, f"SUBJECT {path}")
    said = config.arch if config is not None else state.get("arch")
    if arch is None and own is None:
        if not isinstance(said, str):
            raise UserError(
                f"SUBJECT {path}: a file of weights; --arch NAME says which network they are of"
            )
        refuse_unnamed_network(said)
        arch = printable(said)
    if arch is not None:
        if task_of(arch) == "detection":
            raise UserError(
                f"SUBJECT {path}: a detector's weights are evaluated as a run only; name its folder"
            )
        network_source(arch)  # a name that nobody knows is refused before the data are looked at
    return WeightsFile(path, state, weights, config, arch, own)


def normalization_of(
    file: WeightsFile, typed: tuple[Sequence[float], Sequence[float]] | None, data: str
) -> tuple[Normalization, list[str]]:
    """What normalises the network's input, and lines for the user that say so.

    The file's own comes first, then what the user typed, then the library's for a folder of
    images, and the data set's for CIFAR.

    Args:
        file: The weights. typed: --mean and --std. data: What --data named.

    Raises:
        UserError: nothing says it.
    """
    if file.config is not None:
        config = file.config
        chosen = Normalization(
            tuple(config.pixel_mean), tuple(config.pixel_std), f"the run's, {config.normalization}"
        )
    elif (inside := find_statistics(file.weights)) is not None:
        chosen = Normalization(inside.mean, inside.std, f"the file's own {printable(inside.name)}")
    elif typed is not None:
        chosen = Normalization(tuple(typed[0]), tuple(typed[1]), "--mean and --std")
        return chosen, [str(chosen)]
    else:
        found = usual_statistics(file.arch, data)
        return found, [f"{found}; --mean and --std choose another"]
    if min(chosen.std) <= 0:
        raise UserError(f"{file.origin}: {chosen.source} has a standard deviation of 0 or below")
    ignored = ["--mean and --std are not read: the file says it"] if typed is not None else []
    return chosen, [str(chosen), *ignored]


def usual_statistics(arch: str | None, data: str) -> Normalization:
    """What networks of a name are usually fed from some data.

    Args:
        arch: The network's name; None for a module of the user's own. data: As --data names them.

    Raises:
        UserError: nobody agrees.
    """
    kind = data.partition(":")[0]
    if kind in ("cifar10", "cifar100"):
        return Normalization(*PIXEL_STATISTICS[kind], f"{kind}'s")
    if kind in ("svhn", "digits", "synthetic"):
        raise UserError(
            f"--mean: nothing says what normalises images of {kind}; give --mean and --std, 0,0,0 "
            "and 1,1,1 for nothing"
        )
    if arch is not None and network_source(arch) == "timm":
        import timm

        known = timm.get_pretrained_cfg(arch.removeprefix(TIMM_PREFIX), allow_unregistered=True)
        if known is not None:
            return Normalization(tuple(known.mean), tuple(known.std), f"timm's for {arch}")
    return Normalization(*PIXEL_STATISTICS["imagenet"], "ImageNet's, as torchvision's networks")


def fixed_image_size(arch: str) -> int | None:
    """The side that timm's network of a name is made for, where it takes no other one."""
    if network_source(arch) != "timm":
        return None
    import timm

    known = timm.get_pretrained_cfg(arch.removeprefix(TIMM_PREFIX), allow_unregistered=True)
    return known.input_size[-1] if known is not None and known.fixed_input_size else None


def read_statistics(
    mean: Sequence[float] | str | None, std: Sequence[float] | str | None
) -> tuple[Sequence[float], Sequence[float]] | None:
    """--mean and --std as numbers; None where neither was given.

    Raises:
        UserError: one without the other, or no three numbers that can be meant.
    """
    if (mean is None) != (std is None):
        given, missing = ("--mean", "--std") if std is None else ("--std", "--mean")
        raise UserError(f"{given}: give {missing} with it")
    if mean is None or std is None:
        return None
    means, stds = _three(mean, "--mean"), _three(std, "--std")
    if not all(0 <= value <= 1 for value in means):
        raise UserError(f"--mean {mean}: pixels are in [0, 1]; divide grey levels by 255")
    if not all(0 < value <= 1 for value in stds):
        raise UserError(f"--std {std}: must be above 0 and at most 1, for pixels are in [0, 1]")
    return means, stds


def _three(value: Sequence[float] | str, flag: str) -> tuple[float, ...]:
    """Three numbers, one a channel.

    Raises:
        UserError: anything else.
    """
    try:
        numbers = tuple(map(float, value.split(",") if isinstance(value, str) else value))
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3:
        raise UserError(f"{flag} {value}: needs three numbers, such as 0.485,0.456,0.406")
    return numbers


def normalized_network(model: nn.Module, normalization: Normalization) -> nn.Module:
    """A network of pixels in [0, 1], in eval mode."""
    return with_normalizer(model, normalization.mean, normalization.std).eval()
