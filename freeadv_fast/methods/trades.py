"""TRADES: Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy",
ICML 2019, Algorithm 1; and free-TRADES, its replayed form.

    loss = CE(f(x), y) + beta * KL(p(x) || p(x + delta)),    p = softmax of the logits f

``--label-smoothing`` smooths the cross-entropy; the divergence knows no labels.

Attacks ascend the same divergence, without the labels: K steps from normal noise of 0.001 of the
pixel range. At delta = 0 the divergence has its minimum and its gradient is zero. Gradients of the
training loss reach the weights through both p(x) and p(x + delta); attacks hold p(x) fixed.

As in the authors' code, attacks run in eval mode: they read batch norm's running statistics and
move none. The training passes are in training mode, clean and adversarial images apart. Where we
differ from that code:
- It runs the clean images twice in training mode, once for either term, so that running statistics
  move three times an update; here once for both terms, and they move twice.
- It recomputes p(x) in every attack step; here it is computed once.
- Its L2 attack steps in a random direction where the gradient is zero; here such an image waits.
- Its noise may leave the pixel range; here it is clipped.

Presets, in the units of that code: CIFAR-10 eps 0.031, step 0.007, K = 10, beta = 6; in L2 its step
is 2 eps / K.

Free-TRADES is not in the paper. It gives TRADES what "Adversarial Training for Free!" gives Madry's
training: each minibatch is replayed m times, one backward pass of the loss yields the weights'
gradient and delta's, and delta carries over to the next minibatch, row i with batch slot i. It
starts as one step in random directions: at delta = 0 the gradient is zero, and the sign of what is
computed is that of rounding errors. The ascent goes through the training pass, hence with batch
statistics.

With ``--awp`` TRADES takes the weights' gradient where they have moved up its loss, as TRADES-AWP
does (`step.weight_perturbation`).

Cost: TRADES 2 + K passes, of which K compute the input's gradient alone, and a forward pass: about
2.3 + 0.6 K steps of natural training; with ``--awp`` two more. Free-TRADES: two passes a replay,
twice free training.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from freeadv_fast.config.threat import AnyThreatModel, ThreatModel, clip_to_pixels_
from freeadv_fast.methods.passes import Passes
from freeadv_fast.step.learner import Learner
from freeadv_fast.step.weight_perturbation import WeightPerturbation

START_LEVELS = 0.001 * 255
"""Standard deviation of the attack's start, in grey levels."""


def divergence(clean_logits: Tensor, adversarial_logits: Tensor) -> Tensor:
    """KL(p(x) || p(x + delta)), summed over the images.

    Args:
        clean_logits: (n, classes) at x. adversarial_logits: (n, classes) at x + delta.
    """
    log_p, log_q = clean_logits.log_softmax(1), adversarial_logits.log_softmax(1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def trades_loss(
    learner: Learner, clean: Tensor, x: Tensor, labels: Tensor, global_size: int, beta: float
) -> Tensor:
    """CE(f(x), y) + beta * KL(p(x) || p(x + delta)): this rank's sum over the global size.

    Args:
        learner: The network in training.
        clean: (n, 3, H, W) network input at x. x: (n, 3, H, W) network input at x + delta.
        labels: (n,) int64.
        global_size: Images of the minibatch over all ranks.
        beta: Weight of the second term.
    """
    clean_logits, adversarial_logits = learner.forward(clean), learner.forward(x)
    natural = learner.loss_sum(clean_logits, labels, role="clean")
    learner.loss_sum(adversarial_logits.detach(), labels, role="adversarial")  # for the log
    robust = divergence(clean_logits, adversarial_logits)
    return learner.share(natural + beta * robust, global_size)


class Trades:
    """Algorithm 1 of the paper, one minibatch at a time.

    Args:
        learner: The network in training.
        threat: The ball of radius eps, L-infinity or L2, and the attack's step.
        attack_steps: K.
        beta: 1/lambda of the paper: 6 for robustness, 1 for accuracy.
        awp: gamma of the weights' perturbation; 0 for none.
    """

    seeks_robustness = True

    def __init__(
        self,
        learner: Learner,
        threat: AnyThreatModel,
        *,
        attack_steps: int = 10,
        beta: float = 6.0,
        awp: float = 0.0,
    ) -> None:
        """Binds the learner."""
        self.learner, self.threat = learner, threat
        self.attack_steps, self.beta = attack_steps, beta
        self.awp = WeightPerturbation(learner, awp)

    def train_minibatch(self, images: Tensor, labels: Tensor, global_size: int) -> Passes:
        """Makes one update from one minibatch.

        Args:
            images: (n, H, W, 3) uint8. labels: (n,) int64.
            global_size: Images of the minibatch over all ranks.
        """
        self.learner.update(self.descend, images, labels, global_size)
        return Passes(2 * global_size, (self.attack_steps + 2 * self.awp.passes) * global_size)

    def descend(self, images: Tensor, labels: Tensor, global_size: int) -> None:
        """The attack, and the update where it ends."""
        learner = self.learner
        clean = learner.network_input(images)
        x = learner.network_input(images, self.attack(images, clean))
        loss = functools.partial(trades_loss, learner, clean, x, labels, global_size, self.beta)
        with self.awp.up(loss):
            learner.backward(loss())
        learner.apply_gradients()

    def attack(self, images: Tensor, clean: Tensor) -> Tensor:
        """The perturbation after K steps, (n, H, W, 3) float32 in grey levels."""
        learner = self.learner
        with torch.no_grad():
            clean_logits = learner.forward(clean, evaluating=True)
        delta = torch.randn(images.shape, device=images.device).mul_(START_LEVELS)
        clip_to_pixels_(delta, images)
        for _ in range(self.attack_steps):
            x = learner.network_input(images, delta).requires_grad_()
            kl = divergence(clean_logits, learner.forward(x, evaluating=True))
            # The mean, as in the training loss, to whose size fp16's loss scale is fitted.
            (gradient,) = torch.autograd.grad(learner.scaler.scale(kl / len(x)), x)
            learner.ascend_(delta, gradient, images, self.threat)
        return delta

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing outlives a minibatch."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to continue from."""


class FreeTrades:
    """TRADES on replayed minibatches, with the ascent from the training pass.

    Args:
        learner: The network in training.
        threat: Radius eps and step size of the perturbation; free training's step is eps.
        m: Replays of each minibatch.
        beta: Weight of the divergence.
        minibatch_shape: (N, H, W, 3) of a full minibatch on this rank, all parts of an update.
        device: Where training runs.
    """

    seeks_robustness = True

    def __init__(
        self,
        learner: Learner,
        threat: ThreatModel,
        *,
        m: int,
        beta: float = 6.0,
        minibatch_shape: tuple[int, int, int, int],
        device: torch.device,
    ) -> None:
        """Starts with one step in a random direction, drawn from torch's global generator."""
        self.learner, self.m, self.beta = learner, m, beta
        self.eps = float(threat.eps.levels)
        self.step_size = float(threat.step.levels)
        self.unit = threat.delta_unit
        self.delta = threat.zero_delta(minibatch_shape, device)
        first_step = min(self.step_size, self.eps) / self.unit
        signs = torch.randint(0, 2, minibatch_shape, device=device).mul_(2).sub_(1)
        self.delta.copy_(signs * first_step)

    def train_minibatch(self, images: Tensor, labels: Tensor, global_size: int) -> Passes:
        """Replays one minibatch m times; delta carries over to the next one.

        Args:
            images: (n, H, W, 3) uint8, n at most N. labels: (n,) int64.
            global_size: Images of the minibatch over all ranks.
        """
        learner, delta = self.learner, self.delta[: len(images)]
        clean = learner.network_input(images)
        x = learner.network_input(images, delta, self.unit).requires_grad_()
        for _ in range(self.m):
            learner.update(self.replay, x, clean, images, labels, global_size)
        return Passes(2 * self.m * global_size)

    def replay(
        self, x: Tensor, clean: Tensor, images: Tensor, labels: Tensor, global_size: int
    ) -> None:
        """Updates the weights, delta, and `x`, which becomes the next replay's.

        Args:
            x: (n, 3, H, W) network input at images + delta, a leaf. clean: The same at the images.
            images: (n, H, W, 3) uint8. labels: (n,) int64.
            global_size: Images of the minibatch over all ranks.
        """
        learner = self.learner
        delta = self.delta[learner.slots(images)]
        loss = trades_loss(learner, clean, x, labels, global_size, self.beta)
        learner.backward(loss)  # one pass: g_theta and g_adv
        learner.ascend_to_next_input_(
            delta, x, images, step=self.step_size, eps=self.eps, unit=self.unit
        )
        learner.apply_gradients()

    def state_dict(self) -> dict[str, Tensor]:
        """The perturbation, (N, H, W, 3)."""
        return {"delta": self.delta}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continues with a saved perturbation."""
        self.delta.copy_(state["delta"])
