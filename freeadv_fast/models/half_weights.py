"""Float32 weights of which layers read copies in half precision.

Under autocast every pass rounds each weight to half precision and casts its gradient back to
float32: 112 launches for ResNet-50, 0.33 of the 33 ms of a free pass on an H200 at batch 256
(bench/results/h200/profile-free-captured.json). Here a weight keeps a copy in half precision that
the optimizer's kernel writes along with it (`step.sgd.MasterSgd`), layers read that copy, and where
gradients are not added up (over ranks, parts of a minibatch, passes) they stay as they were made:
`weight.grad` is in half precision, too (`Tensor.grad_dtype`). What a layer computes is the same to
the last bit.

The weight stays the float32 parameter that it was: in state dicts, for weight decay, in
evaluation, for whoever reads it outside of autocast, or in a layer that knows no copies.

A copy is never out of date: whoever reads it compares the weight's version and address with those
that it was made of, and makes it anew where they differ; a recording compares nothing, so that
`refresh_copies` runs before one is launched. What changes a weight through ``.data``
leaves no version, and has to change its copy as well: in this package `step.trial`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freeadv_fast.models.twins import twin_of

# On a weight: its `HalfCopy`. An attribute, for all trees of modules share the parameters, and
# neither state dicts nor deep copies take attributes along.
_COPY = "_freeadv_half_copy"


@dataclasses.dataclass(slots=True)
class HalfCopy:
    """A weight in half precision.

    Attributes:
        tensor: In the weight's shape and order of memory, without a gradient.
        made_of: Version and address of the weight that it holds; None before it was first read.
    """

    tensor: Tensor
    made_of: tuple[int, int] | None = None

    def refresh(self, weight: Tensor) -> None:
        """Rounds the weight anew, if anyone but the optimizer has changed it."""
        if self.made_of != state_of(weight):
            with torch.no_grad():
                self.tensor.copy_(weight)
            self.made_of = state_of(weight)


def state_of(weight: Tensor) -> tuple[int, int]:
    """What tells whether a weight has changed: its version, and its address."""
    return weight._version, weight.data_ptr()


def half_copy(weight: Tensor) -> HalfCopy | None:
    """The copy that a weight has; None for none."""
    copy: HalfCopy | None = getattr(weight, _COPY, None)
    return copy


def refresh_copies(parameters: Iterable[Tensor]) -> None:
    """Makes the copies of some weights what the weights are."""
    for weight in parameters:
        copy = half_copy(weight)
        if copy is not None:
            copy.refresh(weight)


def drop_half_weights(model: nn.Module) -> None:
    """Takes the copies from a network, in place: its gradients are float32 from now on."""
    for weight in model.parameters():
        if half_copy(weight) is not None:
            weight.grad = None  # torch changes no grad_dtype under a gradient
            weight.grad_dtype = weight.dtype
            delattr(weight, _COPY)


def weight_for(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as a product in `dtype` reads it, with the way of the gradient back to it.

    Args:
        weight: A parameter.
        dtype: Of the product.

    Returns:
        Its copy where it has one of that type, which costs no launch, as its gradient does where
        that is kept in `dtype`. Else ``weight.to(dtype)``, as autocast would cast it. In the
        weight's shape and order of memory; not to be changed in place.
    """
    copy = half_copy(weight)
    if copy is None or copy.tensor.dtype is not dtype:
        return weight.to(dtype)
    copy.refresh(weight)
    read: Tensor = _ReadCopy.apply(weight, copy.tensor)  # type: ignore[no-untyped-call]
    return read


class _ReadCopy(torch.autograd.Function):
    """The copy in place of the weight; the gradient as it comes."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        """The copy's memory."""
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Not cast: a second derivative runs through it as well."""
        return grads[0], None


def under_autocast(weight: Tensor) -> Tensor:
    """A weight as a layer hands it to an operation that autocast casts for."""
    device = weight.device.type
    if half_copy(weight) is None or not torch.is_autocast_enabled(device):
        return weight
    return weight_for(weight, torch.get_autocast_dtype(device))


class HalfWeightConv2d(nn.Conv2d):
    """`nn.Conv2d` that reads its parameters' copies under autocast."""

    reads_half_weights = True

    def forward(self, input: Tensor) -> Tensor:
        """What `nn.Conv2d` computes."""
        bias = None if self.bias is None else under_autocast(self.bias)
        output: Tensor = self._conv_forward(input, under_autocast(self.weight), bias)
        return output


class HalfWeightLinear(nn.Linear):
    """`nn.Linear` that reads its parameters' copies under autocast."""

    reads_half_weights = True

    def forward(self, input: Tensor) -> Tensor:
        """What `nn.Linear` computes."""
        bias = None if self.bias is None else under_autocast(self.bias)
        return F.linear(input, under_autocast(self.weight), bias)


_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: HalfWeightConv2d,
    nn.Linear: HalfWeightLinear,
}


def use_half_weights(
    model: nn.Module, dtype: torch.dtype, *, has_half_gradients: bool = True
) -> int:
    """Gives the weights of convolutions and linear layers copies, in place.

    To be called last of what replaces layers, before the optimizer is built (which has to write the
    copies) and before anything builds trees. It knows `nn.Conv2d` and `nn.Linear` themselves, not
    their subclasses, and classes that say ``reads_half_weights = True``: their `forward` reads
    their own parameters through `weight_for`.

    Args:
        model: The network, on the device where it trains; its parameters stay the same objects.
        dtype: bfloat16 or float16, that of autocast.
        has_half_gradients: Whether the gradients of such weights are kept in `dtype`, and not cast
            to float32, in which data parallelism and several backward passes add them up.

    Returns:
        How many parameters have a copy now.
    """
    twins: dict[nn.Module, nn.Module] = {}  # a layer may stand at several places
    for parent in list(model.modules()):
        for name, layer in parent._modules.items():
            if layer is not None and type(layer) in _TWINS and "forward" not in layer.__dict__:
                if layer not in twins:
                    twins[layer] = twin_of(layer, _TWINS[type(layer)])
                parent._modules[name] = twins[layer]
    readers = [layer for layer in model.modules() if getattr(layer, "reads_half_weights", False)]
    parameters = {p for layer in readers for p in layer.parameters(recurse=False)}
    copied = [parameter for parameter in parameters if _add_copy(parameter, dtype)]
    for parameter in copied:
        parameter.grad_dtype = dtype if has_half_gradients else parameter.dtype
    return len(copied)


def _add_copy(weight: nn.Parameter, dtype: torch.dtype) -> bool:
    """Gives a weight its copy, if it trains in float32 and fills its memory from end to end."""
    if weight.dtype is not torch.float32 or not weight.requires_grad:
        return False
    tensor = torch.empty_like(weight, dtype=dtype, requires_grad=False)
    if tensor.stride() != weight.stride():  # there are gaps
        return False
    setattr(weight, _COPY, HalfCopy(tensor))
    return True
