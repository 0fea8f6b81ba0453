"""Batch norm, residual addition and ReLU in one call, in networks that others wrote.

On a GPU a ResNet in training spends most of its bytes on batch norm, addition and ReLU, each a pass
over the activations of its own. `ops.batch_norm_act` does the three in one. `fuse_batch_norms` puts
it into a network: batch norms become `FusedBatchNorm2d`, and where a class's `forward` calls
addition or ReLU itself the module becomes a twin, a subclass with the same computation in fused
calls. Twins share the tensors, the children and the hooks of what they stand for, so keys, the
order of parameters and the trees of `DualNetwork` are those of the plain network.

The output of a residual block is read twice, by the next block's first convolution and by its
shortcut. On a GPU twins read it as two tensors in the same memory, so that the kernels and not
autograd sum the two gradients. `torch.autograd.grad` with respect to such an output gives
the convolution's alone; a forward hook that calls `retain_grad` or `register_hook` gets the sum.

In a block that normalises first, the shortcut reads what its first norm reads, or what that writes.
On a GPU it gets an alias of that, so that the norm's kernels sum the two gradients. The block's
input has the whole gradient; a hook on a tensor inside the block has that of its own reader.

Where a block ends in a 1x1 convolution, `ops.product_norm` takes it together with its norm, the
addition and ReLU: on a GPU in training backward then never reads the convolution's output. The same
of a projection beside it, a 1x1 convolution with a norm of its own.

Where a block's shortcut ends in a batch norm of its own, that one joins the block's last: on a GPU
in training `ops.joined_norms` normalises both, and the normalised shortcut is never written.

The stem's batch norm takes over the max pooling behind its ReLU, too, and `nn.Identity` stands in
the pooling's place: `ops.batch_norm_relu_pool` never writes the activation between them. Its output
is read twice as a block's is.

The last pooling, a mean over all pixels, is that of `ops.global_average`, whose gradient comes in
the memory format that the last block's kernels take.

A layer or block is left alone unless its class, its activations and its optional parts are known:
the table at the end says which are.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from freeadv_fast import ops
from freeadv_fast.models.batch_norm import AUXILIARY, GhostBatchNorm2d, GhostBatchNormAct2d
from freeadv_fast.models.global_average import GlobalAverage2d
from freeadv_fast.models.half_weights import HalfWeightConv2d, under_autocast
from freeadv_fast.models.twins import class_path, twin_of
from freeadv_fast.models.wide_resnet import LEAKINESS


class FusedBatchNorm2d(GhostBatchNorm2d):
    """`GhostBatchNorm2d` that can add a residual and apply (leaky) ReLU in the same pass.

    Attributes:
        group: Images that share training statistics, at most; None for the whole minibatch.
        relu: Whether the output goes through ReLU, after the addition.
        negative_slope: That of the ReLU, at least 0; 0 unless it is a leaky one.
        pool: Whether a plain ReLU's output goes through 3x3 max pooling, stride 2 and padding 1.
    """

    group: int | None  # type: ignore[assignment]

    def __init__(
        self,
        num_features: int,
        *,
        group: int | None = None,
        relu: bool = True,
        negative_slope: float = 0.0,
        pool: bool = False,
        **options: object,
    ) -> None:
        """Takes what `nn.BatchNorm2d` takes, the group size and what follows, if anything.

        Args:
            num_features: Channels.
            group: Images that share statistics, at least 1; None for the whole minibatch.
            relu: Whether the output goes through ReLU.
            negative_slope: The slope of a leaky ReLU, at least 0; unused without `relu`.
            pool: Whether the output of a plain ReLU goes through the pooling of a ResNet's stem.
            **options: eps, momentum, affine, track_running_stats, device, dtype.
        """
        super().__init__(num_features, group=group, **options)  # type: ignore[arg-type]
        self.relu = relu
        self.negative_slope = negative_slope
        self.pool = pool

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        residual_norm: FusedBatchNorm2d | None = None,
    ) -> Tensor:
        """Normalises, adds, activates and pools; memory format and dtype are kept.

        Args:
            input: (N, C, H, W) activations.
            residual: Added before ReLU, in the shape of `input`; None for nothing.
            residual_norm: What the residual goes through first; None for nothing.

        Raises:
            ValueError: `input` is not 4-D.
            RuntimeError: shapes disagree, or a channel holds a single value in training.
        """
        if residual is not None and residual_norm is not None:
            joined = self._joined(input, residual, residual_norm)
            if joined is not None:
                return joined
            residual = residual_norm(residual)
        norm = self._norm()
        if norm is None:
            return self._unfused(input, residual)
        if residual is not None and (residual.dtype != input.dtype or self.pool):
            return self._unfused(input, residual)
        self._check_input_dim(input)
        if self.pool:
            # The end of a stem, whose output the first block and its shortcut read.
            pooled = ops.batch_norm_relu_pool(
                input,
                norm.weight,
                norm.bias,
                norm.running_mean,
                norm.running_var,
                training=self.training,
                momentum=norm.momentum,
                eps=norm.eps,
                num_groups=self._num_groups(input),
                fork=True,
                num_batches_tracked=norm.num_batches_tracked,
            )
            return pooled if isinstance(pooled, Tensor) else _with_shortcut(*pooled)
        # A residual marks the end of a block: the next block reads its output twice.
        output = ops.batch_norm_act(
            input,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            training=self.training,
            momentum=norm.momentum,
            eps=norm.eps,
            num_groups=self._num_groups(input),
            relu=self.relu,
            residual=residual,
            negative_slope=self.negative_slope,
            fork=residual is not None,
            num_batches_tracked=norm.num_batches_tracked,
        )
        return output if isinstance(output, Tensor) else _with_shortcut(*output)

    def of_product(
        self, layer: nn.Module, input: Tensor, shortcut: Tensor, projection: list[nn.Module] | None
    ) -> Tensor | None:
        """This norm of a convolution, plus a shortcut, where all can be one call, else None.

        Args:
            layer: The convolution.
            input: (N, K, H, W), what it reads.
            shortcut: What is added; with a projection, what that reads.
            projection: The shortcut's layers, a fused norm the last of them; None for no layers.
        """
        if "product-norm" not in ops.FAST_PATHS or not self.relu or self.negative_slope:
            return None
        product = _product(layer, self, input)
        added = shortcut if projection is None else self._projected(shortcut, projection)
        if product is None or added is None:
            return None
        if added is shortcut and shortcut.dtype != _dtype_of_product(input):
            return None
        num_groups = self._num_groups(input)
        output = ops.product_norm(product, added, num_groups=num_groups, fork=True)
        return output if isinstance(output, Tensor) else _with_shortcut(*output)

    def with_alias(self, input: Tensor, *, of_input: bool) -> tuple[Tensor, Tensor] | None:
        """The output, and what a second reader reads, where one call can sum both gradients.

        Args:
            input: (N, C, H, W) activations.
            of_input: Whether the second reads the input, and not the output.
        """
        norm = self._norm()
        if "two-readers" not in ops.FAST_PATHS or norm is None or not self.relu or self.pool:
            return None
        self._check_input_dim(input)
        num_groups, slope = self._num_groups(input), self.negative_slope
        if of_input:
            return ops.shared_norm_act(
                input, norm, training=self.training, num_groups=num_groups, negative_slope=slope
            )
        both = ops.batch_norm_act(
            input,
            *norm[:4],
            training=self.training,
            momentum=norm.momentum,
            eps=norm.eps,
            num_groups=num_groups,
            negative_slope=slope,
            fork=True,
            num_batches_tracked=norm.num_batches_tracked,
        )
        assert isinstance(both, tuple)  # forked
        return both

    def _projected(self, shortcut: Tensor, projection: list[nn.Module]) -> ops.Product | None:
        """A shortcut's convolution and norm where they can join this norm's, else None."""
        *layers, norm = projection
        assert isinstance(norm, FusedBatchNorm2d)
        if "joined-norms" not in ops.FAST_PATHS or len(layers) != 1:
            return None
        is_alike = not norm.relu and norm.group == self.group
        return _product(layers[0], norm, shortcut) if is_alike else None

    def _norm(self) -> ops.Norm | None:
        """The tensors and numbers of a norm that the fused operations take, else None."""
        tensors = (self.weight, self.bias, self.running_mean, self.running_var)
        # Without momentum torch takes a cumulative average, whose count it reads on the host.
        if self.momentum is None or any(tensor is None for tensor in tensors):
            return None
        if not self.track_running_stats or self.num_batches_tracked is None:
            return None
        return ops.Norm(*tensors, self.num_batches_tracked, self.momentum, self.eps)

    def _num_groups(self, input: Tensor) -> int:
        """Groups of images with statistics of their own."""
        if not self.training or self.group is None:
            return 1
        # No group of one image, as in `GhostBatchNorm2d`.
        return max(1, min(math.ceil(len(input) / self.group), len(input) // 2))

    def _joined(self, input: Tensor, residual: Tensor, other: FusedBatchNorm2d) -> Tensor | None:
        """The output where an unhooked residual norm can be one with this, else None."""
        norm, residual_norm = self._norm(), other._norm()
        fits = (
            "joined-norms" in ops.FAST_PATHS
            and input.dim() == 4
            and (input.shape, input.dtype) == (residual.shape, residual.dtype)
            and self.training
            and other.training
            and self.group == other.group
            and self.relu
            and not (self.negative_slope or self.pool or other.relu or other.pool)
            and _is_stock(other, FusedBatchNorm2d)
        )
        if not fits or norm is None or residual_norm is None:
            return None
        num_groups = self._num_groups(input)
        output = ops.joined_norms(
            input, norm, residual, residual_norm, num_groups=num_groups, fork=True
        )
        return output if isinstance(output, Tensor) else _with_shortcut(*output)

    def _unfused(self, input: Tensor, residual: Tensor | None) -> Tensor:
        """The same in up to four passes, for what the fused operations do not take."""
        plain = nn.BatchNorm2d if self.group is None else GhostBatchNorm2d
        output: Tensor = plain.forward(self, input)  # type: ignore[arg-type]
        if residual is not None:
            output += residual
        if self.relu and self.negative_slope:
            output = F.leaky_relu(output, self.negative_slope, inplace=True)
        elif self.relu:
            output = F.relu(output, inplace=True)
        return F.max_pool2d(output, 3, stride=2, padding=1) if self.pool else output

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        slope = f", negative_slope={self.negative_slope}" if self.negative_slope else ""
        pool = ", pool=True" if self.pool else ""
        return f"{super().extra_repr()}, relu={self.relu}{slope}{pool}"


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
            and all(_is_stock(children.get(name), nn.ReLU) for name in self.activations)
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
    if not _is_norm(layer, type(layer)) or not _is_stock(drop, nn.Identity):
        return layer
    if not _is_stock(act, nn.ReLU, nn.Identity):
        return layer
    return _fused_norm(layer, relu=type(act) is nn.ReLU)


def _fuse_pairs(sequence: nn.Module) -> None:
    """Fuses each batch norm of an `nn.Sequential` with ReLU and pooling after it, in place."""
    children = sequence._modules
    names = list(children)
    for place, (name, following) in enumerate(itertools.pairwise(names)):
        if _is_norm(children[name]) and _is_stock(children[following], nn.ReLU):
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
    if not _is_stock(layer, *(classes or (nn.BatchNorm2d, GhostBatchNorm2d))):
        return False
    auxiliary = layer._modules.get(AUXILIARY)  # type: ignore[union-attr]
    return auxiliary is None or _is_stock(auxiliary, GhostBatchNorm2d, GhostBatchNormAct2d)


def _is_pooling(layer: nn.Module | None) -> bool:
    """Whether a child is the max pooling that a fused batch norm can do itself."""
    if "norm-pool" not in ops.FAST_PATHS or not _is_stock(layer, nn.MaxPool2d):
        return False
    assert isinstance(layer, nn.MaxPool2d)
    sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    plain = not layer.ceil_mode and not layer.return_indices
    return plain and [_pair(size) for size in sizes] == [(3, 3), (2, 2), (1, 1), (1, 1)]


def _dtype_of_product(input: Tensor) -> torch.dtype:
    """What a convolution makes of an input whose weights have its dtype, or under autocast."""
    device = input.device.type
    is_cast = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_cast else input.dtype


def _product(layer: nn.Module, norm: FusedBatchNorm2d, x: Tensor) -> ops.Product | None:
    """An unhooked convolution of single pixels and its unhooked norm in training, else None."""
    stock = _is_stock(layer, nn.Conv2d, HalfWeightConv2d) and _is_stock(norm, FusedBatchNorm2d)
    known = norm._norm()
    if not stock or known is None or norm.pool or not norm.training:
        return None
    assert isinstance(layer, nn.Conv2d)
    sizes = [_pair(size) for size in (layer.kernel_size, layer.stride, layer.dilation)]
    is_padded = _pair(layer.padding) != (0, 0)
    if sizes != [(1, 1)] * 3 or is_padded or layer.groups > 1 or layer.bias is not None:
        return None
    return ops.Product(x, under_autocast(layer.weight), known)


def _is_global_average(layer: nn.Module) -> bool:
    """Whether a layer is the average over all pixels, as a pooling to one of them."""
    if not _is_stock(layer, nn.AdaptiveAvgPool2d):
        return False
    assert isinstance(layer, nn.AdaptiveAvgPool2d)
    return [*_pair(layer.output_size)] == [1, 1]


def _is_stock(module: nn.Module | None, *classes: type[nn.Module]) -> bool:
    """Whether a module is of one of these classes, not of a subclass, and nothing hooks it."""
    return type(module) in classes and not any(
        module.__dict__.get(name)  # type: ignore[union-attr]
        for name in (
            "forward",
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
        )
    )


def _is_absent(part: object) -> bool:
    """Whether an optional part of a block does nothing."""
    return part is None or type(part) is nn.Identity


# What carries a tensor's alias from a block to the next: an attribute, since `nn.Sequential` passes
# one tensor on. Whoever does not look for it reads the tensor as ever, and autograd sums.
_SHORTCUT = "_freeadv_shortcut"


def _with_shortcut(y: Tensor, shortcut: Tensor) -> Tensor:
    """A block's output, and on it what the shortcut of the next block is to read."""
    if shortcut is not y:  # a tensor that held itself would wait for the garbage collector
        setattr(y, _SHORTCUT, shortcut)
    return y


def _shortcut(x: Tensor) -> Tensor:
    """What a block's shortcut reads: the alias of its input, or the input itself.

    The input itself where an in-place operation or `detach_` has moved it on, and where a hook or
    `retain_grad` waits for its gradient: apart from the alias's that is not the whole one.
    """
    alias: Tensor | None = getattr(x, _SHORTCUT, None)
    if alias is None or alias.grad_fn is not x.grad_fn or x._backward_hooks or x.retains_grad:
        return x
    return alias


def _block_start(norm: nn.Module, x: Tensor, *, is_raw: bool) -> tuple[Tensor, Tensor]:
    """A block's first norm and ReLU, and what its shortcut reads.

    Args:
        norm: The norm.
        x: (N, C, H, W), the block's input.
        is_raw: Whether the shortcut reads x, and not the activation.
    """
    if isinstance(norm, FusedBatchNorm2d) and _is_stock(norm, FusedBatchNorm2d):
        both = norm.with_alias(x, of_input=is_raw)
        if both is not None:
            return both
    activated: Tensor = norm(x)
    return activated, x if is_raw else activated


def _block_end(
    norm: Any, layer: nn.Module, x: Tensor, downsample: nn.Module | None, shortcut: Tensor
) -> Tensor:
    """A block's last convolution, norm, addition and ReLU, and what its shortcut goes through."""
    projection, residual_norm = _projection(downsample), None
    if downsample is not None and projection is None:
        shortcut = downsample(shortcut)
    if type(norm) is FusedBatchNorm2d:
        output = norm.of_product(layer, x, shortcut, projection)
        if output is not None:
            return output
    if projection is not None:
        *layers, residual_norm = projection
        for other in layers:
            shortcut = other(shortcut)
    return norm(layer(x), shortcut, residual_norm)  # type: ignore[no-any-return]


def _projection(downsample: nn.Module | None) -> list[nn.Module] | None:
    """A shortcut's layers where the last of them is a fused norm, else None."""
    if not _is_stock(downsample, nn.Sequential):
        return None
    layers = [layer for layer in downsample._modules.values() if layer is not None]  # type: ignore[union-attr]
    return layers if layers and type(layers[-1]) is FusedBatchNorm2d else None


# The forward passes of the twins: the original's computation, in its order.


def _torchvision_basic_block(self: Any, x: Tensor) -> Tensor:
    """3x3 and 3x3 convolution."""
    out = self.bn1(self.conv1(x))
    return _block_end(self.bn2, self.conv2, out, self.downsample, _shortcut(x))


def _torchvision_bottleneck(self: Any, x: Tensor) -> Tensor:
    """1x1, 3x3 and 1x1 convolution."""
    out = self.bn1(self.conv1(x))
    out = self.bn2(self.conv2(out))
    return _block_end(self.bn3, self.conv3, out, self.downsample, _shortcut(x))


def _timm_basic_block(self: Any, x: Tensor) -> Tensor:
    """torchvision's, with room for anti-aliasing."""
    out = self.aa(self.bn1(self.conv1(x)))
    return _block_end(self.bn2, self.conv2, out, self.downsample, _shortcut(x))


def _timm_bottleneck(self: Any, x: Tensor) -> Tensor:
    """torchvision's, with room for anti-aliasing."""
    out = self.bn1(self.conv1(x))
    out = self.aa(self.bn2(self.conv2(out)))
    return _block_end(self.bn3, self.conv3, out, self.downsample, _shortcut(x))


def _cifar_block(self: Any, x: Tensor) -> Tensor:
    """torchvision's under other names."""
    out = self.bn1(self.conv1(x))
    return _block_end(self.bn2, self.conv2, out, self.shortcut, _shortcut(x))


def _cifar_bottleneck(self: Any, x: Tensor) -> Tensor:
    """torchvision's under other names."""
    out = self.bn2(self.conv2(self.bn1(self.conv1(x))))
    return _block_end(self.bn3, self.conv3, out, self.shortcut, _shortcut(x))


def _cifar_resnet(self: Any, x: Tensor) -> Tensor:
    """A stem without pooling, stages, global average."""
    x = self.layer4(self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x))))))
    return self.linear(ops.global_average(x))  # type: ignore[no-any-return]


def _preact_block(self: Any, x: Tensor) -> Tensor:
    """Batch norm and ReLU before each convolution."""
    is_raw = self.shortcut is None or self.raw_shortcut
    activated, shortcut = _block_start(self.bn1, x, is_raw=is_raw)
    if self.shortcut is not None:
        shortcut = self.shortcut(shortcut)
    residual: Tensor = self.conv2(self.bn2(self.conv1(activated)))
    return residual + shortcut


def _preact_resnet18(self: Any, x: Tensor) -> Tensor:
    """The variant with a last batch norm; the other has no ReLU of its own."""
    x = self.bn(self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x))))))
    return self.linear(ops.global_average(x))  # type: ignore[no-any-return]


def _wide_block(self: Any, x: Tensor) -> Tensor:
    """Batch norm and ReLU before each convolution."""
    activated, shortcut = _block_start(self.bn1, x, is_raw=self.convShortcut is None)
    if self.convShortcut is not None:
        shortcut = self.convShortcut(shortcut)
    residual: Tensor = self.conv2(self.bn2(self.conv1(activated)))
    return residual + shortcut


def _wide_resnet(self: Any, x: Tensor) -> Tensor:
    """Stages, batch norm with ReLU, global average."""
    x = self.bn1(self.block3(self.block2(self.block1(self.conv1(x)))))
    return self.fc(ops.global_average(x))  # type: ignore[no-any-return]


def _madry_block(self: Any, x: Tensor) -> Tensor:
    """Batch norm and leaky ReLU before each convolution; a shortcut without parameters."""
    activated, shortcut = _block_start(self.bn1, x, is_raw=not self.shares_activation)
    if self.stride > 1:
        shortcut = F.avg_pool2d(shortcut, self.stride)
    if self.channel_padding > 0:
        padding = self.channel_padding
        shortcut = F.pad(shortcut, (0, 0, 0, 0, padding, padding))
    residual: Tensor = self.conv2(self.bn2(self.conv1(activated)))
    return residual + shortcut


def _madry_wide_resnet(self: Any, x: Tensor) -> Tensor:
    """Stages, batch norm with leaky ReLU, global average."""
    x = self.bn(self.block3(self.block2(self.block1(self.conv1(x)))))
    return self.fc(ops.global_average(x))  # type: ignore[no-any-return]


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
        _TWO, ("relu",), forward=_torchvision_basic_block
    ),
    "torchvision.models.resnet.Bottleneck": _Pattern(
        _THREE, ("relu",), forward=_torchvision_bottleneck
    ),
    "timm.models.resnet.ResNet": _Pattern(("bn1",), ("act1",), pools=("maxpool",)),
    "timm.models.resnet.BasicBlock": _Pattern(_TWO, _TIMM_TWO, _TIMM_OPTIONS, _timm_basic_block),
    "timm.models.resnet.Bottleneck": _Pattern(_THREE, _TIMM_THREE, _TIMM_OPTIONS, _timm_bottleneck),
    "freeadv_fast.models.cifar_resnet.CifarBlock": _Pattern(_TWO, forward=_cifar_block),
    "freeadv_fast.models.cifar_resnet.CifarBottleneck": _Pattern(_THREE, forward=_cifar_bottleneck),
    "freeadv_fast.models.cifar_resnet.CifarResNet": _Pattern(("bn1",), forward=_cifar_resnet),
    "freeadv_fast.models.preact_resnet.PreActBlock": _Pattern(_TWO, forward=_preact_block),
    "freeadv_fast.models.preact_resnet.PreActResNet18": _Pattern(("bn",), forward=_preact_resnet18),
    "freeadv_fast.models.wide_resnet.WideBlock": _Pattern(_TWO, forward=_wide_block),
    "freeadv_fast.models.wide_resnet.WideResNet": _Pattern(("bn1",), forward=_wide_resnet),
    "freeadv_fast.models.wide_resnet.MadryBlock": _Pattern(
        _TWO, forward=_madry_block, negative_slope=LEAKINESS
    ),
    "freeadv_fast.models.wide_resnet.MadryWideResNet": _Pattern(
        ("bn",), forward=_madry_wide_resnet, negative_slope=LEAKINESS
    ),
}
