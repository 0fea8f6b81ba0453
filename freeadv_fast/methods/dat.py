"""DAT: Zhang et al., "Distributed Adversarial Training to Robustify Deep Neural Networks at Scale".

UAI 2022. Large batches over many workers, each of which attacks its own images:

    loss = lambda * CE(f(x), y) + max over delta of phi(x, delta),    lambda = 1

What a minibatch does is here. Layer-wise rates (``--optimizer lalr``) and compressed gradients
(``--compress``) are for every method, and stand elsewhere.

DAT-PGD, this class. phi is CE(f(x + delta), y), and delta is where K steps of projected gradient
ascent lead from a uniform point of the ball. Attacks run in eval mode, as in the authors' code:
they read batch norm's running statistics and move none; ``train`` is Madry et al.'s way. The
training passes are in training mode, adversarial images first, then the clean ones, as there. Their
gradients add up, not halved: one all-reduce, one update.

DAT-FGSM, the code's ``--fast``, is FGSM-RS with a step of 1.25 eps (`fgsm.Fgsm`): training mode,
and no clean term.

Unlabelled images. Where text and code differ, both are here:
- ``pseudo-labels``, the code: CE with the label that another network gave the image, the same loss
  as of a labelled image. Nothing here knows which is which.
- ``kl``, the text: phi is the TRADES term KL(p(x) || p(x + delta)), p = softmax of the logits f,
  with gradients through both; no label is used, so that the first term is the labelled images'
  alone. Attacks ascend the same divergence from normal noise of 0.001 of the pixel range, with p(x)
  held fixed, for at delta = 0 its gradient is zero. No revision of the code has it. Unknown of the
  paper: its attack, whether lambda counts pseudo labels, and a weight of phi; here there is none.
  Labelled and unlabelled images go through the network together: batch norm sees the minibatch.

``--label-smoothing`` smooths both cross-entropies of the training loss, pseudo labels like labels;
attacks of DAT-PGD ascend the plain one.

Where we differ from the code:
- It clips to the pixel range, then to the ball; here it is the ball first. Both hold the image, so
  that one order leads to the same point as the other.
- Its start may leave the pixel range; here it is clipped.

Cost of DAT-PGD: 2 + K passes, of which K compute the input's gradient alone; for ``kl`` a forward
pass more. About 2 + 0.6 K steps of natural training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from freeadv_fast.config.choices import DatMode
from freeadv_fast.config.threat import ThreatModel, clip_to_pixels_
from freeadv_fast.methods.passes import Passes
from freeadv_fast.methods.trades import START_LEVELS
from freeadv_fast.step.learner import Learner


class Dat:
    """DAT-PGD, one minibatch at a time.

    Args:
        learner: The network in training.
        threat: Radius eps, and the attack's step.
        attack_steps: K.
        mode: Of the network in attacks.
        clean_weight: lambda.
        has_marks: Whether labels mark unlabelled images, as ``kl`` asks for; see `loader.Batch`.
    """

    seeks_robustness = True

    def __init__(
        self,
        learner: Learner,
        threat: ThreatModel,
        *,
        attack_steps: int = 10,
        mode: DatMode = "eval",
        clean_weight: float = 1.0,
        has_marks: bool = False,
    ) -> None:
        """Binds the learner."""
        self.learner, self.threat = learner, threat
        self.attack_steps, self.clean_weight = attack_steps, clean_weight
        self.is_evaluating, self.has_marks = mode == "eval", has_marks

    def train_minibatch(self, images: Tensor, labels: Tensor, global_size: int) -> Passes:
        """Makes one update from one minibatch.

        The meters count hits of unlabelled images against their pseudo labels.

        Args:
            images: (n, H, W, 3) uint8. labels: (n,) int64; ~y marks an unlabelled image.
            global_size: Images of the minibatch over all ranks.
        """
        step = self.descend_with_unlabelled if self.has_marks else self.descend
        self.learner.update(step, images, labels, global_size)
        return Passes(2 * global_size, self.attack_steps * global_size)

    def descend(self, images: Tensor, labels: Tensor, global_size: int) -> None:
        """The attack, and the update from its images and the clean ones.

        A backward pass for each, so that one of them is in memory at a time.
        """
        learner = self.learner
        x = learner.network_input(images, self.attack(images, labels))
        learner.zero_grad()
        with learner.without_reduction():
            learner.add_gradients(learner.loss(x, labels, global_size, role="adversarial"))
        clean = learner.network_input(images)
        loss = learner.loss(clean, labels, global_size, role="clean", weight=self.clean_weight)
        learner.add_gradients(loss)
        learner.apply_gradients()

    def descend_with_unlabelled(self, images: Tensor, marked: Tensor, global_size: int) -> None:
        """`descend` where labels mark unlabelled images; the divergence joins both passes."""
        learner = self.learner
        clean = learner.network_input(images)
        x = learner.network_input(images, self.attack_with_unlabelled(images, clean, marked))
        adversarial_logits, clean_logits = learner.forward(x), learner.forward(clean)
        labels = unmarked(marked)
        # For the log alone.
        learner.loss_sum(adversarial_logits.detach(), labels, role="adversarial")
        learner.loss_sum(clean_logits.detach(), labels, role="clean")
        natural = F.cross_entropy(
            clean_logits, labels, reduction="none", label_smoothing=learner.label_smoothing
        ).masked_fill(marked < 0, 0)
        robust = phi(clean_logits, adversarial_logits, marked, learner.label_smoothing)
        loss_sum = (self.clean_weight * natural + robust).sum()
        learner.backward(learner.share(loss_sum, global_size))
        learner.apply_gradients()

    def attack(self, images: Tensor, labels: Tensor) -> Tensor:
        """The perturbation after K steps, (n, H, W, 3) float32 in grey levels.

        Args:
            images: (n, H, W, 3) uint8. labels: (n,) int64.
        """
        delta = self.threat.uniform_delta(images)
        for _ in range(self.attack_steps):
            x = self.learner.network_input(images, delta).requires_grad_()
            loss = F.cross_entropy(self.attacked_logits(x), labels)
            self.ascend_(delta, loss, x, images)
        return delta

    def attack_with_unlabelled(self, images: Tensor, clean: Tensor, marked: Tensor) -> Tensor:
        """`attack` where labels mark unlabelled images, which ascend the divergence.

        In training mode the pass that computes p(x) moves the running statistics as well.

        Args:
            images: (n, H, W, 3) uint8.
            clean: (n, 3, H, W) network input at the images.
            marked: (n,) int64 labels; ~y marks an unlabelled image.
        """
        with torch.no_grad():
            clean_logits = self.attacked_logits(clean)
        delta = self.start(images, marked)
        for _ in range(self.attack_steps):
            x = self.learner.network_input(images, delta).requires_grad_()
            loss = phi(clean_logits, self.attacked_logits(x), marked).mean()
            self.ascend_(delta, loss, x, images)
        return delta

    def start(self, images: Tensor, marked: Tensor) -> Tensor:
        """Where attacks start, (n, H, W, 3) float32 in grey levels, by the kind of the image."""
        uniform = self.threat.uniform_delta(images)
        noise = torch.randn(images.shape, device=images.device).mul_(START_LEVELS)
        clip_to_pixels_(noise, images)
        return torch.where(marked.view(-1, 1, 1, 1) < 0, noise, uniform)

    def attacked_logits(self, x: Tensor) -> Tensor:
        """Logits at network input `x` as attacks see them."""
        logits: Tensor = self.learner.forward(x, attack=True, evaluating=self.is_evaluating)
        return logits

    def ascend_(self, delta: Tensor, loss: Tensor, x: Tensor, images: Tensor) -> None:
        """One attack step on delta, in place, up the gradient of a mean loss at input `x`.

        The mean, as in the training loss, to whose size fp16's loss scale is fitted.
        """
        (gradient,) = torch.autograd.grad(self.learner.scaler.scale(loss), x)
        self.learner.ascend_(delta, gradient, images, self.threat)

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing outlives a minibatch."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to continue from."""


def unmarked(marked: Tensor) -> Tensor:
    """Labels, and pseudo labels in place of ~y, (n,) int64."""
    return torch.where(marked < 0, ~marked, marked)


def phi(
    clean_logits: Tensor, adversarial_logits: Tensor, marked: Tensor, smoothing: float = 0.0
) -> Tensor:
    """What the attack maximises, (n,): cross-entropy; of unlabelled images the divergence.

    Args:
        clean_logits: (n, classes) at x. adversarial_logits: (n, classes) at x + delta.
        marked: (n,) int64 labels; ~y marks an unlabelled image.
        smoothing: Share of a label that is spread over all classes, for the training loss.
    """
    log_p, log_q = clean_logits.log_softmax(1), adversarial_logits.log_softmax(1)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
    labelled = F.nll_loss(log_q, unmarked(marked), reduction="none")
    if smoothing:
        labelled = torch.lerp(labelled, -log_q.mean(1), smoothing)
    return torch.where(marked < 0, kl, labelled)
