"""Picks an implementation once per device, and says which; names the faster ways."""

from __future__ import annotations

import functools
import importlib.util
from typing import Literal

import torch

Backend = Literal["triton", "eager"]

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
    "block-sums",  # a pre-activation block's sum and its moments for the next norm as one
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
