"""Puts fused batch norms into networks that others wrote."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from freeadv_fast.models.batch_norm import AUXILIARY, GhostBatchNorm2d, GhostBatchNormAct2d
from freeadv_fast.models.fused import blocks
from freeadv_fast.models.fused.norm import FusedBatchNorm2d
from freeadv_fast.models.global_average import GlobalAverage2d
from freeadv_fast.models.twins import class_path, is_stock, twin_of
from freeadv_fast.models.wide_resnet import LEAKINESS
from freeadv_fast.ops import dispatch


def fuse_batch_norms(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Puts fused batch norms into a network, in place below its top level.

    To be called after `apply_bn_groups` and `add_auxiliary_bn`, whose layers it takes over with
    their groups, and before anything that builds module trees (`DualNetwork`) or hooks layers. A
    second call changes nothing.

    It knows torchvision's and timm's ResNets (timm's: with ReLU, without squeeze-and-excitation,
    drop block and drop path), this package's networks, timm's `BatchNormAct2d` with
    ReLU or no activation, and a batch norm followed by ReLU in any `nn.Sequential`, which has to
    run as a whole: its ReLU becomes `nn.Identity`. So does the max pooling behind a stem's ReLU.
    Where a layer has a hook on it, or its ReLU has, the layer is left, for the hook would see
    another tensor, and a pooling that is hooked stays; a block's own hooks go on working. Every
    `nn.AdaptiveAvgPool2d` to one pixel becomes a `GlobalAverage2d`.

    Args:
        model: The network; parameters and buffers stay the same objects under the same keys.

    Returns:
        The network to use: `model`, or where the top level itself computes a ReLU its twin. And the
        names of the batch norms that are left as they are.
    """
    fused = _fuse(model, {})
    left = [
        name
        for name, layer in fused.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        and not isinstance(layer, FusedBatchNorm2d)
        and not name.endswith(f".{AUXILIARY}")  # the main one stands for both
    ]
    return fused, left


class _Pattern(NamedTuple):
    """A class in whose instances batch norms are followed by ReLU.

    Attributes:
        norms: The batch norms; ReLU follows each, in a block's last one after the addition.
        activations: Children that must be `nn.ReLU`.
        absent: Optional parts that must not be there.
        forward: The twin's forward pass; None where each activation is called once, right after
            its norm, so that `nn.Identity` can take its place.
        negative_slope: That of the ReLU.
        pools: Children that may be max pooling, called once, right after the only norm's ReLU.
    """

    norms: tuple[str, ...]
    activations: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    forward: Callable[[Any, Tensor], Tensor] | None = None
    negative_slope: float = 0.0
    pools: tuple[str, ...] = ()

    def fits(self, module: nn.Module) -> bool:
        """Whether this instance is as its class usually is."""
        children = module._modules
        return (
            all(_is_norm(children.get(name)) for name in self.norms)
            and all(is_stock(children.get(name), nn.ReLU) for name in self.activations)
            and all(_is_absent(getattr(module, name)) for name in self.absent)
            and "forward" not in module.__dict__
        )


def _fuse(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """The module or its twin; `done` holds those of modules that stand at several places."""
    if module not in done:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            done[module] = _fuse_own_activation(module)
        elif _is_global_average(module):
            done[module] = twin_of(module, GlobalAverage2d)
        else:
            done[module] = _fuse_children(module, done)
    return done[module]


def _fuse_children(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """What is below a module first, then the module by its pattern."""
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _fuse(child, done)
    if type(module).forward is nn.Sequential.forward and "forward" not in module.__dict__:
        _fuse_pairs(module)
    pattern = _PATTERNS.get(class_path(module))
    return module if pattern is None or not pattern.fits(module) else _apply(pattern, module)


def _apply(pattern: _Pattern, module: nn.Module) -> nn.Module:
    """Fuses a module that fits: the module itself, or its twin, where `module` keeps its norms."""
    fused = module
    if pattern.forward is not None:
        fused = twin_of(module, _twin_class(type(module), pattern.forward))  # type: ignore[arg-type]
        fused._modules = dict(module._modules)
    children = fused._modules
    pools = [name for name in pattern.pools if _is_pooling(children.get(name))]
    for name in pattern.norms:
        children[name] = _fused_norm(
            children[name], relu=True, negative_slope=pattern.negative_slope, pool=bool(pools)
        )
    if pattern.forward is None:
        for name in (*pattern.activations, *pools):
            children[name] = nn.Identity().train(module.training)
    for downsample in (children.get("downsample"), children.get("shortcut")):
        if isinstance(downsample, nn.Sequential):
            for name, layer in downsample._modules.items():
                if _is_norm(layer):
                    downsample._modules[name] = _fused_norm(layer, relu=False)
    return fused


@functools.cache
def _twin_class(
    original: type[nn.Module], forward: Callable[[Any, Tensor], Tensor]
) -> type[nn.Module]:
    """A subclass with another forward pass; made here, since timm is imported only when needed."""
    return type(f"Fused{original.__name__}", (original,), {"forward": forward})


def _fuse_own_activation(layer: nn.Module) -> nn.Module:
    """The twin of a batch norm that calls ReLU, or nothing, on its output; others as they are."""
    if type(layer) is not GhostBatchNormAct2d and class_path(layer) != _TIMM_NORM:
        return layer
    drop, act = layer._modules["drop"], layer._modules["act"]
    if not _is_norm(layer, type(layer)) or not is_stock(drop, nn.Identity):
        return layer
    if not is_stock(act, nn.ReLU, nn.Identity):
        return layer
    return _fused_norm(layer, relu=type(act) is nn.ReLU)


def _fuse_pairs(sequence: nn.Module) -> None:
    """Fuses each batch norm of an `nn.Sequential` with ReLU and pooling after it, in place."""
    children = sequence._modules
    names = list(children)
    for place, (name, following) in enumerate(itertools.pairwise(names)):
        if _is_norm(children[name]) and is_stock(children[following], nn.ReLU):
            pools = [third for third in names[place + 2 :][:1] if _is_pooling(children[third])]
            children[name] = _fused_norm(children[name], relu=True, pool=bool(pools))
            for fused in (following, *pools):
                children[fused] = nn.Identity().train(sequence.training)


def _fused_norm(
    layer: nn.Module | None, *, relu: bool, negative_slope: float = 0.0, pool: bool = False
) -> FusedBatchNorm2d:
    """The fused twin of a batch norm and of its auxiliary one."""
    assert layer is not None
    twin: FusedBatchNorm2d = twin_of(layer, FusedBatchNorm2d)
    twin.group = getattr(layer, "group", None)
    twin.relu = relu
    twin.negative_slope = negative_slope
    twin.pool = pool
    twin._modules = dict(layer._modules)
    auxiliary = twin._modules.get(AUXILIARY)
    if auxiliary is not None:
        twin._modules[AUXILIARY] = _fused_norm(
            auxiliary, relu=relu, negative_slope=negative_slope, pool=pool
        )
    return twin


def _is_norm(layer: nn.Module | None, *classes: type[nn.Module]) -> bool:
    """Whether a child is a batch norm that a fused one can stand for, and its auxiliary one too."""
    if not is_stock(layer, *(classes or (nn.BatchNorm2d, GhostBatchNorm2d))):
        return False
    auxiliary = layer._modules.get(AUXILIARY)  # type: ignore[union-attr]
    return auxiliary is None or is_stock(auxiliary, GhostBatchNorm2d, GhostBatchNormAct2d)


def _is_pooling(layer: nn.Module | None) -> bool:
    """Whether a child is the max pooling that a fused batch norm can do itself."""
    if "norm-pool" not in dispatch.FAST_PATHS or not is_stock(layer, nn.MaxPool2d):
        return False
    assert isinstance(layer, nn.MaxPool2d)
    sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    plain = not layer.ceil_mode and not layer.return_indices
    return plain and [_pair(size) for size in sizes] == [(3, 3), (2, 2), (1, 1), (1, 1)]


def _is_global_average(layer: nn.Module) -> bool:
    """Whether a layer is the average over all pixels, as a pooling to one of them."""
    if not is_stock(layer, nn.AdaptiveAvgPool2d):
        return False
    assert isinstance(layer, nn.AdaptiveAvgPool2d)
    return [*_pair(layer.output_size)] == [1, 1]


def _is_absent(part: object) -> bool:
    """Whether an optional part of a block does nothing."""
    return part is None or type(part) is nn.Identity


_TIMM_NORM = "timm.layers.norm_act.BatchNormAct2d"

# Two norms, or three; timm gives each an activation of its own.
_TWO, _THREE = ("bn1", "bn2"), ("bn1", "bn2", "bn3")
_TIMM_TWO, _TIMM_THREE = ("act1", "act2"), ("act1", "act2", "act3")
_TIMM_OPTIONS = ("drop_block", "se", "drop_path")

_PATTERNS: dict[str, _Pattern] = {
    "torchvision.models.resnet.ResNet": _Pattern(("bn1",), ("relu",), pools=("maxpool",)),
    # What a detector keeps of one.
    "torchvision.models._utils.IntermediateLayerGetter": _Pattern(
        ("bn1",), ("relu",), pools=("maxpool",)
    ),
    "torchvision.models.resnet.BasicBlock": _Pattern(
        _TWO, ("relu",), forward=blocks.torchvision_basic_block
    ),
    "torchvision.models.resnet.Bottleneck": _Pattern(
        _THREE, ("relu",), forward=blocks.torchvision_bottleneck
    ),
    "timm.models.resnet.ResNet": _Pattern(("bn1",), ("act1",), pools=("maxpool",)),
    "timm.models.resnet.BasicBlock": _Pattern(
        _TWO, _TIMM_TWO, _TIMM_OPTIONS, blocks.timm_basic_block
    ),
    "timm.models.resnet.Bottleneck": _Pattern(
        _THREE, _TIMM_THREE, _TIMM_OPTIONS, blocks.timm_bottleneck
    ),
    "freeadv_fast.models.cifar_resnet.CifarBlock": _Pattern(_TWO, forward=blocks.cifar_block),
    "freeadv_fast.models.cifar_resnet.CifarBottleneck": _Pattern(
        _THREE, forward=blocks.cifar_bottleneck
    ),
    "freeadv_fast.models.cifar_resnet.CifarResNet": _Pattern(("bn1",), forward=blocks.cifar_resnet),
    "freeadv_fast.models.preact_resnet.PreActBlock": _Pattern(_TWO, forward=blocks.preact_block),
    "freeadv_fast.models.preact_resnet.PreActResNet18": _Pattern(
        ("bn",), forward=blocks.preact_resnet18
    ),
    "freeadv_fast.models.wide_resnet.WideBlock": _Pattern(_TWO, forward=blocks.wide_block),
    "freeadv_fast.models.wide_resnet.WideResNet": _Pattern(("bn1",), forward=blocks.wide_resnet),
    "freeadv_fast.models.wide_resnet.MadryBlock": _Pattern(
        _TWO, forward=blocks.madry_block, negative_slope=LEAKINESS
    ),
    "freeadv_fast.models.wide_resnet.MadryWideResNet": _Pattern(
        ("bn",), forward=blocks.madry_wide_resnet, negative_slope=LEAKINESS
    ),
}
