"""Second derivatives through the input's gradient, with the kernels of ordinary training.

A loss on an input gradient (GradAlign's) is differentiated twice: for the input, then for the
weights. PyTorch can do that through any layer and pays for generality. Its second derivative of
batch norm is a chain of elementwise passes (83 ms at 32x64x32x32 channels_last on one core, where
a 3x3 convolution takes 21 ms and ours 3 ms); that of a convolution's input gradient is a
convolution with the image for a kernel (44 ms, ours 24 ms); that of ReLU adds a tensor of zeros.
While a `FastDoubleBackward` is open, calls of `nn.functional` are taken over:

    with FastDoubleBackward():
        loss = criterion(model(x), labels)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    loss_on(gradient).backward()

The network itself is untouched: its keys, buffers, wrappers and layer classes stay, and ghost
batch norm, torchvision's and timm's layers are taken over as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode


class FastDoubleBackward(TorchFunctionMode):
    """Context in which a forward pass prepares for a fast derivative of its input gradient.

    `F.conv2d`, `F.relu` and training-mode `F.batch_norm` compute what they always do, running
    statistics to the last bit on a CPU. A first backward pass with ``create_graph=True`` yields
    gradients of activations only; weights get theirs in the pass after it, or in an ordinary
    backward pass. (Asked for a weight's gradient with ``create_graph=True``, `torch.autograd.grad`
    raises; no third derivative exists.) Batch norm in half precision computes in float32;
    autocast is respected. Anything else, eval-mode batch norm included, is left to PyTorch, which
    differentiates it as often as one likes.

    Only the forward pass needs the context. `torch.compile` does not see through it.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls our layer where there is one."""
        return _LAYERS.get(func, func)(*args, **(kwargs or {}))


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """`F.conv2d` whose input gradient has a fast derivative; arguments and result are the same."""
    if isinstance(padding, str) or input.dim() != 4:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight = input.to(dtype), weight.to(dtype)
    geometry = _Geometry(_pair(stride), _pair(padding), _pair(dilation), groups)
    output: Tensor = _apply(_Convolution, input, weight, geometry)
    return output if bias is None else output + bias.to(output.dtype).view(-1, 1, 1)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """`F.relu` whose gradient's derivative is one pass; arguments and result are the same."""
    output: Tensor = _apply(_ReLU, input, inplace)
    return output


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm` whose input gradient has an analytic derivative in training mode.

    Arguments, result and the update of the running statistics are the same. A half-precision
    input is normalised in float32 and the result rounded once.

    Raises:
        ValueError: a channel holds a single value, as from `F.batch_norm`.
    """
    if not training or input.numel() == input.size(1):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    output: Tensor = _apply(_BatchNorm, x, weight, bias, running_mean, running_var, momentum, eps)
    return output.to(input.dtype)


_LAYERS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.conv2d: conv2d,
    F.relu: relu,
    F.batch_norm: batch_norm,
}


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply`, to which torch gives no types."""
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


def _pair(value: int | Sequence[int]) -> tuple[int, ...]:
    """An option of `F.conv2d` for both axes."""
    return (value, value) if isinstance(value, int) else tuple(value)


class _Geometry(NamedTuple):
    """How a convolution's kernel walks, and the two linear maps that transpose it."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """(N, I, H, W) and (O, I/groups, K, L) to (N, O, H', W')."""
        return F.conv2d(x, weight, None, *self)

    def input_gradient(self, g: Tensor, like: Tensor, weight: Tensor) -> Tensor:
        """The transpose in x: (N, O, H', W') to the shape and layout of `like`."""
        return self._backward(g, like, weight, (True, False, False))[0]

    def weight_gradient(self, g: Tensor, x: Tensor, like: Tensor) -> Tensor:
        """The transpose in the weight: (N, O, H', W') to the shape of `like`."""
        return self._backward(g, x, like, (False, True, False))[1]

    def _backward(
        self, g: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Training's own kernels; of x or weight, values are read for the other's gradient only."""
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            g, x, weight, None, *self[:3], False, (0, 0), self.groups, wanted
        )
        return gradients


class _Convolution(torch.autograd.Function):
    """y = weight * x, linear in each: derivatives are convolutions and their transposes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return geometry.convolve(x, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        gx = _apply(_InputGradient, g, weight, x.detach(), ctx.geometry) if needs_x else None
        # Autograd does not tell a Function which gradients this pass asks for.
        if torch.is_grad_enabled() or not needs_weight:
            return gx, None, None
        return gx, ctx.geometry.weight_gradient(g, x, weight), None


class _InputGradient(torch.autograd.Function):
    """The convolution's input gradient, linear in the output's gradient g and in the weight."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, weight: Tensor, like: Tensor, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(g, weight)
        ctx.geometry = geometry
        return geometry.input_gradient(g, like, weight)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        g, weight = ctx.saved_tensors
        needs_g, needs_weight, *_ = ctx.needs_input_grad
        gg = ctx.geometry.convolve(u, weight) if needs_g else None
        g_weight = ctx.geometry.weight_gradient(g, u, weight) if needs_weight else None
        return gg, g_weight, None, None


class _ReLU(torch.autograd.Function):
    """y = max(x, 0). Its slope, y > 0, is constant wherever it has a derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        y = x.relu_() if inplace else x.relu()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return _apply(_Slope, g, y.detach()), None


class _Slope(torch.autograd.Function):
    """g where y > 0, else 0: its own transpose."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return torch.ops.aten.threshold_backward(g, y, 0)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(u, y, 0), None


class _BatchNorm(torch.autograd.Function):
    """y = weight * (x - mean) * s + bias with the minibatch's mean and s = 1 / std."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        y, mean, s = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, momentum, eps
        )
        ctx.save_for_backward(x, weight, mean, s)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, s = ctx.saved_tensors
        gx, g_weight, g_bias = _apply(_BatchNormInputGradient, g, x, weight, mean, s)
        _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled() or not needs_weight:
            g_weight = None
        if torch.is_grad_enabled() or not needs_bias:
            g_bias = None
        return gx, g_weight, g_bias, None, None, None, None


class _BatchNormInputGradient(torch.autograd.Function):
    """Batch norm's input gradient and the two sums over a channel that it is made of.

    With xhat = (x - mean) s and <.> the mean over a channel's values,

        gx = weight s (g - <g> - xhat <g xhat>).

    This map of g is symmetric: applied to u, the gradient of gx, it yields that of g. The rest
    follows from phi = sum(u gx) through xhat and through ds/dx = -s^2 xhat / count:

        dphi/dx = -weight s^2 (a (u - <u>) + b (g - <g>) + xhat (<u g> - <u> <g> - 3 a b)),
        dphi/dweight = count s (<u g> - <u> <g> - a b),    a = <g xhat>, b = <u xhat>.
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        gx, g_xhat, g_sum = _native_backward(g, x, weight, mean, s)
        ctx.save_for_backward(g, x, weight, mean, s, g_xhat, g_sum)
        ctx.mark_non_differentiable(g_xhat, g_sum)
        return gx, g_xhat, g_sum

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, u: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        g, x, weight, mean, s, g_xhat, g_sum = ctx.saved_tensors
        count = x.numel() // len(s)
        gg, u_xhat, u_sum = _native_backward(u, x, weight, mean, s)
        a, b = g_xhat / count, u_xhat / count
        covariance = _channel_dot(u, g) / count - u_sum / count * g_sum / count
        scale = s if weight is None else weight * s
        # dphi/dx = of_u u + of_g g + of_x x + constant, with xhat written out.
        of_u, of_g = -scale * s * a, -scale * s * b
        of_x = -scale * s * s * (covariance - 3 * a * b)
        constant = -(of_u * u_sum / count + of_g * g_sum / count + of_x * mean)
        of_u, of_g, of_x, constant = (v.view(-1, 1, 1) for v in (of_u, of_g, of_x, constant))
        phi_x = torch.addcmul(constant, u, of_u).addcmul_(g, of_g).addcmul_(x, of_x)
        phi_weight = None if weight is None else count * s * (covariance - a * b)
        return gg, phi_x, phi_weight, None, None


def _native_backward(
    g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, s: Tensor, *, wants_gx: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's kernel: the input gradient, and a channel's sums of g xhat and of g.

    On CUDA it returns these sums, in the weight's shape and dtype, only where there is a weight.
    """
    weight = torch.ones_like(s) if weight is None else weight
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        g, x, weight, None, None, mean, s, True, 0.0, (wants_gx, True, True)
    )
    return gradients


def _channel_dot(u: Tensor, g: Tensor) -> Tensor:
    """Each channel's sum of u g, (N, C, H, W) to (C,): one pass and no temporary.

    It is batch norm's sum of u xhat where xhat is g itself: mean 0 and deviation 1.
    """
    zeros = u.new_zeros(u.size(1))
    ones = torch.ones_like(zeros)
    return _native_backward(u, g, ones, zeros, ones, wants_gx=False)[1]
