"""The only door to the compiled code: picks an implementation once per device, and says which.

The trainer calls these functions and never asks where it runs. Formulas, bytes and numerics are
told at the top of each file in `freeadv_fast.kernels`.
"""

from __future__ import annotations

import datetime
import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from freeadv_fast.kernels import ascend_normalize as _ascend_normalize
from freeadv_fast.kernels import averaging as _averaging
from freeadv_fast.kernels import batch_norm as _batch_norm
from freeadv_fast.kernels import batch_norm_statistics as _statistics
from freeadv_fast.kernels import cross_entropy as _cross_entropy
from freeadv_fast.kernels import global_average as _global_average
from freeadv_fast.kernels import joined_norms as _joined_norms
from freeadv_fast.kernels import lalr as _lalr
from freeadv_fast.kernels import norm_pool as _norm_pool
from freeadv_fast.kernels import perturb_normalize as _perturb_normalize
from freeadv_fast.kernels import product_norm as _product_norm
from freeadv_fast.kernels import sgd as _sgd
from freeadv_fast.kernels import sign_ascent as _sign_ascent
from freeadv_fast.kernels import stem_convolution as _stem_convolution
from freeadv_fast.kernels.batch_norm_statistics import Norm as Norm
from freeadv_fast.kernels.product_norm import Product as Product

Backend = Literal["triton", "eager"]

ExtensionBackend = Literal["compiled", "eager"]

# Triton compiles for Volta and newer; a Pascal GPU runs the references.
OLDEST_CAPABILITY = (7, 0)

# The step's faster ways, each taken where it fits. `bench_step.py --without NAME` takes one out
# of the set before anything is built, to time what it is worth.
FAST_PATHS = {
    "stem",  # the stem's convolution on packed images in kernels of our own
    "norm-pool",  # batch norm, ReLU and max pooling as one
    "joined-norms",  # the two norms at the end of a projection block as one
    "global-average",  # the last pooling's gradient in the memory format of its input
    "two-readers",  # a pre-activation block's first norm and its readers' gradients as one
    "product-norm",  # a widening 1x1 convolution and its norm as one
    "cross-entropy",  # cross-entropy and the metrics of a pass as one
    "half-weights",  # the optimizer writes the half-precision weights that convolutions read
}


@functools.cache
def backend(device: torch.device | str) -> Backend:
    """Which implementation runs on a device.

    Args:
        device: Where the tensors live.

    Returns:
        "triton": compiled kernels, on CUDA devices that Triton supports. "eager": the references
        in plain PyTorch, everywhere else.
    """
    device = torch.device(device)
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return "eager"
    return "triton" if torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY else "eager"


def perturb_normalize(
    images: Tensor,
    delta: Tensor | None,
    pixel_mean: Tensor,
    pixel_std: Tensor,
    *,
    unit: float = 1.0,
    dtype: torch.dtype = torch.float32,
    space_to_depth: bool = False,
) -> Tensor:
    """The normalised network input at images + delta, in one pass over memory.

    Computes ``(clip(images + unit * delta, 0, 255) / 255 - pixel_mean) / pixel_std`` in float32,
    in that order, and rounds once to `dtype`. No autograd runs through it: call
    ``requires_grad_()`` on the result, a leaf, and hand its gradient to `sign_ascent_`.

    Args:
        images: (N, H, W, C) uint8, or float16 grey levels in 0..255, contiguous.
        delta: (N, H, W, C) int8, float16 or float32, contiguous, finite; None for clean images.
        pixel_mean: (C,) float32, of pixels in [0, 1].
        pixel_std: (C,) float32, likewise, above 0.
        unit: Grey levels (1/255) that one unit of `delta` stands for.
        dtype: bfloat16, float16 or float32; float64 computes in float64 (tests).
        space_to_depth: Whether to write the packed layout of `kernels/space_to_depth.py`.

    Returns:
        (N, C, H, W) in `dtype`, in channels_last memory, without a gradient; packed
        (N, 16, ceil(H / 2) + 3, ceil(W / 2) + 3).

    Raises:
        RuntimeError: shapes, dtypes, layouts or devices disagree, or delta requires grad, or
            images that are not of 3 channels shall be packed.

    Source: Shafahi et al. 2019, Algorithm 1, the argument x + delta.
    """
    x: Tensor
    if backend(images.device) == "triton":
        x = _perturb_normalize.perturb_normalize(
            images,
            delta,
            pixel_mean,
            pixel_std,
            unit=unit,
            dtype=dtype,
            space_to_depth=space_to_depth,
        )
    else:
        x = _perturb_normalize.perturb_normalize_ref(
            images, delta, pixel_mean, pixel_std, unit, dtype, space_to_depth
        )
    return x


def cross_entropy_sum_(
    logits: Tensor, labels: Tensor, sums: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy summed over the images of a pass, which is counted.

    Args:
        logits: (n, classes). labels: (n,) int64.
        sums: (4,) float64 on the device, updated: losses, images whose largest logit is their
            label's, images, and passes whose loss is not finite, which is not summed.
        smoothing: Share of a label that is spread over all classes, in [0, 1).

    Returns:
        () of the logits' dtype. The kernels take float32 on a GPU and are differentiable once: a
        second derivative raises.

    Source: Bridle 1990; Szegedy et al. 2016, section 7.
    """
    is_fused = (
        "cross-entropy" in FAST_PATHS
        and backend(logits.device) == "triton"
        and _cross_entropy.supports(logits, labels)
    )
    function = (
        _cross_entropy.cross_entropy_sum_ if is_fused else _cross_entropy.cross_entropy_sum_ref_
    )
    loss_sum: Tensor = function(logits, labels, sums, smoothing)
    return loss_sum


def count_pass_(sums: Tensor, loss_sum: Tensor, hits: Tensor, num_images: int) -> None:
    """Counts a pass into sums, as `cross_entropy_sum_` does; nothing is differentiated.

    Args:
        sums: (4,) float64, updated. loss_sum: () summed loss.
        hits: () images classified right. num_images: Of the pass.
    """
    _cross_entropy.count_ref_(sums, loss_sum, hits, num_images)


def sign_ascent_(
    delta: Tensor,
    grad: Tensor,
    images: Tensor,
    nonfinite: Tensor,
    *,
    step: float,
    eps: float,
    unit: float = 1.0,
) -> None:
    """One sign step up the loss and back into the L-infinity ball, in place.

    Computes ``delta <- clip(delta + step * sign(grad) * mask, -eps, +eps)`` with
    ``mask = 0 <= images + delta <= 255``, inclusive and taken before the update: there, and only
    there, does gradient pass the clip of `perturb_normalize`. ``sign(0) = 0``. A gradient that is
    NaN or infinite moves nothing and is counted; the host never waits.

    Args:
        delta: (N, H, W, C) int8, float16 or float32, contiguous, in `unit` grey levels; updated.
        grad: (N, C, H, W) gradient at the network input, or packed (N, 16, ceil(H / 2) + 3,
            ceil(W / 2) + 3) for C = 3; bfloat16, float16, float32 or float64; copied unless
            channels_last. A packed one's border and padding channels count for nothing.
        images: (N, H, W, C) uint8, contiguous.
        nonfinite: One int64 on the device; the number of non-finite gradients is added to it.
        step: Length of the step in grey levels (1/255).
        eps: Radius of the ball in grey levels.
        unit: Grey levels that one unit of `delta` stands for. An int8 delta counts steps:
            ``unit == step``, and eps is a whole number of steps, at most 127.

    Raises:
        RuntimeError: shapes, dtypes, layouts or devices disagree, or int8 would not be exact.

    Source: Shafahi et al. 2019, Algorithm 1, lines 9 to 11.
    """
    if backend(delta.device) == "triton":
        _sign_ascent.sign_ascent_(delta, grad, images, nonfinite, step=step, eps=eps, unit=unit)
    else:
        _sign_ascent.sign_ascent_ref_(delta, grad, images, nonfinite, step, eps, unit)


def ascend_normalize_(
    delta: Tensor,
    x: Tensor,
    grad: Tensor,
    images: Tensor,
    pixel_mean: Tensor,
    pixel_std: Tensor,
    nonfinite: Tensor,
    *,
    step: float,
    eps: float,
    unit: float = 1.0,
) -> None:
    """`sign_ascent_`, then the next replay's network input over the last one's, in one pass.

    Bit for bit the two ops one after the other: ``sign_ascent_(delta, grad, images, ...)``, then
    ``x <- perturb_normalize(images, delta, ...)`` in x's dtype and layout and at its address, for
    CUDA graphs. The backward pass through x must be over; x's version counter moves.

    Args:
        delta: (N, H, W, C) int8, float16 or float32, contiguous, in `unit` grey levels; updated.
        x: (N, C, H, W), or packed (N, 16, ceil(H / 2) + 3, ceil(W / 2) + 3), as `perturb_normalize`
            returned it (its zeros are left as they are); overwritten. May require grad.
        grad: Gradient at x, of its shape and dtype; copied unless channels_last.
        images: (N, H, W, C) uint8, contiguous.
        pixel_mean: (C,) float32, of pixels in [0, 1].
        pixel_std: (C,) float32, likewise, above 0.
        nonfinite: One int64 on the device; the number of non-finite gradients is added to it.
        step: Length of the step in grey levels (1/255).
        eps: Radius of the ball in grey levels.
        unit: Grey levels that one unit of `delta` stands for; see `sign_ascent_`.

    Raises:
        RuntimeError: shapes, dtypes, layouts or devices disagree, or int8 would not be exact.

    Source: Shafahi et al. 2019, Algorithm 1, lines 8 to 11.
    """
    inputs = (delta, x, grad, images, pixel_mean, pixel_std, nonfinite)
    if backend(delta.device) == "triton":
        _ascend_normalize.ascend_normalize_(*inputs, step=step, eps=eps, unit=unit)
    else:
        _ascend_normalize.ascend_normalize_ref_(*inputs, step, eps, unit)


def stem_convolution(packed: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution of packed images with 4x4 kernels: stride 1, no padding.

    The kernels take half precision in channels_last, 16, 32 or 64 channels out and no bias, where
    the product is to be in the input's dtype: autocast's, or that of the weights. All else, and a
    CPU, runs `F.conv2d`. Both are differentiable as often as wanted.

    Args:
        packed: (N, 16, H + 3, W + 3), in the layout of `perturb_normalize`.
        weight: (O, 16, 4, 4). bias: (O,), or None.

    Returns:
        (N, O, H, W), channels_last as the input is, in the dtype that autocast gives convolutions.

    Raises:
        RuntimeError: shapes, dtypes or devices disagree.
    """
    if "stem" in FAST_PATHS and bias is None and backend(packed.device) == "triton":
        is_cast = torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if is_cast else weight.dtype
        if packed.dtype == dtype and _stem_convolution.supports(packed, weight):
            y: Tensor = _stem_convolution.stem_convolution(packed, weight)
            return y
    return F.conv2d(packed, weight, bias)


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
    if backend(x.device) == "triton" and _statistics.supports(x, norm):
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
    x: Tensor, norm: Norm, *, training: bool, num_groups: int, negative_slope: float
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

    Returns:
        As from `batch_norm_act`; and x, or from the kernels, where x wants a gradient, an alias of
        it: the same memory, with the gradient of its own readers.

    Raises:
        RuntimeError: as from `batch_norm_act`.

    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks", figure 1 (b).
    """
    if backend(x.device) == "triton" and _statistics.supports(x, norm):
        both: tuple[Tensor, Tensor] = _batch_norm.shared_norm_act(
            x, norm, training=training, num_groups=num_groups, negative_slope=negative_slope
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
    if backend(x.device) == "triton" and all(_statistics.supports(*one) for one in both):
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
    return batch_norm_act(
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
    if backend(x.device) == "triton" and num_groups == 1 and torch.is_grad_enabled():
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
    if backend(x.device) == "triton" and _norm_pool.supports(x, norm):
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


def global_average(x: Tensor) -> Tensor:
    """The mean over each channel's pixels, ``x.mean(dim=(2, 3))``.

    On a GPU x's gradient is written in x's memory format; the gradient's bits are PyTorch's.
    Differentiable as often as wanted.

    Args:
        x: (N, C, H, W) of a floating dtype.

    Returns:
        (N, C) of x's dtype.

    Source: Lin et al. 2014, section 3.2.
    """
    is_ours = "global-average" in FAST_PATHS and backend(x.device) == "triton"
    function = _global_average.global_average if is_ours else _global_average.global_average_ref
    y: Tensor = function(x)
    return y


def lalr_table(params: Sequence[Tensor], exempt: bool) -> _lalr.Table | None:
    """What `lalr_` needs beside tensors where kernels do it; None where the reference does.

    Args:
        params: Tensors of one parameter group, as they lie in memory while they train.
        exempt: Whether vectors and scalars among them have ratio 1.
    """
    device = params[0].device
    if backend(device) == "triton" and all(
        p.dtype is torch.float32 and p.device == device for p in params
    ):
        return _lalr.Table(params, exempt)
    return None


def lalr_(
    table: _lalr.Table | None,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta: float,
    weight_decay: float,
    min_norm: float,
    max_norm: float,
    exempt: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One update with layer-wise adaptive rates, in place, of many tensors at once.

    For each tensor theta with a gradient g: ``m <- beta m + (1 - beta) g``, ``v <- 0.999 v + 0.001
    g^2``, ``u = m / (sqrt(v) + 1e-6) + weight_decay theta``, ``theta <- theta - lr ratio u`` with
    ``ratio = clip(|theta|_2, min_norm, max_norm) / |u|_2``, and 1 where either is 0. Nothing is
    corrected for m and v starting at 0. The host never waits for a GPU.

    Args:
        table: Of these parameters, from `lalr_table`.
        params: theta, dense in memory; updated.
        grads: g, copied unless in their parameter's order; None leaves a parameter as it is.
        exp_avgs: m, in the parameters' order; updated. exp_avg_sqs: v, likewise.
        lr: Learning rate; a () float32 tensor on the device for CUDA graphs.
        beta: Decay of m.
        weight_decay: Coefficient of theta in u.
        min_norm: c_l. max_norm: c_u.
        exempt: Whether the ratio of vectors and scalars is 1; as the table was made.
        grad_scale: () float32, what the gradients were multiplied by. Kernels only.
        found_inf: () float32; unless 0, nothing is updated. Kernels only.

    Source: Zhang et al., UAI 2022, Algorithm 1, as its authors' optimizer computes it.
    """
    tensors = (params, grads, exp_avgs, exp_avg_sqs)
    numbers = {"lr": lr, "beta": beta, "weight_decay": weight_decay}
    numbers |= {"min_norm": min_norm, "max_norm": max_norm}
    if table is not None:
        _lalr.lalr_(table, *tensors, **numbers, grad_scale=grad_scale, found_inf=found_inf)
    else:
        _lalr.lalr_ref_(*tensors, **numbers, exempt=exempt)


def sgd_table(params: Sequence[Tensor]) -> _sgd.Table | None:
    """What `sgd_` needs beside tensors where a kernel does it; None where the reference does.

    Args:
        params: Tensors of one parameter group, as they lie in memory while they train.
    """
    device = params[0].device
    if backend(device) == "triton" and all(
        p.dtype is torch.float32 and p.device == device for p in params
    ):
        return _sgd.Table(params)
    return None


def sgd_(
    table: _sgd.Table | None,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momentum_buffers: Sequence[Tensor | None],
    copies: Sequence[Tensor | None],
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One update of SGD with momentum, in place, of many tensors and their half-precision copies.

    For each tensor w with a gradient g: ``v <- momentum v + (g + weight_decay w)``, ``w <- w - lr
    v``, and where it has a copy h, ``h <- w``. The host never waits for a GPU.

    Args:
        table: Of these parameters, from `sgd_table`.
        params: w, dense in memory; updated.
        grads: g, of w's dtype, or those of all tensors with a copy of the copies'; copied unless
            in their parameter's order; None leaves a parameter and its copy as they are.
        momentum_buffers: v, in the parameters' order; updated. None for all without momentum.
        copies: h in bfloat16 or float16, all alike, in the parameters' order; updated. None where
            there is none.
        lr: Learning rate; a () float32 tensor on the device for CUDA graphs.
        momentum: Of v.
        weight_decay: Coefficient of w in the gradient.
        grad_scale: () float32, what the gradients were multiplied by.
        found_inf: () float32; unless 0, nothing is updated.

    Raises:
        RuntimeError: from the kernel, of gradients or copies of another dtype.

    Source: Sutskever et al. 2013, as `torch.optim.SGD` computes it.
    """
    tensors = (params, grads, momentum_buffers, copies)
    numbers = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    if table is not None:
        _sgd.sgd_(table, *tensors, **numbers, grad_scale=grad_scale, found_inf=found_inf)
    else:
        _sgd.sgd_ref_(*tensors, **numbers, grad_scale=grad_scale, found_inf=found_inf)


def average_table(averages: Sequence[Tensor]) -> _averaging.Table | None:
    """What `average_` needs beside tensors where a kernel does it; None where the reference does.

    Args:
        averages: Of one network's tensors, as they lie in memory.
    """
    device = averages[0].device
    if backend(device) == "triton" and all(
        a.dtype is torch.float32 and a.device == device for a in averages
    ):
        return _averaging.Table(averages)
    return None


def average_(
    table: _averaging.Table | None,
    averages: Sequence[Tensor],
    weights: Sequence[Tensor],
    share: float | Tensor,
) -> None:
    """Moves running averages towards weights, in place, of many tensors at once.

    For each average a of a weight w: ``a <- a + share (w - a)``, which is w at share 1, whatever
    finite value stood there. The host never waits for a GPU.

    Args:
        table: Of these averages, from `average_table`.
        averages: a, dense in memory; updated.
        weights: w, of their shapes and dtypes; for the kernel copied unless in their order.
        share: Of w in the average, in (0, 1]; a () float32 tensor on the device for CUDA graphs.

    Source: Polyak and Juditsky 1992, with weights that fall off exponentially.
    """
    if table is not None:
        _averaging.average_(table, averages, weights, share)
    else:
        _averaging.average_ref_(averages, weights, share)


@functools.cache
def exchange_backend(device_type: str) -> ExtensionBackend:
    """Which implementation of the exchange runs on a kind of device.

    Args:
        device_type: ``cpu`` or ``cuda``.

    Returns:
        "compiled": csrc/shuffle_exchange.cpp. "eager": `distributed.shuffle.start_eagerly`, where
        `freeadv_fast._C` was not built, or built without CUDA (env.json says why).
    """
    return _extension_backend("shuffle_exchange", device_type)


@functools.cache
def codec_backend(device_type: str) -> ExtensionBackend:
    """Which implementation of the gradients' codecs runs on a kind of device.

    Args:
        device_type: ``cpu`` or ``cuda``.

    Returns:
        "compiled": csrc/gradient_codec.cpp. "eager": the references in `distributed.codec`, where
        `freeadv_fast._C` was not built, or built without CUDA (env.json says why).
    """
    return _extension_backend("encode_gradients", device_type)


def _extension_backend(op: str, device_type: str) -> ExtensionBackend:
    """Whether `freeadv_fast._C` has an op for a kind of device."""
    try:
        import freeadv_fast._C  # noqa: F401 - loads the ops
    except ImportError:
        return "eager"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(
        f"freeadv_fast::{op}", device_type.upper()
    )
    return "compiled" if has_kernel else "eager"


def start_exchange(
    images: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup | None,
    *,
    send: list[int],
    receive: list[int],
    rank: int,
    seed: int,
    step: int,
    is_inverse: bool,
    timeout: datetime.timedelta,
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Sends images and their labels to other ranks in random order; returns at once.

    The compiled twin of `distributed.shuffle.start_eagerly`, which tells the formula and the
    errors. Only where `exchange_backend` says "compiled".

    Args:
        images: (n, ...) uint8, float16, bfloat16, float32 or float64, contiguous.
        labels: (n,) int64, on the same device.
        group: The ranks that take part; None where nothing leaves any of them.
        send: Rows to each rank. receive: Rows from each rank.
        rank: This rank. seed, step: Name the permutation. is_inverse: Whether it is undone.
        timeout: How long to wait for the others, over gloo.

    Returns:
        A function that hands over the rows that arrived; on a GPU the current stream waits for
        them, and the exchange runs on a stream of its own meanwhile.
    """
    under_way = torch.ops.freeadv_fast.shuffle_exchange(
        images,
        labels,
        group.group_name if group is not None else "",
        send,
        receive,
        rank,
        seed,
        step,
        is_inverse,
        timeout // datetime.timedelta(milliseconds=1),
    )
    wait: Callable[[], tuple[Tensor, Tensor]] = under_way.wait
    return wait


def encode_gradients(
    gradients: Tensor,
    table: Tensor,
    segments: Tensor | None,
    update: Tensor,
    seed: int,
    word: int,
    message: Tensor,
) -> None:
    """Writes levels and scales of gradients into messages; nothing waits for the device.

    The compiled twin of `distributed.codec.encode_gradients_ref`, as the next two are of theirs;
    that file tells the formula. Only where `codec_backend` says "compiled".

    Args:
        gradients: (n,) float32, contiguous.
        table: (K, 6) int32 and segments: (T + 1,) int32 or None, of `distributed.codec.Blocks`.
        update: (1,) int64, read on the device. seed, word: With it they name the random bits.
        message: (bytes,) uint8, contiguous; written where the table says.
    """
    torch.ops.freeadv_fast.encode_gradients(gradients, table, segments, update, seed, word, message)


def encode_mean(
    messages: Tensor,
    table: Tensor,
    segments: Tensor | None,
    update: Tensor,
    seed: int,
    word: int,
    message: Tensor,
) -> None:
    """Decodes messages, averages them and encodes the mean, without a tensor in between.

    Args:
        messages: (W, bytes) uint8, contiguous.
        table, segments, update, seed, word: As `encode_gradients` takes them.
        message: (bytes,) uint8, contiguous; written where the table says.
    """
    torch.ops.freeadv_fast.encode_mean(messages, table, segments, update, seed, word, message)


def decode_gradients(message: Tensor, table: Tensor, gradients: Tensor) -> None:
    """Writes the gradients that messages hold.

    Args:
        message: (bytes,) uint8, contiguous.
        table: (K, 6) int32, of `distributed.codec.Blocks`.
        gradients: (n,) float32, contiguous; overwritten where the table says.
    """
    torch.ops.freeadv_fast.decode_gradients(message, table, gradients)
