"""Single-step adversarial training: FGSM, FGSM-RS and N-FGSM, which differ in where they start.

    delta <- start                             one of three, below
    g     <- gradient of the loss at x + delta
    delta <- delta + alpha * sign(g)           clipped to +-eps, but for N-FGSM
    theta <- theta - tau * gradient of the loss at x + delta

- ``zero``: FGSM, Goodfellow et al., "Explaining and Harnessing Adversarial Examples", ICLR 2015.
  alpha = eps.
- ``uniform``: FGSM-RS, Wong et al., "Fast is better than free", ICLR 2020, Algorithm 3. A uniform
  point of the ball, alpha = 1.25 eps.
- ``noisy``: N-FGSM, de Jorge et al., "Make Some Noise: Reliable and Efficient Single-Step
  Adversarial Training", NeurIPS 2022. Uniform noise of radius k eps, k = 2, alpha = eps, and no
  projection onto the ball afterwards: images move by up to (k + 1) eps.

Starts and adversarial images are clipped to the pixel range, as in the authors' code. Batch norm is
in training mode in both passes, as there: its running statistics move twice, once with the images
of the attack's start. Those codes compute the weights' gradient in the attack pass and throw it
away; here that pass computes the input's alone.

FGSM and, at larger eps, FGSM-RS suffer from catastrophic overfitting: within an epoch the network
comes to withstand single-step attacks and no others.

With ``--label-smoothing`` both passes have the smoothed loss, as in the FastAT Benchmark's code
(Pan and Yao 2026, fast_at/fgsm_rs.py, n_fgsm.py).

Cost: two forward passes, one full backward pass and one for the input alone: about 1.6 steps of
natural training.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from freeadv_fast import ops
from freeadv_fast.config.threat import Perturbation, ThreatModel
from freeadv_fast.methods.passes import Passes
from freeadv_fast.step.learner import Learner

Start = Literal["zero", "uniform", "noisy"]


class Fgsm:
    """Training on images moved by one sign step.

    Args:
        learner: The network in training.
        threat: Radius eps, and alpha as its step.
        start: Where the step starts; it decides whether the ball binds as well.
        noise: k, the radius of ``noisy`` starts in units of eps.
        smoothed: Whether the attack ascends the loss that trains weights, with smoothed labels
            where the learner smooths them, or the plain one.
    """

    seeks_robustness = True

    def __init__(
        self,
        learner: Learner,
        threat: ThreatModel,
        *,
        start: Start = "uniform",
        noise: float = 2.0,
        smoothed: bool = True,
    ) -> None:
        """Works out how far the noise and the perturbation reach."""
        self.learner, self.threat, self.start = learner, threat, start
        self.smoothed = smoothed
        self.step_size, self.reach = float(threat.step.levels), float(threat.eps.levels)
        self.noise = threat
        if start == "noisy":
            radius = Perturbation(threat.eps.levels * Fraction(noise))
            self.noise = dataclasses.replace(threat, eps=radius)
            self.reach = float(radius.levels) + self.step_size  # never binds

    def train_minibatch(self, images: Tensor, labels: Tensor, global_size: int) -> Passes:
        """Makes one update from one minibatch.

        Args:
            images: (n, H, W, 3) uint8. labels: (n,) int64.
            global_size: Images of the minibatch over all ranks.
        """
        learner = self.learner
        learner.update(self.descend, images, labels, global_size, learner.attack_scale)
        return Passes(global_size, global_size)

    def descend(
        self, images: Tensor, labels: Tensor, global_size: int, attack_scale: float
    ) -> None:
        """The attack, and the update where it ends."""
        learner = self.learner
        x = learner.network_input(images, self.attack(images, labels, attack_scale))
        learner.backward(learner.loss(x, labels, global_size, role="adversarial"))
        learner.apply_gradients()

    def attack(self, images: Tensor, labels: Tensor, attack_scale: float = 1.0) -> Tensor:
        """The perturbation after one step, (n, H, W, 3) float32 in grey levels.

        Args:
            images: (n, H, W, 3) uint8. labels: (n,) int64.
            attack_scale: Share of its full length at which the attack steps.
        """
        learner = self.learner
        if self.start == "zero":
            delta = torch.zeros(images.shape, device=images.device)
        else:
            delta = self.noise.uniform_delta(images)
        x = learner.network_input(images, delta)
        ops.sign_ascent_(
            delta,
            learner.input_gradient(x, labels, smoothed=self.smoothed),
            images,
            learner.meters.nonfinite_gradients,
            step=self.step_size * attack_scale,
            eps=self.reach,
        )
        return delta

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing outlives a minibatch."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to continue from."""
