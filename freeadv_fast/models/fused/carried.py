"""What a block's output brings along for those who read it next, as attributes of the tensor.

`nn.Sequential` hands on one tensor. Whoever does not look for what is on it reads the tensor as
ever: autograd sums, and a norm takes its statistics itself.
"""

from __future__ import annotations

from torch import Tensor

_SHORTCUT, _MOMENTS = "_freeadv_shortcut", "_freeadv_moments"


def with_shortcut(y: Tensor, shortcut: Tensor) -> Tensor:
    """A block's output, and on it what the shortcut of the next block is to read."""
    if shortcut is not y:  # a tensor that held itself would wait for the garbage collector
        setattr(y, _SHORTCUT, shortcut)
    return y


def shortcut_of(x: Tensor) -> Tensor:
    """What a block's shortcut reads: the alias of its input, or the input itself.

    The input itself where an in-place operation or `detach_` has moved it on, and where a hook or
    `retain_grad` waits for its gradient: apart from the alias's that is not the whole one.
    """
    alias: Tensor | None = getattr(x, _SHORTCUT, None)
    if alias is None or alias.grad_fn is not x.grad_fn or x._backward_hooks or x.retains_grad:
        return x
    return alias


def with_moments(y: Tensor, moments: Tensor) -> Tensor:
    """A block's output, and on it the (2, G, C) moments that the next norm would take."""
    if not y.is_inference():  # which has no version
        setattr(y, _MOMENTS, (moments, y._version))
    return y


def moments_of(x: Tensor, num_groups: int) -> Tensor | None:
    """A norm's input's moments where they are known of these groups, else None.

    None where an in-place operation has moved the input on.
    """
    moments, version = getattr(x, _MOMENTS, (None, None))
    if moments is None or version != x._version or moments.shape[1] != num_groups:
        return None
    assert isinstance(moments, Tensor)
    return moments
