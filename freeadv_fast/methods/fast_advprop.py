"""Fast AdvProp: Mei et al., "Fast AdvProp", ICLR 2022, Algorithm 1.

Adversarial examples as regularisation: they improve the accuracy on clean images. A minibatch is
split into a clean share and an adversarial share p_adv. The attack's backward pass yields the
input's gradient and, at no further cost, weight gradients for a pass on noisy images. Clean images
go through the main batch norm, noisy and adversarial ones through an auxiliary one. Between the
attack and the training on its images they are shuffled over batch-norm groups and ranks: otherwise
the noisy and the adversarial version of an image meet the same statistics, which leak its label.

Where paper and authors' code differ:
- Algorithm 1 adds expectations, each over its own share, which would count an adversarial image 4
  times at p_adv 0.2. The code weighs images: 1 clean, 0.5 noisy, 0.5 adversarial. We follow it.
- "Synchronised updating speed": the code divides each parameter's gradient by the weighted number
  of images that this parameter saw. Shared weights see all, a batch norm's own only its branch's.
- The paper starts every attack at uniform noise. The code does so in 42 % of the steps (it compares
  a probability with a normal draw) and does not clip the start to the pixel range. We follow the
  paper, and clip.
- The attack normalises with batch statistics. With running ones the paper's loss became NaN.

With ``--label-smoothing`` all three losses are smoothed, and with the noise pass the attack.

The clean pass comes after the attack here, so that it hides the exchange between the ranks: the two
branches share no statistics, and gradients add up in any order. Clean and adversarial pass end in
one backward pass, so that there is one all-reduce an update.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from freeadv_fast import ops
from freeadv_fast.config.choices import Mix
from freeadv_fast.config.threat import ThreatModel
from freeadv_fast.methods.passes import Passes
from freeadv_fast.models.batch_norm import branch_parameters
from freeadv_fast.step.learner import Learner
from freeadv_fast.step.mixing import mix


class Exchange(Protocol):
    """Images on their way to other batch-norm groups and ranks."""

    def wait(self) -> tuple[Tensor, Tensor]:
        """The images that arrived, and their labels; as many as were sent."""
        ...


class Shuffle(Protocol):
    """Sends images and labels to other batch-norm groups and ranks, in a random order."""

    def order(self, num_images: int, update: int) -> Tensor:
        """The order of an update's exchange, as a tensor on the device, for recordings."""
        ...

    def __call__(self, images: Tensor, labels: Tensor, order: int | Tensor) -> Exchange:
        """Sends them away in such an order, or in that of the update of that number."""
        ...


class FastAdvProp:
    """Algorithm 1 of the paper, one minibatch at a time.

    Args:
        learner: The network in training, a `DualNetwork`.
        threat: Radius eps and step size of the perturbation; the paper's are both 1/255.
        p_adv: Adversarial share of a minibatch.
        attack_steps: K; each step's pass trains the weights as well. The paper's is 1.
        uniform_start: Whether attacks start at noise (the paper) or at the image.
        noise_weight: Weight of an image in a pass of the attack; a clean image weighs 1.
        adv_weight: Weight of an adversarial image.
        sync_speed: Whether a parameter's gradient is divided by the images that it saw.
        kind_of_mix: How clean images are mixed. mix_alpha: Its Beta distribution.
        shuffle: Moves the adversarial images; None leaves them where they are.
    """

    seeks_robustness = False

    def __init__(
        self,
        learner: Learner,
        threat: ThreatModel,
        *,
        p_adv: float = 0.2,
        attack_steps: int = 1,
        uniform_start: bool = True,
        noise_weight: float = 0.5,
        adv_weight: float = 0.5,
        sync_speed: bool = True,
        kind_of_mix: Mix = "none",
        mix_alpha: float | None = None,
        shuffle: Shuffle | None = None,
    ) -> None:
        """Finds the parameters of the two branches."""
        self.learner, self.threat = learner, threat
        self.p_adv, self.attack_steps, self.uniform_start = p_adv, attack_steps, uniform_start
        self.noise_weight, self.adv_weight = noise_weight, adv_weight
        self.sync_speed = sync_speed
        self.kind_of_mix, self.mix_alpha = kind_of_mix, mix_alpha
        self.shuffle = shuffle
        self.main_parameters, self.auxiliary_parameters = branch_parameters(learner.module)

    def train_minibatch(self, images: Tensor, labels: Tensor, global_size: int) -> Passes:
        """Makes one update from one minibatch.

        Args:
            images: (n, H, W, 3) uint8; the first round(p_adv n) are the adversarial share.
            labels: (n,) int64.
            global_size: Images over all ranks, n on each.
        """
        learner = self.learner
        num_ranks, num_adv = global_size // len(images), round(self.p_adv * len(images))
        order: int | Tensor = 0
        if self.shuffle is not None:
            is_recorded = learner.runner is not None
            order = self.shuffle.order(num_adv, learner.updates) if is_recorded else learner.updates
        learner.update(self.descend, images, labels, num_adv, num_ranks, order)
        return Passes(global_size + self.attack_steps * num_ranks * num_adv)

    def descend(
        self, images: Tensor, labels: Tensor, num_adv: int, num_ranks: int, order: int | Tensor
    ) -> None:
        """The attack, whose passes train the auxiliary branch, the exchange and the update.

        Args:
            images: (n, H, W, 3) uint8, `num_adv` of them to be attacked. labels: (n,) int64.
            num_adv: Of this rank. num_ranks: With as many images each.
            order: Of the exchange, see `Shuffle`; any where there is none.
        """
        learner = self.learner
        (attacked, clean), (adv_labels, clean_labels) = (
            tensor.tensor_split([num_adv]) for tensor in (images, labels)
        )
        num_clean, num_adv = num_ranks * len(clean), num_ranks * num_adv
        # Weighted images that each group of parameters sees in this update, over all ranks.
        aux_size = num_adv * (self.attack_steps * self.noise_weight + self.adv_weight)
        total_size = num_clean + aux_size

        learner.zero_grad()
        delta, unit = self.start(attacked)
        for _ in range(self.attack_steps):
            with learner.without_reduction():
                x = learner.network_input(attacked, delta, unit).requires_grad_()
                noise_loss = learner.loss(
                    x, adv_labels, total_size,
                    role="noise", branch="auxiliary", weight=self.noise_weight,
                )  # fmt: skip
                learner.add_gradients(noise_loss)  # one pass: g_theta and g_adv
            ops.sign_ascent_(
                delta,
                x.grad,  # type: ignore[arg-type]  # add_gradients has set it
                attacked,
                learner.meters.nonfinite_gradients,
                step=float(self.threat.step.levels),
                eps=float(self.threat.eps.levels),
                unit=unit,
            )
        adversarial = self.perturbed(attacked, delta, unit)
        exchange = None
        if self.shuffle is not None:
            exchange = self.shuffle(adversarial, adv_labels, order)

        x, targets = mix(
            learner.network_input(clean), clean_labels, self.kind_of_mix, self.mix_alpha
        )
        clean_loss = learner.loss(x, targets, total_size, role="clean", branch="main")
        if exchange is not None:
            adversarial, adv_labels = exchange.wait()
        x = learner.network_input(adversarial)
        adv_loss = learner.loss(
            x, adv_labels, total_size,
            role="adversarial", branch="auxiliary", weight=self.adv_weight,
        )  # fmt: skip
        learner.add_gradients(clean_loss + adv_loss)
        if self.sync_speed:
            learner.scale_gradients(self.main_parameters, total_size / num_clean)
            learner.scale_gradients(self.auxiliary_parameters, total_size / aux_size)
        learner.apply_gradients()

    def start(self, images: Tensor) -> tuple[Tensor, float]:
        """Where the attack starts: the perturbation, and grey levels in one unit of it."""
        if self.uniform_start:
            return self.threat.uniform_delta(images), 1.0
        return self.threat.zero_delta(images.shape, images.device), self.threat.delta_unit

    def perturbed(self, images: Tensor, delta: Tensor, unit: float) -> Tensor:
        """The adversarial images as they travel: uint8 where that is exact, else float16.

        float16 keeps an eighth of a grey level or better.
        """
        if not self.uniform_start and self.threat.is_whole:
            levels = delta.to(torch.int16) * int(unit)
            return levels.add_(images).clamp_(0, 255).to(torch.uint8)
        return (delta.float() * unit).add_(images).clamp_(0, 255).half()

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing outlives a minibatch."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to continue from."""
