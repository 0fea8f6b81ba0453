"""Gradient alignment: how far the loss is from linear inside the perturbation set.

Source: Andriushchenko and Flammarion, "Understanding and Improving Fast Adversarial Training",
NeurIPS 2020. Their regulariser is

    Omega = E_{(x, y), eta ~ U([-eps, eps]^d)} [1 - cos(grad_x l(x, y), grad_x l(x + eta, y))],

and training minimises l(x + delta, y) + lambda Omega with an FGSM delta.
"""

from __future__ import annotations

import torch
from torch import Tensor

# 1/|g| enters the derivative and is summed over activations in float32, which ends at 3.4e38.
SMALLEST_GRADIENT = 1e-28


def misalignment(g1: Tensor, g2: Tensor) -> Tensor:
    """``1 - cos(g1, g2)`` of each image.

    Computed as ``|g1/|g1| - g2/|g2||^2 / 2``, the same number without the cancellation of
    nearly aligned gradients, and never below 0. An image with a gradient that is zero (no
    component above `SMALLEST_GRADIENT`) contributes nothing: value 0, gradient 0. The authors'
    code takes such images out of the mean too, which is NaN when none is left.

    Args:
        g1: (n, C, H, W) finite input gradients, any floating dtype and layout. The authors' code
            detaches it, so that gradient reaches the weights through `g2` alone.
        g2: (n, C, H, W) likewise.

    Returns:
        (n,) values in [0, 2], float32, or float64 where an argument is; differentiable.
    """
    dtype = torch.promote_types(torch.promote_types(g1.dtype, g2.dtype), torch.float32)
    unit1, is_zero1 = _unit_rows(g1.to(dtype))
    unit2, is_zero2 = _unit_rows(g2.to(dtype))
    misaligned = (unit1 - unit2).square().sum(1) / 2
    return misaligned.masked_fill(is_zero1 | is_zero2, 0)


def _unit_rows(g: Tensor) -> tuple[Tensor, Tensor]:
    """Images as (n, C*H*W) rows of norm 1, constant for zero images, and which those are, (n,)."""
    rows = g.flatten(1)
    # Squares of gradients below 1e-19 underflow: the largest component becomes 1 beforehand.
    peak = rows.detach().abs().amax(1, keepdim=True)
    is_zero = peak <= SMALLEST_GRADIENT
    rows = (rows / peak.masked_fill(is_zero, 1)).masked_fill(is_zero, 1)
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True), is_zero.squeeze(1)
