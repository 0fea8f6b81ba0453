"""Cross-entropy and the sums of a pass."""

from __future__ import annotations

from torch import Tensor

from freeadv_fast.kernels import cross_entropy as _cross_entropy
from freeadv_fast.ops import dispatch


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
        "cross-entropy" in dispatch.FAST_PATHS
        and dispatch.backend(logits.device) == "triton"
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
