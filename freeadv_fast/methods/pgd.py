"""PGD: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks".

ICLR 2018. The loss is minimised where K steps of projected gradient ascent lead:

    delta <- a uniform point of the ball, or 0
    K times:  delta <- project(delta + alpha * direction of the gradient of the loss at x + delta)
    theta <- theta - tau * gradient of the loss at x + delta

The direction is the gradient's sign in an L-infinity ball and the gradient at length 1 in an L2
ball; the projection is onto the ball, then onto the pixel range.

Batch norm is in training mode in all K + 1 passes, as in the code of Madry et al., of "Fast is
better than free" and of GradAlign: attacks see batch statistics, and the running ones move in every
pass. ("Fast is better than free" was rerun with attacks in eval mode: 44.34 % against 44.90 %.)

With ``--label-smoothing`` the weights descend the smoothed loss and attacks ascend the plain one,
as in the FastAT Benchmark's code (Pan and Yao 2026, fast_at/pgd_at.py).

Presets, in 1/255: CIFAR-10 eps 8, alpha 2, K = 7 (Madry); ImageNet eps 4, alpha 2, K = 2 ("2-PGD"
of "Adversarial Training for Free!"); K = 2 with alpha = eps/2 and K = 10 with alpha = eps/5, both
from a zero start, in GradAlign's code.

With ``--awp`` the last line's gradient is taken at weights that have moved up the loss, which is
AT-AWP (`step.weight_perturbation`).

Cost: 1 + K passes, of which K compute the input's gradient alone: about 1 + 0.6 K steps of natural
training; with ``--awp`` a step more.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

from freeadv_fast.config.threat import AnyThreatModel
from freeadv_fast.methods.passes import Passes
from freeadv_fast.step.learner import Learner
from freeadv_fast.step.weight_perturbation import WeightPerturbation

Start = Literal["zero", "uniform"]


class Pgd:
    """Training on images moved by K-step projected gradient ascent.

    Args:
        learner: The network in training.
        threat: The ball of radius eps, L-infinity or L2, and alpha as its step.
        attack_steps: K.
        start: Whether attacks start at a random point of the ball or at the image.
        awp: gamma of the weights' perturbation; 0 for none.
    """

    seeks_robustness = True

    def __init__(
        self,
        learner: Learner,
        threat: AnyThreatModel,
        *,
        attack_steps: int = 7,
        start: Start = "uniform",
        awp: float = 0.0,
    ) -> None:
        """Binds the learner."""
        self.learner, self.threat = learner, threat
        self.attack_steps, self.start = attack_steps, start
        self.awp = WeightPerturbation(learner, awp)

    def train_minibatch(self, images: Tensor, labels: Tensor, global_size: int) -> Passes:
        """Makes one update from one minibatch.

        Args:
            images: (n, H, W, 3) uint8. labels: (n,) int64.
            global_size: Images of the minibatch over all ranks.
        """
        learner = self.learner
        learner.update(self.descend, images, labels, global_size, learner.attack_scale)
        return Passes(global_size, (self.attack_steps + self.awp.passes) * global_size)

    def descend(
        self, images: Tensor, labels: Tensor, global_size: int, attack_scale: float
    ) -> None:
        """The attack, and the update where it ends."""
        learner = self.learner
        x = learner.network_input(images, self.attack(images, labels, attack_scale))
        loss = functools.partial(learner.loss, x, labels, global_size, role="adversarial")
        with self.awp.up(loss):
            learner.backward(loss())
        learner.apply_gradients()

    def attack(self, images: Tensor, labels: Tensor, attack_scale: float = 1.0) -> Tensor:
        """The perturbation after K steps, (n, H, W, 3) float32 in grey levels.

        Args:
            images: (n, H, W, 3) uint8. labels: (n,) int64.
            attack_scale: Share of their full size at which ball and step are taken.
        """
        learner, threat = self.learner, self.threat.scaled(attack_scale)
        if self.start == "uniform":
            delta = threat.uniform_delta(images)
        else:
            delta = torch.zeros(images.shape, device=images.device)
        for _ in range(self.attack_steps):
            x = learner.network_input(images, delta)
            learner.ascend_(delta, learner.input_gradient(x, labels), images, threat)
        return delta

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing outlives a minibatch."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to continue from."""
