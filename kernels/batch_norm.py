"""Batch norm (+ residual) (+ ReLU or leaky ReLU) of NHWC activations, forward and backward.

Activations are rows of a matrix [M, C] with M = N*H*W; every channel is a column.

    mean, var  of each column, over the rows of its group of images
    z  = a * x + b (+ residual)          a = weight / sqrt(var + eps), b = bias - mean * a
    y  = z where not z <= 0, else s * z  s = 0: ReLU; s > 0: leaky ReLU; without either y = z
    dz = dy where not z <= 0, else s * dy          dresidual = dz
    dbias   = sum(dz),  dweight = sum(dz * (x - mean)) * rstd          rstd = 1 / sqrt(var + eps)
    dx = a * dz + k1 * x + k2            k1 = -a * rstd * dweight / M
                                         k2 = -a * dbias / M - k1 * mean

In eval mode mean and var are the running ones, and dx = a * dz. Groups (ghost batch norm) are
consecutive images with statistics of their own.

Fused, two kernels each way: forward (1) statistics, a and b (batch_norm_statistics.py), (2) y
(batch_norm_forward.py); backward (3) dz, the two sums, k1 and k2, (4) dx (batch_norm_backward.py).
Where a block's sum has taken x's moments (block_sum.py), (2) makes a and b, and there is no (1).
(1) and (3) start at the last rows, (2) and (4) at the first ones, which are then still in the L2
cache. ReLU's mask is recomputed from x, which backward reads anyway; with a residual it is kept as
1 bit per element. y is never kept for backward.

Bytes per element, 16-bit activations, forward + backward (residual's gradient included):

    BN + add + ReLU   8.125 + 12.125    eager, add and ReLU apart   16 + 16
      read twice      8.125 + 14.125    eager, and a sum            16 + 22
    BN + ReLU         6     + 10        eager, ReLU apart           10 + 16
      read twice      6     + 14        eager, and a sum            10 + 22
      x read twice    6     + 12        eager, and a sum            10 + 22
      x's moments     4     + 10        eager, ReLU apart           10 + 16
    BN                6     + 10        eager                        6 + 10

The output of a residual block has two readers, the next block and its shortcut, whose gradients
autograd would sum in a kernel of its own: two reads and a write. With `fork` there is an output for
each, one and the same tensor in memory, and (3) reads both gradients and sums them; so does (4)
where (3) has not written dz. Both live until (4) is done, where there was their sum: one tensor
more while this backward runs.

A block that normalises first has an input with two readers, its first norm and its shortcut.
`shared_norm_act` hands the input on to the second as an alias, and (4) adds that one's gradient to
dx before the one rounding: a read more, where autograd's sum would be two reads and a write.

Numerics: float32 throughout; results are rounded once, except that dx behind a residual follows
from the rounded dz, which only leaky ReLU's s * dy notices. NaN passes the ReLU, both ways, as in
PyTorch, whose leaky ReLU, unlike this one, scales NaN's gradient. Results are the same in every
run: programs add in a fixed order whichever of them comes last.

Sources: Ioffe & Szegedy, "Batch Normalization", 2015; Hoffer et al., "Train longer, generalize
better", 2017 (ghost batch norm).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from freeadv_fast.kernels.batch_norm_backward import backward
from freeadv_fast.kernels.batch_norm_forward import Mode, forward
from freeadv_fast.kernels.batch_norm_statistics import Norm


def check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    num_groups: int,
    residual: Tensor | None,
    negative_slope: float,
) -> None:
    """Refuses inputs that the formula is not defined for.

    Raises:
        RuntimeError: shows what disagrees.
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise RuntimeError(f"x: expected float (N, C, H, W), got {x.dtype} {tuple(x.shape)}")
    num, channels, height, width = x.shape
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise RuntimeError(
            f"residual {residual.dtype} {tuple(residual.shape)} and x {x.dtype} {tuple(x.shape)} "
            "differ"
        )
    if (running_mean is None) != (running_var is None):
        raise RuntimeError("running_mean and running_var: expected both or neither")
    vectors = {
        "weight": weight,
        "bias": bias,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (channels,):
            raise RuntimeError(
                f"{name}: expected ({channels},) for x {tuple(x.shape)}, got {tuple(vector.shape)}"
            )
    for name, other in {**vectors, "residual": residual}.items():
        if other is not None and other.device != x.device:
            raise RuntimeError(f"{name} is on {other.device}, x is on {x.device}")
    if not training and running_mean is None:
        raise RuntimeError("eval mode without running statistics; pass training=True")
    if training and (num_groups < 1 or num // num_groups * height * width < 2):
        raise RuntimeError(
            f"num_groups {num_groups} of x {tuple(x.shape)}: every group needs an image, and two "
            "values a channel"
        )
    if not 0 <= negative_slope < math.inf:
        raise RuntimeError(f"negative_slope: expected a finite number >= 0, got {negative_slope}")


def check_moments(moments: Tensor | None, x: Tensor, training: bool, num_groups: int) -> None:
    """Refuses moments that cannot be those of x.

    Raises:
        RuntimeError: shows what disagrees.
    """
    expected = (2, num_groups, x.shape[1])
    if moments is not None and (moments.shape != expected or not training):
        raise RuntimeError(
            f"moments of x {tuple(x.shape)}: expected {expected} in training, got "
            f"{tuple(moments.shape)} in {'training' if training else 'eval mode'}"
        )


def batch_norm_act_ref(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    num_groups: int,
    relu: bool,
    residual: Tensor | None,
    negative_slope: float = 0.0,
    fork: bool = False,
    num_batches_tracked: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification in plain PyTorch, and the path of a CPU; any memory format is kept.

    A chunk, a fused call and a concatenation are the cheapest groups on a CPU. The additions and
    the ReLU work in place: no backward pass reads what they overwrite. Both outputs of a fork are
    one object, and autograd sums their gradients.
    """
    check(
        x, weight, bias, running_mean, running_var, training, num_groups, residual, negative_slope
    )
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if training and num_groups > 1:
        y = _grouped(x, weight, bias, running_mean, running_var, momentum, eps, num_groups)
    else:
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        y += residual
    if relu and negative_slope:
        y = F.leaky_relu(y, negative_slope, inplace=True)
    elif relu:
        y = F.relu(y, inplace=True)
    return (y, y) if fork else y


def _grouped(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    num_groups: int,
) -> Tensor:
    """Each group's batch norm, and one update of the running statistics."""
    pieces = x.tensor_split(num_groups)
    if running_mean is None:
        return torch.cat(
            [F.batch_norm(piece, None, None, weight, bias, True, 0.0, eps) for piece in pieces]
        )
    # One row a group: its mean, and its unbiased variance.
    means, variances = running_mean.new_zeros((2, num_groups, x.shape[1]))
    groups = [
        F.batch_norm(piece, mean, variance, weight, bias, True, 1.0, eps)
        for piece, mean, variance in zip(pieces, means, variances, strict=True)
    ]
    for running, rows in ((running_mean, means), (running_var, variances)):
        # `data`: a forward pass in one group has saved the buffer for its backward pass, which
        # never reads it but would refuse a newer version.
        running.data.mul_(1 - momentum).add_(rows.mean(0), alpha=momentum)
    return torch.cat(groups)


class _BatchNormAct(torch.autograd.Function):
    """y, and its gradients; forked, y twice."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, norm, mode, fork, moments):
        """Keeps x, the coefficients and perhaps ReLU's bits; never y, nor the residual."""
        wants_bits = mode.relu and residual is not None
        y, coefficients, bits = forward(x, norm, residual, mode, wants_bits, moments)
        ctx.save_for_backward(x, weight, coefficients, bits)
        ctx.mode = mode
        ctx.set_materialize_grads(False)
        # Detached, it is no view to autograd, which would forbid in-place operations on both, but
        # has y's version: who saved either for its backward pass learns of such an operation.
        return (y, y.detach()) if fork else y

    @staticmethod
    def backward(ctx, *gradients):
        """Only what some input needs."""
        x, weight, coefficients, bits = ctx.saved_tensors
        wants_dx, wants_weight, wants_bias, wants_residual, *_ = ctx.needs_input_grad
        # An output that nothing reads has none.
        given = [
            g.contiguous(memory_format=torch.channels_last) for g in gradients if g is not None
        ]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        dx, dweight, dbias, dz = _Gradients.apply(
            given[0],
            given[1] if len(given) > 1 else None,
            None,
            x,
            weight,
            coefficients,
            bits,
            ctx.mode,
            wants_dx,
            wants_weight or wants_bias,
            wants_residual,
        )
        dresidual = (dz if ctx.mode.relu else given[0]) if wants_residual else None
        dweight = dweight if wants_weight else None
        return dx, dweight, dbias if wants_bias else None, dresidual, *(None,) * 4


class _SharedNormAct(torch.autograd.Function):
    """y and x, and their gradients, summed where they meet."""

    @staticmethod
    def forward(ctx, x, weight, bias, norm, mode, moments):
        """Keeps x and the coefficients."""
        y, coefficients, _ = forward(x, norm, None, mode, wants_bits=False, moments=moments)
        ctx.save_for_backward(x, weight, coefficients)
        ctx.mode = mode
        ctx.set_materialize_grads(False)
        return y, x.detach()  # no view to autograd, with x's version, as above

    @staticmethod
    def backward(ctx, dy, other_dx):
        """Only what some input needs."""
        x, weight, coefficients = ctx.saved_tensors
        wants_dx, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        if dy is None:  # nothing reads y
            return other_dx if wants_dx else None, *(None,) * 5
        if other_dx is not None:
            other_dx = other_dx.contiguous(memory_format=torch.channels_last)
        dx, dweight, dbias, _ = _Gradients.apply(
            dy.contiguous(memory_format=torch.channels_last),
            None,
            other_dx,
            x,
            weight,
            coefficients,
            None,
            ctx.mode,
            wants_dx,
            wants_weight or wants_bias,
            False,
        )
        dweight = dweight if wants_weight else None
        return dx, dweight, dbias if wants_bias else None, *(None,) * 3


class _Gradients(torch.autograd.Function):
    """`backward` as a node of its own, whose own derivative is an error that says what to do.

    `torch.autograd.function.once_differentiable` would say less.
    """

    @staticmethod
    def forward(ctx, dy, shortcut_dy, other_dx, x, weight, *arguments):
        """The weight is named only so that its second derivative is an error too."""
        return backward(dy, shortcut_dy, other_dx, x, *arguments)

    @staticmethod
    def backward(ctx, *gradients):
        """Second derivatives.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "batch_norm_act was differentiated twice, and its kernels have first derivatives only: "
            "methods with second derivatives (GradAlign) train with unfused batch norm, "
            "nn.BatchNorm2d and ReLU as layers of their own"
        )


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
    """Normalises, adds the residual and rectifies, by the kernels; differentiable once.

    Running statistics are updated behind autograd's back, as `GhostBatchNorm2d` does: a graph that
    saved them, and does not read them in training mode, stays usable.

    Args:
        x: (N, C, H, W) bfloat16, float16 or float32, C a multiple of 8; copied unless
            channels_last.
        weight: (C,) float32, contiguous; None for ones.
        bias: (C,) float32, contiguous; None for zeros.
        running_mean: (C,) float32, contiguous, updated in training; None for none.
        running_var: (C,) float32, contiguous, likewise; of unbiased variances.
        training: Whether statistics are the minibatch's, and not the running ones.
        momentum: Weight of the minibatch in the running statistics.
        eps: Added to the variance.
        num_groups: Groups of consecutive images with statistics of their own, in training.
        relu: Whether negative values are multiplied by the slope.
        residual: (N, C, H, W) of x's dtype, added before the ReLU; copied unless channels_last.
        negative_slope: 0 for ReLU, more for leaky ReLU; unused without `relu`. Every value compiles
            kernels of its own.
        fork: Whether the output is returned twice, for two readers.
        num_batches_tracked: () int64, one is added in training; None for none.
        moments: (2, G, C) float32, x's own from `block_sum`, in training; None to take them here.

    Returns:
        (N, C, H, W) of x's dtype, channels_last. With `fork` it and, behind ReLU, an alias of it:
        the same memory, whose gradient backward takes apart from the output's and adds in float32.
        Each has the gradient of its own readers only. Else, and without gradients, the same object
        twice.

    Raises:
        RuntimeError: shapes, dtypes or devices disagree, a group would hold fewer than two values
            of a channel, or the slope is negative or not finite; in backward, of a second
            derivative.

    Source: Ioffe & Szegedy 2015, algorithms 1 and 2; groups: Hoffer et al. 2017, algorithm 1.
    """
    check(
        x, weight, bias, running_mean, running_var, training, num_groups, residual, negative_slope
    )
    check_moments(moments, x, training, num_groups)
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    norm = Norm(weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps)
    mode = Mode(training, num_groups, relu, negative_slope)
    inputs = (x, weight, bias, residual)
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if not wants_grad:
        y, *_ = forward(x, norm, residual, mode, wants_bits=False, moments=moments)
        return (y, y) if fork else y
    is_split = fork and relu  # without ReLU the sum itself is the residual's gradient
    y = _BatchNormAct.apply(*inputs, norm, mode, is_split, moments)
    return (y, y) if fork and not is_split else y


def shared_norm_act(
    x: Tensor,
    norm: Norm,
    *,
    training: bool,
    num_groups: int = 1,
    negative_slope: float = 0.0,
    moments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalises and rectifies by the kernels, and hands x on; differentiable once.

    Args:
        x: (N, C, H, W) bfloat16, float16 or float32, C a multiple of 8; copied unless
            channels_last.
        norm: Of x's channels; running statistics are updated as by `batch_norm_act`.
        training: Whether statistics are the minibatch's, and not the running ones.
        num_groups: Groups of consecutive images with statistics of their own, in training.
        negative_slope: 0 for ReLU, more for leaky ReLU.
        moments: As for `batch_norm_act`.

    Returns:
        (N, C, H, W) of x's dtype, channels_last, and where x wants a gradient an alias of x: the
        same memory, whose gradient backward adds to that of the norm in float32. Each has the
        gradient of its own readers only, x that of both. Else x itself.

    Raises:
        RuntimeError: as from `batch_norm_act`.

    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks", figure 1 (b).
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        y = batch_norm_act(
            x,
            *norm[:4],
            training=training,
            momentum=norm.momentum,
            eps=norm.eps,
            num_groups=num_groups,
            negative_slope=negative_slope,
            num_batches_tracked=norm.num_batches_tracked,
            moments=moments,
        )
        assert isinstance(y, Tensor)  # not forked
        return y, x
    check(x, *norm[:4], training, num_groups, None, negative_slope)
    check_moments(moments, x, training, num_groups)
    x = x.contiguous(memory_format=torch.channels_last)
    mode = Mode(training, num_groups, True, negative_slope)
    inputs = (x, norm.weight, norm.bias)
    outputs: tuple[Tensor, Tensor] = _SharedNormAct.apply(*inputs, norm, mode, moments)
    return outputs
