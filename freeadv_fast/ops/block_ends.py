"""The end of a residual block in training: a sum, two norms, or products and norms, as one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from freeadv_fast.kernels import batch_norm_statistics as _statistics
from freeadv_fast.kernels import block_sum as _block_sum
from freeadv_fast.kernels import joined_norms as _joined_norms
from freeadv_fast.kernels import product_norm as _product_norm
from freeadv_fast.kernels.batch_norm_statistics import Norm
from freeadv_fast.kernels.product_norm import Product
from freeadv_fast.ops import dispatch, norms


def block_sum(x: Tensor, shortcut: Tensor, *, num_groups: int) -> tuple[Tensor, Tensor | None]:
    """``x + shortcut``, and what the next batch norm will ask of it: a pre-activation block's end.

    Args:
        x: (N, C, H, W) activations; for the kernel copied unless channels_last.
        shortcut: Of x's shape; likewise.
        num_groups: Groups of consecutive images with moments of their own.

    Returns:
        The sum; and from the kernel, which takes half precision and float32 with a multiple of 8
        channels, (2, G, C) float32: each group's means and biased variances. Else None.

    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks", equation 7.
    """
    if dispatch.backend(x.device) == "triton" and _block_sum.supports(x, shortcut, num_groups):
        both: tuple[Tensor, Tensor] = _block_sum.block_sum(x, shortcut, num_groups)
        return both
    return x + shortcut, None


def joined_norms(
    x: Tensor, norm: Norm, shortcut: Tensor, shortcut_norm: Norm, *, num_groups: int, fork: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """``relu(norm(x) + shortcut_norm(shortcut))`` in training: the end of a projection block.

    Where the kernels of `batch_norm_act` take both, those of this op do; they are differentiable
    once. All else is two calls of `batch_norm_act`.

    Args:
        x: (N, C, H, W) activations; for the kernels copied unless channels_last.
        norm: Its tensors as in `batch_norm_act`; running statistics are updated in place.
        shortcut: (N, C, H, W) of x's dtype; likewise.
        shortcut_norm: Likewise.
        num_groups: Groups of consecutive images with statistics of their own.
        fork: Return the output twice, for two readers whose gradients the kernels then sum.

    Returns:
        As from `batch_norm_act` behind ReLU and a residual.

    Raises:
        RuntimeError: shapes, dtypes or devices disagree, or a group would hold fewer than two
            values of a channel; from the kernels, also of a second derivative.

    Source: He et al. 2015, section 3.3, option B; Ioffe & Szegedy 2015, algorithm 1.
    """
    both = ((x, norm), (shortcut, shortcut_norm))
    if dispatch.backend(x.device) == "triton" and all(_statistics.supports(*one) for one in both):
        y: Tensor | tuple[Tensor, Tensor] = _joined_norms.joined_norms(
            x, norm, shortcut, shortcut_norm, num_groups=num_groups, fork=fork
        )
        return y
    residual = _normalized(shortcut, shortcut_norm, num_groups, relu=False)
    assert isinstance(residual, Tensor)  # not forked
    return _normalized(x, norm, num_groups, relu=True, residual=residual, fork=fork)


def _normalized(
    x: Tensor,
    norm: Norm,
    num_groups: int,
    *,
    relu: bool,
    residual: Tensor | None = None,
    fork: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`batch_norm_act` in training."""
    return norms.batch_norm_act(
        x,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        training=True,
        momentum=norm.momentum,
        eps=norm.eps,
        num_groups=num_groups,
        relu=relu,
        residual=residual,
        fork=fork,
        num_batches_tracked=norm.num_batches_tracked,
    )


def product_norm(
    product: Product, shortcut: Tensor | Product, *, num_groups: int, fork: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """``relu(norm(conv(x)) + shortcut)`` in training: the end of a bottleneck block.

    Where the convolutions widen, the kernels take bfloat16 and all images as one group; they are
    differentiable once. All else is convolutions and `batch_norm_act` or `joined_norms`.

    Args:
        product: (N, K, H, W) activations, for the kernels copied unless channels_last; (C, K, 1, 1)
            weights, of any float dtype under autocast, else of the activations'; and the norm, its
            tensors as in `batch_norm_act`, running statistics updated in place.
        shortcut: (N, C, H, W) that is added; or what it is a product of, likewise.
        num_groups: Groups of consecutive images with statistics of their own.
        fork: Return the output twice, for two readers whose gradients the kernels then sum.

    Returns:
        As from `batch_norm_act` behind ReLU and a residual.

    Raises:
        RuntimeError: shapes, dtypes or devices disagree, or a group would hold fewer than two
            values of a channel; from the kernels, also of a second derivative.

    Source: He et al. 2015, section 4.1; Ioffe & Szegedy 2015, algorithm 1.
    """
    x, weight, norm = product
    products = [product] if isinstance(shortcut, Tensor) else [product, shortcut]
    if dispatch.backend(x.device) == "triton" and num_groups == 1 and torch.is_grad_enabled():
        is_cast = torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if is_cast else weight.dtype
        is_right = not isinstance(shortcut, Tensor) or shortcut.dtype == dtype
        if is_right and all(
            one.x.dtype == dtype and _product_norm.supports(one) for one in products
        ):
            first, *second = [one._replace(w=one.w.to(dtype)) for one in products]
            y: Tensor | tuple[Tensor, Tensor] = _product_norm.product_norm(
                first, second[0] if second else shortcut, fork=fork
            )
            return y
    y = F.conv2d(x, weight)
    if isinstance(shortcut, Tensor):
        return _normalized(y, norm, num_groups, relu=True, residual=shortcut, fork=fork)
    other = F.conv2d(shortcut.x, shortcut.w)
    return joined_norms(y, norm, other, shortcut.norm, num_groups=num_groups, fork=fork)
