"""AdvProp: Xie et al., "Adversarial Examples Improve Image Recognition", CVPR 2020.

Trains on every image twice, clean through the main batch norm and attacked through an auxiliary
one; K + 2 passes an image. The attack is targeted at a random wrong label, and its passes compute
the input's gradient alone. `decoupled` splits the minibatch instead, as Fast AdvProp does, and
attacks one share: 1 + p_adv K passes an image (Mei et al. 2022, table 5).

Details follow the code of Fast AdvProp, which trained the AdvProp rows of its tables: sums over
images, each parameter's gradient divided by the weighted images that it saw, the attack in eval
mode on the auxiliary branch. That code draws the target as (y + r) mod classes with r from 0, so
that it can be the true label; here it never is. Clean and adversarial pass end in one backward
pass, one all-reduce an update, with the activations of both in memory.

``--label-smoothing`` smooths both training losses, not the attack's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from freeadv_fast import ops
from freeadv_fast.config.choices import Mix
from freeadv_fast.config.threat import ThreatModel
from freeadv_fast.methods.passes import Passes
from freeadv_fast.models.batch_norm import branch_parameters
from freeadv_fast.step.learner import Learner
from freeadv_fast.step.mixing import mix


class AdvProp:
    """Training on clean and adversarial images, each with a batch norm of its own.

    Args:
        learner: The network in training, a `DualNetwork`.
        threat: Radius eps and step size of the perturbation.
        num_classes: At least 2.
        attack_steps: K of the PGD-K attack.
        p_adv: Share of the minibatch that is attacked and not trained on clean; None attacks all
            images and trains on all of them clean too.
        uniform_start: Whether attacks start at noise or at the image.
        adv_weight: Weight of an adversarial image; a clean one weighs 1.
        sync_speed: Whether a parameter's gradient is divided by the images that it saw.
        kind_of_mix: How clean images are mixed. mix_alpha: Its Beta distribution.
    """

    seeks_robustness = False

    def __init__(
        self,
        learner: Learner,
        threat: ThreatModel,
        *,
        num_classes: int,
        attack_steps: int = 5,
        p_adv: float | None = None,
        uniform_start: bool = True,
        adv_weight: float = 1.0,
        sync_speed: bool = True,
        kind_of_mix: Mix = "none",
        mix_alpha: float | None = None,
    ) -> None:
        """Finds the parameters of the two branches."""
        self.learner, self.threat, self.num_classes = learner, threat, num_classes
        self.attack_steps, self.p_adv, self.uniform_start = attack_steps, p_adv, uniform_start
        self.adv_weight, self.sync_speed = adv_weight, sync_speed
        self.kind_of_mix, self.mix_alpha = kind_of_mix, mix_alpha
        self.main_parameters, self.auxiliary_parameters = branch_parameters(learner.module)

    def train_minibatch(self, images: Tensor, labels: Tensor, global_size: int) -> Passes:
        """Makes one update from one minibatch.

        Args:
            images: (n, H, W, 3) uint8. labels: (n,) int64.
            global_size: Images over all ranks, n on each.
        """
        num_ranks, num_adv, num_clean = global_size // len(images), len(images), len(images)
        if self.p_adv is not None:
            num_adv = round(self.p_adv * len(images))
            num_clean -= num_adv
        self.learner.update(self.descend, images, labels, num_adv, num_clean, num_ranks)
        num_adv, num_clean = num_ranks * num_adv, num_ranks * num_clean
        return Passes(num_clean + num_adv, self.attack_steps * num_adv)

    def descend(
        self, images: Tensor, labels: Tensor, num_adv: int, num_clean: int, num_ranks: int
    ) -> None:
        """The attack on the first images, and the update from it and from the last ones, clean."""
        learner = self.learner
        attacked, adv_labels = images[:num_adv], labels[:num_adv]
        clean, clean_labels = images[-num_clean:], labels[-num_clean:]
        aux_size = self.adv_weight * num_ranks * num_adv
        total_size = num_ranks * num_clean + aux_size

        delta, unit = self.attack(attacked, adv_labels)
        x, targets = mix(
            learner.network_input(clean), clean_labels, self.kind_of_mix, self.mix_alpha
        )
        clean_loss = learner.loss(x, targets, total_size, role="clean", branch="main")
        x = learner.network_input(attacked, delta, unit)
        adv_loss = learner.loss(
            x, adv_labels, total_size,
            role="adversarial", branch="auxiliary", weight=self.adv_weight,
        )  # fmt: skip
        learner.backward(clean_loss + adv_loss)
        if self.sync_speed:
            learner.scale_gradients(self.main_parameters, total_size / (num_ranks * num_clean))
            learner.scale_gradients(self.auxiliary_parameters, total_size / aux_size)
        learner.apply_gradients()

    def attack(self, images: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        """PGD-K towards a random wrong label: the perturbation, and grey levels in its unit."""
        learner, threat = self.learner, self.threat
        delta, unit = threat.zero_delta(images.shape, images.device), threat.delta_unit
        if self.uniform_start:
            delta, unit = threat.uniform_delta(images), 1.0
        targets = self.wrong_labels(labels)
        for _ in range(self.attack_steps):
            x = learner.network_input(images, delta, unit)
            ops.sign_ascent_(
                delta,
                learner.input_gradient(x, targets, "attack", towards=True),
                images,
                learner.meters.nonfinite_gradients,
                step=float(threat.step.levels),
                eps=float(threat.eps.levels),
                unit=unit,
            )
        return delta, unit

    def wrong_labels(self, labels: Tensor) -> Tensor:
        """A uniformly random other label for each."""
        return (labels + torch.randint_like(labels, 1, self.num_classes)) % self.num_classes

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing outlives a minibatch."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to continue from."""
