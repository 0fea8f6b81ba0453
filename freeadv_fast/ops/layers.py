"""A network's first layer, on packed images, and its last pooling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from freeadv_fast.kernels import global_average as _global_average
from freeadv_fast.kernels import stem_convolution as _stem_convolution
from freeadv_fast.ops import dispatch


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
    if (
        "stem" in dispatch.FAST_PATHS
        and bias is None
        and dispatch.backend(packed.device) == "triton"
    ):
        is_cast = torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if is_cast else weight.dtype
        if packed.dtype == dtype and _stem_convolution.supports(packed, weight):
            y: Tensor = _stem_convolution.stem_convolution(packed, weight)
            return y
    return F.conv2d(packed, weight, bias)


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
    is_ours = "global-average" in dispatch.FAST_PATHS and dispatch.backend(x.device) == "triton"
    function = _global_average.global_average if is_ours else _global_average.global_average_ref
    y: Tensor = function(x)
    return y
