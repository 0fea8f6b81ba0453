"""GradAlign: Andriushchenko and Flammarion, NeurIPS 2020, "Understanding and Improving Fast
Adversarial Training". FGSM, and a term that keeps the loss linear within the ball:

    g1    <- gradient of the loss at x
    delta <- alpha * sign(g1)                  FGSM from the image itself, alpha = eps
    g2    <- gradient of the loss at x + eta   eta uniform in the ball, not clipped to the pixels
    theta <- theta - tau * gradient of  loss(x + delta) + lambda * (1 - cos(g1, g2))

The term's gradient passes through an input gradient, that is a second derivative of the network
(`models.double_backward`).

Where paper and authors' code differ: the text differentiates both gradients, the code g2 alone and
takes the attack's gradient for g1. The published numbers are the code's; `through="both"` is the
text. The code drops images without a gradient from the mean, which is NaN when none is left; here
they contribute nothing. All passes are in training mode, as in the code: batch norm's running
statistics move with x, x + delta and x + eta.

``--label-smoothing`` smooths the loss at x + delta alone: g1 and g2 are of the plain one, as in the
FastAT Benchmark's code (Pan and Yao 2026, fast_at/grad_align.py).

Cost: FGSM's two passes, and 1.27 times as much for the term (an input gradient of a third forward
pass, and its derivative). `every` k takes the term in every k-th update with k times the weight:
the same mean gradient for a k-th of the price. In half precision the term runs in float32: in
bfloat16 its gradient has cosine 0.875 with the true one (bench/results/cpu/gradalign-options.json).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from freeadv_fast import ops
from freeadv_fast.config.threat import ThreatModel
from freeadv_fast.methods.passes import Passes
from freeadv_fast.models.double_backward import FastDoubleBackward
from freeadv_fast.step.alignment import misalignment
from freeadv_fast.step.learner import Learner

Through = Literal["second", "both"]


class GradAlign:
    """FGSM training with gradient alignment.

    Args:
        learner: The network in training.
        threat: Radius eps and step alpha; the paper's alpha is eps.
        weight: lambda.
        every: Updates from one term to the next.
        through: Which of the two gradients is differentiated: the ``second``, or ``both``.
    """

    seeks_robustness = True

    def __init__(
        self,
        learner: Learner,
        threat: ThreatModel,
        *,
        weight: float,
        every: int = 1,
        through: Through = "second",
    ) -> None:
        """Binds the learner."""
        self.learner, self.threat = learner, threat
        self.weight, self.every, self.through = weight, every, through

    def train_minibatch(self, images: Tensor, labels: Tensor, global_size: int) -> Passes:
        """Makes one update from one minibatch.

        Args:
            images: (n, H, W, 3) uint8. labels: (n,) int64.
            global_size: Images of the minibatch over all ranks.
        """
        learner = self.learner
        has_term = learner.updates % self.every == 0
        learner.update(self.descend, images, labels, global_size, learner.attack_scale, has_term)
        return Passes(global_size, (1 + has_term) * global_size)

    def descend(
        self, images: Tensor, labels: Tensor, global_size: int, attack_scale: float, has_term: bool
    ) -> None:
        """The attack, and the update where it ends, with the term or without."""
        learner, threat = self.learner, self.threat
        delta = torch.zeros(images.shape, device=images.device)
        clean = learner.network_input(images)
        if has_term and self.through == "both":
            g1 = self.differentiable_gradient(clean, labels)
        else:
            g1 = learner.input_gradient(clean, labels)
        ops.sign_ascent_(
            delta,
            g1.detach(),
            images,
            learner.meters.nonfinite_gradients,
            step=float(threat.step.levels) * attack_scale,
            eps=float(threat.eps.levels),
        )
        x = learner.network_input(images, delta)
        loss = learner.loss(x, labels, global_size, role="adversarial")
        if has_term:
            term = self.misalignment_at(clean, labels, g1)
            loss = loss + learner.share(term, global_size, self.weight * self.every)
        learner.backward(loss)
        learner.apply_gradients()

    def misalignment_at(self, clean: Tensor, labels: Tensor, g1: Tensor) -> Tensor:
        """1 - cos(g1, g2), summed over the images; g2 at a uniform point around each.

        Both are gradients with respect to pixels, the network input's divided by std.
        """
        std = self.learner.pixels.std.view(-1, 1, 1)
        radius = float(self.threat.eps)
        eta = torch.empty_like(clean, dtype=torch.float32).uniform_(-radius, radius)
        g2 = self.differentiable_gradient(clean + eta / std, labels)
        g1 = g1.nan_to_num(0, 0, 0)  # fp16's loss scale may be too large for it
        return misalignment(g1 / std, g2 / std).sum()

    def differentiable_gradient(self, x: Tensor, labels: Tensor) -> Tensor:
        """Gradient of the summed cross-entropy at network input `x`, to be differentiated again.

        In float32 whatever the precision of training. Through the network inside data
        parallelism: the update's only backward pass then finds every weight once.
        """
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()
        with (
            torch.autocast(x.device.type, enabled=False),
            sdpa_kernel(SDPBackend.MATH),  # fused attention has no second derivative
            FastDoubleBackward(),
        ):
            loss_sum = F.cross_entropy(self.learner.module(x), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss_sum, x, create_graph=True)
        return gradient

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing outlives a minibatch."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to continue from."""
