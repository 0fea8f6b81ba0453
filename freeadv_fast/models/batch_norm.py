"""Batch norm in groups and in two branches.

Groups (ghost batch norm): statistics over parts of the minibatch, as several small GPUs would take
them. "Adversarial Training for Free!" trained ImageNet with 256 images on 4 GPUs under
DataParallel, so each batch norm saw 64 images. `apply_bn_groups(model, 64)` gives one GPU the same.

Branches (auxiliary batch norm): clean and adversarial images come from different distributions, so
AdvProp normalises each by statistics and affine parameters of its own. `add_auxiliary_bn` adds the
second branch, `DualNetwork` selects one by argument.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freeadv_fast.errors import UserError


class GhostBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose training statistics are those of groups of the minibatch.

    A minibatch of N images is split into ceil(N / group) consecutive groups of near-equal size
    (`torch.tensor_split`), or fewer where one would hold a single image; each is normalised with
    its own mean and variance. Running statistics take one momentum update a minibatch, with the
    mean over the groups of their means and of their unbiased variances. (The reference code's
    DataParallel kept those of replica 0.) With one group, and in eval mode, this is
    `nn.BatchNorm2d` to the last bit; the state-dict keys always are.

    Chunks, one fused call each and a concatenation are the cheapest way on a CPU: 10.4 ms against
    7.7 ms for one batch norm at 64x64x28x28, where grouped statistics under autograd take 38 ms.

    Attributes:
        group: Images that share statistics, at most.
    """

    def __init__(self, num_features: int, *, group: int, **options: object) -> None:
        """Takes what `nn.BatchNorm2d` takes, and the group size.

        Args:
            num_features: Channels.
            group: Images that share statistics, at least 1.
            **options: eps, momentum, affine, track_running_stats, device, dtype.
        """
        super().__init__(num_features, **options)  # type: ignore[arg-type]
        self.group = group

    def forward(self, input: Tensor) -> Tensor:
        """Normalises (N, C, H, W) activations; memory format and dtype are kept."""
        # No group of one image: with 1x1 activations it would have no variance.
        num_groups = min(math.ceil(len(input) / self.group), len(input) // 2)
        if not self.training or num_groups <= 1:
            return super().forward(input)
        dtype = input.dtype if self.running_mean is None else self.running_mean.dtype
        # One row a group: its mean, and its unbiased variance.
        means, variances = input.new_zeros((2, num_groups, self.num_features), dtype=dtype)
        groups = [
            F.batch_norm(chunk, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
            for chunk, mean, variance in zip(
                input.tensor_split(num_groups), means, variances, strict=True
            )
        ]
        self._update_running_statistics(means, variances)
        return torch.cat(groups)

    @torch.no_grad()
    def _update_running_statistics(self, means: Tensor, variances: Tensor) -> None:
        """One momentum update with the mean over the (groups, C) rows."""
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:  # torch's cumulative average
            momentum = 1.0 / float(self.num_batches_tracked)
        for running, rows in ((self.running_mean, means), (self.running_var, variances)):
            # `data`: autograd must not see it. A forward pass in one group has saved the buffer for
            # its backward pass, which never reads it but would refuse a newer version.
            running.data.mul_(1 - momentum).add_(rows.mean(0), alpha=momentum)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{super().extra_repr()}, group={self.group}"  # type: ignore[no-untyped-call]


class GhostBatchNormAct2d(GhostBatchNorm2d):
    """The ghost twin of timm's `BatchNormAct2d`: batch norm, then its `drop` and `act`."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Normalises and activates (N, C, H, W) activations."""
        activated: Tensor = self.act(self.drop(super().forward(input)))
        return activated


def apply_bn_groups(model: nn.Module, group: int) -> nn.Module:
    """Replaces every batch norm of a network by its ghost twin, in place.

    Parameters and buffers are the same objects under the same names.

    Args:
        model: Network with `nn.BatchNorm2d` or timm's `BatchNormAct2d` layers.
        group: Images that share statistics, at most; at least 1.

    Returns:
        `model`.

    Raises:
        UserError: there is no batch norm, or one of a kind that has no ghost twin.
    """
    num_replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(parent, name, _ghost_twin(child, group))
                num_replaced += 1
    if num_replaced == 0:
        raise UserError(
            f"--bn-group {group}: this network has no batch normalisation; use --bn-group None"
        )
    return model


def _ghost_twin(layer: nn.modules.batchnorm._BatchNorm, group: int) -> GhostBatchNorm2d:
    """The ghost layer that shares `layer`'s parameters and buffers."""
    has_activation = hasattr(layer, "act") and hasattr(layer, "drop")
    is_plain = type(layer).forward in (nn.BatchNorm2d.forward, GhostBatchNorm2d.forward)
    if not isinstance(layer, nn.BatchNorm2d) or not (is_plain or has_activation):
        raise UserError(f"--bn-group {group}: no groups for a layer of type {type(layer).__name__}")
    twin_class = GhostBatchNormAct2d if has_activation else GhostBatchNorm2d
    twin = twin_class(
        layer.num_features,
        group=group,
        eps=layer.eps,
        momentum=layer.momentum,
        affine=False,
        track_running_stats=False,
        device="meta",
    )
    # No copies: optimizers, wrappers and checkpoints that know the old tensors stay right.
    twin.affine, twin.track_running_stats = layer.affine, layer.track_running_stats
    twin._parameters.update(layer._parameters)
    twin._buffers.update(layer._buffers)
    twin._modules.update(layer._modules)
    return twin.train(layer.training)


AUXILIARY = "aux_bn"


def add_auxiliary_bn(model: nn.Module, group: int) -> nn.Module:
    """Gives every batch norm an auxiliary twin with its own affine and statistics, in place.

    The twin is a child named ``aux_bn``, so its keys stand beside the plain ones
    (``bn1.weight``, ``bn1.aux_bn.weight``); it starts as a copy. The network itself computes what
    it did before: `DualNetwork` runs the auxiliary branch.

    Args:
        model: Network with `nn.BatchNorm2d` or timm's `BatchNormAct2d` layers, grouped or not.
        group: Images that share statistics in the auxiliary branch, at most; at least 1.

    Returns:
        `model`; as it is when it has the twins already.

    Raises:
        UserError: there is no batch norm, or one of a kind that has no ghost twin.

    Source: Xie et al. 2020, "Adversarial Examples Improve Image Recognition", section 4.2; the keys
    are those of Fast AdvProp's code.
    """
    if branch_parameters(model)[1]:  # a network of the caller's that was trained before
        return model
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not layers:
        raise UserError("--method: this network has no batch normalisation to give a second branch")
    for layer in layers:
        layer.add_module(AUXILIARY, _ghost_twin(copy.deepcopy(layer), group))
    return model


def branch_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The affine parameters of the main and of the auxiliary batch norms, without shared ones."""
    layers = [layer for layer in model.modules() if AUXILIARY in layer._modules]
    main = [p for layer in layers for p in layer.parameters(recurse=False)]
    return main, [p for layer in layers for p in layer.get_submodule(AUXILIARY).parameters()]


def without_auxiliary(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without its auxiliary branch: the keys of the plain network."""
    return {key: value for key, value in state.items() if f".{AUXILIARY}." not in key}


Branch = Literal["main", "auxiliary", "attack"]


class DualNetwork(nn.Module):
    """A network whose batch-norm branch is an argument of its forward pass.

    ``main`` is the network itself. ``auxiliary`` shares all its tensors but normalises with the
    auxiliary batch norms, in training mode. ``attack`` is the auxiliary branch in eval mode: it
    reads the running statistics and moves none. Each branch is a module tree of its own over the
    same parameters, so that nothing is toggled between passes and each can be compiled or captured.

    Attributes:
        model: The network, with auxiliary batch norms and on its device.
    """

    def __init__(self, model: nn.Module) -> None:
        """Builds the branches' trees; the model must not be replaced or moved afterwards."""
        super().__init__()
        self.model = model
        # In a plain dict: the trees own nothing, and their parameters would be listed twice.
        self._branches = {
            "main": model,
            "auxiliary": _auxiliary_tree(model, training=True),
            "attack": _auxiliary_tree(model, training=False),
        }

    def forward(self, x: Tensor, branch: Branch = "main") -> Any:
        """(N, 3, H, W) normalised images to the outputs of one branch, (N, classes) logits."""
        return self._branches[branch](x)


def _auxiliary_tree(module: nn.Module, *, training: bool) -> nn.Module:
    """A tree over the same tensors in which auxiliary batch norms stand for the main ones."""
    source = module._modules.get(AUXILIARY) or module
    twin = copy.copy(source)
    twin.training = training
    twin._modules = {
        name: child and _auxiliary_tree(child, training=training)
        for name, child in source._modules.items()
    }
    return twin
