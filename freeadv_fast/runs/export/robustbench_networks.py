"""Our networks in RobustBench's code: how its model zoo builds them under the same keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.models.own import is_own
from freeadv_fast.models.zoo import TIMM_PREFIX, library_options, network_source

_ZOO = "robustbench.model_zoo.architectures"
_NORMALIZE = f"from {_ZOO}.utils_architectures import normalize_model"

# Title, module of `_ZOO`, classes, and the call; `N` stands for the number of classes.
_NETWORKS = {
    "preact-resnet18": (
        "PreActResNet-18",
        "resnet",
        "PreActBlock, PreActResNet",
        "PreActResNet(PreActBlock, [2, 2, 2, 2], num_classes=N, bn_before_fc=True, "
        "out_shortcut=True)",
    ),
    "preact-resnet18-gradalign": (
        "PreActResNet-18",
        "resnet",
        "PreActBlock, PreActResNet",
        "PreActResNet(PreActBlock, [2, 2, 2, 2], num_classes=N)",
    ),
    "cifar-resnet18": (
        "ResNet-18",
        "resnet",
        "BasicBlock, ResNet",
        "ResNet(BasicBlock, [2, 2, 2, 2], num_classes=N)",
    ),
    "cifar-resnet50": (
        "ResNet-50",
        "resnet",
        "Bottleneck, ResNet",
        "ResNet(Bottleneck, [3, 4, 6, 3], num_classes=N)",
    ),
    "wrn-28-10": (
        "WideResNet-28-10",
        "wide_resnet",
        "WideResNet",
        "WideResNet(depth=28, num_classes=N, widen_factor=10)",
    ),
    "wrn-34-10": (
        "WideResNet-34-10",
        "wide_resnet",
        "WideResNet",
        "WideResNet(depth=34, num_classes=N, widen_factor=10)",
    ),
}

# As the leaderboards write torchvision's and timm's names.
_TITLES = {
    **{f"resnet{depth}": f"ResNet-{depth}" for depth in (18, 34, 50, 101, 152)},
    "wide_resnet50_2": "WideResNet-50-2",
    "wide_resnet101_2": "WideResNet-101-2",
}


@dataclasses.dataclass(frozen=True)
class Form:
    """A network in RobustBench's code.

    Attributes:
        title: As the leaderboard writes it.
        imports: Lines that `builder` needs.
        builder: An expression; a function of nothing that returns the network of [0, 1] pixels, in
            which `mean` and `std` are the normaliser's.
        is_known: Whether RobustBench, torchvision or timm has the network.
    """

    title: str
    imports: Sequence[str]
    builder: str
    is_known: bool = True


def form_of(config: TrainConfig, num_classes: int) -> Form:
    """How RobustBench would build a run's network.

    Args:
        config: Of the run.
        num_classes: Logits.
    """
    arch = config.arch
    if config.normalization == "per-image" or is_own(arch) or not _is_anywhere(arch):
        todo = '"TODO: its code has to be added to robustbench/model_zoo/architectures"'
        return Form(arch, (), todo, is_known=False)
    imports: tuple[str, ...]
    if arch in _NETWORKS:
        title, module, names, call = _NETWORKS[arch]
        imports = (f"from {_ZOO}.{module} import {names}", _NORMALIZE)
        call = call.replace("=N", f"={num_classes}")
    else:
        name = arch.removeprefix(TIMM_PREFIX)
        title = _TITLES.get(name, name)
        options = library_options(arch, num_classes, config.image_size)
        arguments = ", ".join([f'"{name}"', *(f"{k}={v!r}" for k, v in options.items())])
        if network_source(arch) == "torchvision":
            imports, call = ("import torchvision", _NORMALIZE), f"models.get_model({arguments})"
            call = f"torchvision.{call}"
        else:
            imports, call = ("import timm", _NORMALIZE), f"timm.create_model({arguments})"
    return Form(title, imports, f"lambda: normalize_model({call}, mean, std)")


def _is_anywhere(arch: str) -> bool:
    """Whether RobustBench, torchvision or timm has the network."""
    return arch in _NETWORKS or network_source(arch) != "freeadv_fast"
