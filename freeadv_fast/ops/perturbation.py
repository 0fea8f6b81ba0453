"""The network's input at images + delta, and delta's step up the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from freeadv_fast.kernels import ascend_normalize as _ascend_normalize
from freeadv_fast.kernels import perturb_normalize as _perturb_normalize
from freeadv_fast.kernels import sign_ascent as _sign_ascent
from freeadv_fast.ops import dispatch


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
    if dispatch.backend(images.device) == "triton":
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
    if dispatch.backend(delta.device) == "triton":
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
    if dispatch.backend(delta.device) == "triton":
        _ascend_normalize.ascend_normalize_(*inputs, step=step, eps=eps, unit=unit)
    else:
        _ascend_normalize.ascend_normalize_ref_(*inputs, step, eps, unit)
