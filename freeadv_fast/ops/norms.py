"""Batch norm with what follows it: a residual, ReLU, another reader, pooling."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from freeadv_fast.kernels import batch_norm as _batch_norm
from freeadv_fast.kernels import batch_norm_statistics as _statistics
from freeadv_fast.kernels import norm_pool as _norm_pool
from freeadv_fast.kernels.batch_norm_statistics import Norm
from freeadv_fast.ops import dispatch


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    num_groups: int = 1,
    relu: bool = True,
    residual: Tensor | None = None,
    negative_slope: float = 0.0,
    fork: bool = False,
    num_batches_tracked: Tensor | None = None,
    moments: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Batch norm in groups, then a residual, then ReLU: ``relu(norm(x) + residual)``.

    The kernels take half precision and float32 with a multiple of 8 channels and float32
    parameters on a GPU, and are differentiable once: a second derivative raises. All else runs
    PyTorch's own operations, differentiable as often as they are.

    Args:
        x: (N, C, H, W) activations; for the kernels copied unless channels_last.
        weight: (C,) scale; None for ones.
        bias: (C,) shift; None for zeros.
        running_mean: (C,), updated in place in training; None for none.
        running_var: (C,), likewise; of unbiased variances.
        training: Normalise by the minibatch's statistics, and not by the running ones.
        momentum: Weight of the minibatch in the running statistics.
        eps: Added to the variance.
        num_groups: Groups of consecutive images (`torch.tensor_split`) with statistics of their
            own, in training; the running ones take one update with the groups' mean.
        relu: Whether negative values are multiplied by the slope.
        residual: (N, C, H, W) of x's dtype, added before the ReLU.
        negative_slope: 0 for ReLU, more for leaky ReLU; unused without `relu`.
        fork: Return the output twice, for two readers whose gradients the kernels then sum.
        num_batches_tracked: () int64, one is added in training; None for none.
        moments: (2, G, C) float32, x's own from `block_sum`, in training, so that the kernels need
            not take them; None where nobody knows them.

    Returns:
        (N, C, H, W) of x's dtype: channels_last from the kernels, else in x's memory format. With
        `fork` it and the same once more: one object, or from the kernels, behind ReLU where
        gradients are recorded, two for the same memory, each with the gradient of its own readers.

    Raises:
        RuntimeError: shapes, dtypes or devices disagree, a group would hold fewer than two values
            of a channel, or the slope is negative or not finite; from the kernels, also of a second
            derivative.

    Source: Ioffe & Szegedy 2015, algorithms 1 and 2; groups: Hoffer et al. 2017, algorithm 1.
    """
    norm = Norm(weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps)
    inputs = (x, weight, bias, running_mean, running_var)
    if dispatch.backend(x.device) == "triton" and _statistics.supports(x, norm):
        y: Tensor | tuple[Tensor, Tensor] = _batch_norm.batch_norm_act(
            *inputs,
            training=training,
            momentum=momentum,
            eps=eps,
            num_groups=num_groups,
            relu=relu,
            residual=residual,
            negative_slope=negative_slope,
            fork=fork,
            num_batches_tracked=num_batches_tracked,
            moments=moments,
        )
    else:
        y = _batch_norm.batch_norm_act_ref(
            *inputs,
            training,
            momentum,
            eps,
            num_groups,
            relu,
            residual,
            negative_slope,
            fork,
            num_batches_tracked,
        )
    return y


def shared_norm_act(
    x: Tensor,
    norm: Norm,
    *,
    training: bool,
    num_groups: int,
    negative_slope: float,
    moments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``relu(norm(x))``, and x for its other reader: the start of a pre-activation block.

    The kernels are those of `batch_norm_act` and sum the gradients of both; they are differentiable
    once. All else is `batch_norm_act`, and autograd sums.

    Args:
        x: (N, C, H, W) activations; for the kernels copied unless channels_last.
        norm: Its tensors as in `batch_norm_act`; running statistics are updated in training.
        training: Normalise by the minibatch's statistics, and not by the running ones.
        num_groups: Groups of consecutive images with statistics of their own, in training.
        negative_slope: 0 for ReLU, more for leaky ReLU.
        moments: As for `batch_norm_act`.

    Returns:
        As from `batch_norm_act`; and x, or from the kernels, where x wants a gradient, an alias of
        it: the same memory, with the gradient of its own readers.

    Raises:
        RuntimeError: as from `batch_norm_act`.

    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks", figure 1 (b).
    """
    if dispatch.backend(x.device) == "triton" and _statistics.supports(x, norm):
        both: tuple[Tensor, Tensor] = _batch_norm.shared_norm_act(
            x,
            norm,
            training=training,
            num_groups=num_groups,
            negative_slope=negative_slope,
            moments=moments,
        )
        return both
    y = batch_norm_act(
        x,
        *norm[:4],
        training=training,
        momentum=norm.momentum,
        eps=norm.eps,
        num_groups=num_groups,
        negative_slope=negative_slope,
        num_batches_tracked=norm.num_batches_tracked,
    )
    assert isinstance(y, Tensor)  # not forked
    return y, x


def batch_norm_relu_pool(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    num_groups: int = 1,
    fork: bool = False,
    num_batches_tracked: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Batch norm in groups, then ReLU, then 3x3 max pooling with stride 2 and padding 1.

    Where the kernels of `batch_norm_act` take channels_last activations, those of this op do; they
    are differentiable once. All else runs `batch_norm_act` and PyTorch's pooling.

    Args:
        x: (N, C, H, W) activations.
        weight: (C,) scale; None for ones.
        bias: (C,) shift; None for zeros.
        running_mean: (C,), updated in place in training; None for none.
        running_var: (C,), likewise; of unbiased variances.
        training: Normalise by the minibatch's statistics, and not by the running ones.
        momentum: Weight of the minibatch in the running statistics.
        eps: Added to the variance.
        num_groups: Groups of consecutive images with statistics of their own, in training.
        fork: Return the output twice, for two readers whose gradients the kernels then sum.
        num_batches_tracked: () int64, one is added in training; None for none.

    Returns:
        (N, C, ceil(H / 2), ceil(W / 2)) of x's dtype and in its memory format. With `fork` it and
        the same once more: one object, or from the kernels, where gradients are recorded, two for
        the same memory, each with the gradient of its own readers.

    Raises:
        RuntimeError: shapes, dtypes or devices disagree, or a group would hold fewer than two
            values of a channel; from the kernels, also of a second derivative.

    Source: He et al. 2015, table 1, the stem of a ResNet.
    """
    norm = Norm(weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps)
    inputs = (x, weight, bias, running_mean, running_var)
    if dispatch.backend(x.device) == "triton" and _norm_pool.supports(x, norm):
        pooled: Tensor | tuple[Tensor, Tensor] = _norm_pool.batch_norm_relu_pool(
            *inputs,
            training=training,
            momentum=momentum,
            eps=eps,
            num_groups=num_groups,
            fork=fork,
            num_batches_tracked=num_batches_tracked,
        )
        return pooled
    activated = batch_norm_act(
        *inputs,
        training=training,
        momentum=momentum,
        eps=eps,
        num_groups=num_groups,
        relu=True,
        residual=None,
        fork=False,
        num_batches_tracked=num_batches_tracked,
    )
    assert isinstance(activated, Tensor)  # not forked
    y = F.max_pool2d(activated, _norm_pool.KERNEL, _norm_pool.STRIDE, _norm_pool.PADDING)
    return (y, y) if fork else y
