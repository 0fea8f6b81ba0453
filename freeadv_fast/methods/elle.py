"""ELLE: Abad Rocamora et al., "Efficient local linearity regularization to overcome catastrophic
overfitting", ICLR 2024.

    loss = CE at x + delta + lambda * E_lin,    delta of one FGSM step
    E_lin = mean of (L((1 - a) x_a + a x_b) - (1 - a) L(x_a) - a L(x_b))^2

with x_a and x_b uniform in the ball around x, a uniform in 0..1, and L the cross-entropy of an
image: zero where the loss is linear, and a jump of E_lin announces catastrophic overfitting. It
costs no second derivative, where GradAlign's term does.

ELLE-A, the adaptive form, starts at lambda = 0. When a minibatch's E_lin exceeds the mean of all
before it by 2 standard deviations, the next minibatch has lambda_max; otherwise lambda decays by
0.99. Every rank adapts to its own minibatches: gradients are averaged anyway.

Where we differ from the authors' code: it does not clip x_a, x_b and x + delta to the pixel range,
and it calls the optimizer twice a minibatch with the same gradient. As in that code, batch norm is
in training mode throughout and the three points go through the network together, so that they share
statistics; the running ones move three times an update: in the attack, at x + delta, at the points.

Presets, CIFAR-10: ELLE-A lambda_max 4000; ELLE lambda 1000 up to eps 8/255, 5000 up to 20/255,
10000 above. The authors train in float32. E_lin is a small difference of losses, for which bfloat16
is coarse: on a small untrained network it read 2.6e-6 at 1/255 where it was 5e-9 (float16: 6e-8),
and 6.6e-6 at 8/255 where it was 3e-6.

``--label-smoothing`` smooths the first term alone: attack and E_lin keep the plain loss, as in the
FastAT Benchmark's code (Pan and Yao 2026, fast_at/elle.py).

The two terms have a backward pass each: their gradients add up, only the activations of the three
points are in memory at once, and one all-reduce serves both.

Cost: one pass for the input's gradient alone and 4 for the weights: about 4.6 steps of natural
training, and the memory of 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from freeadv_fast.config.threat import ThreatModel
from freeadv_fast.methods.fgsm import Fgsm, Start
from freeadv_fast.methods.passes import Passes
from freeadv_fast.step.learner import Learner
from freeadv_fast.step.mixing import num_hits

FEWEST = 3
"""Minibatches before a jump can be told."""


class Elle:
    """FGSM training with a penalty on the loss's local non-linearity.

    Args:
        learner: The network in training.
        threat: Radius eps, and the attack's step; the paper's is eps.
        lambda_max: Weight of E_lin: the constant one, or the one that ELLE-A jumps to.
        adaptive: Whether lambda adapts (ELLE-A).
        decay: Factor of an adaptive lambda in every minibatch without a jump.
        sensitivity: Standard deviations above the mean that make a jump.
        start: Where the attack starts: ``zero``, the paper's, or ``noisy`` for N-FGSM with ELLE.
    """

    seeks_robustness = True

    def __init__(
        self,
        learner: Learner,
        threat: ThreatModel,
        *,
        lambda_max: float = 4000.0,
        adaptive: bool = True,
        decay: float = 0.99,
        sensitivity: float = 2.0,
        start: Start = "zero",
    ) -> None:
        """Starts an adaptive lambda at 0."""
        self.learner, self.threat = learner, threat
        self.lambda_max, self.adaptive = lambda_max, adaptive
        self.decay, self.sensitivity = decay, sensitivity
        self.fgsm = Fgsm(learner, threat, start=start, smoothed=False)
        device = learner.pixels.mean.device
        self.lam = torch.tensor(0.0 if adaptive else lambda_max, device=device)
        # Of the E_lin so far: count, mean, sum of squared distances from the mean.
        self.history = torch.zeros(3, dtype=torch.float64, device=device)
        self.errors: list[Tensor] = []  # of the parts of the update in progress

    def train_minibatch(self, images: Tensor, labels: Tensor, global_size: int) -> Passes:
        """Makes one update from one minibatch.

        Args:
            images: (n, H, W, 3) uint8. labels: (n,) int64.
            global_size: Images of the minibatch over all ranks.
        """
        learner = self.learner
        learner.update(self.descend, images, labels, global_size, learner.attack_scale)
        return Passes(4 * global_size, global_size)

    def descend(
        self, images: Tensor, labels: Tensor, global_size: int, attack_scale: float
    ) -> None:
        """The attack, the gradients of both terms, the update, and the next lambda."""
        learner = self.learner
        learner.zero_grad()
        delta = self.fgsm.attack(images, labels, attack_scale)
        with learner.without_reduction():
            x = learner.network_input(images, delta)
            learner.add_gradients(learner.loss(x, labels, global_size, role="adversarial"))
        errors = self.linearity_errors(images, labels)
        learner.add_gradients(self.lam * learner.share(errors.sum(), global_size))
        if self.adaptive:
            before = [] if learner.part.is_first else self.errors
            self.errors = [*before, errors.detach()]
            if learner.part.is_last:
                self.adapt(torch.cat(self.errors).mean())
        learner.apply_gradients()

    def linearity_errors(self, images: Tensor, labels: Tensor) -> Tensor:
        """The squared error of each image, (n,) float32 or float64; differentiable."""
        learner, threat = self.learner, self.threat
        x_a = learner.network_input(images, threat.uniform_delta(images))
        x_b = learner.network_input(images, threat.uniform_delta(images))
        a = torch.rand(len(images), 1, 1, 1, dtype=x_a.dtype, device=x_a.device)
        logits = learner.forward(torch.cat([x_a, x_b, torch.lerp(x_a, x_b, a)]))
        labels = labels.repeat(3)
        losses = F.cross_entropy(logits, labels, reduction="none")
        hits = num_hits(logits.detach(), labels)
        learner.meters.add("noise", losses.detach().sum(), hits, len(logits))
        loss_a, loss_b, loss_between = losses.chunk(3)
        return (loss_between - torch.lerp(loss_a, loss_b, a.flatten().to(losses.dtype))).square()

    @torch.no_grad()
    def adapt(self, error: Tensor) -> None:
        """Sets the next minibatch's lambda; a non-finite error only lets it decay.

        Args:
            error: () E_lin of this minibatch.
        """
        count, mean, squares = self.history
        deviation = (squares / count.clamp_min(1)).sqrt()
        is_jump = (count >= FEWEST) & (error > mean + self.sensitivity * deviation)
        is_finite = error.isfinite()
        lam = self.lam * self.decay
        self.lam.copy_(lam.masked_fill(is_jump & is_finite, self.lambda_max))
        # Welford 1962: no difference of large sums.
        new_mean = mean + (error - mean) / (count + 1)
        new_squares = squares + (error - mean) * (error - new_mean)
        new = torch.stack([count + 1, new_mean, new_squares])
        self.history.copy_(torch.where(is_finite, new, self.history))

    def state_dict(self) -> dict[str, Tensor]:
        """lambda, and the history of E_lin that it adapts to."""
        return {"lambda": self.lam, "history": self.history}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continues with a saved lambda and history."""
        self.lam.copy_(state["lambda"])
        self.history.copy_(state["history"])
