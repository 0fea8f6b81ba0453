"""Natural training, with the minibatch replay of Free AT's figure 1.

With m = 1 this is ordinary training. With m > 1 each minibatch is trained on m times in a row and
the epochs are divided by m: figure 1 of "Adversarial Training for Free!" measures what the replay
alone costs in accuracy. Mixup and CutMix mix the minibatch anew in each replay.
"""

from __future__ import annotations

from torch import Tensor

from freeadv_fast.config.choices import Mix
from freeadv_fast.methods.passes import Passes
from freeadv_fast.step.learner import Learner
from freeadv_fast.step.mixing import Labels, mix


class Natural:
    """Training on clean images.

    Args:
        learner: The network in training.
        m: Replays of each minibatch.
        kind_of_mix: How images are mixed. mix_alpha: Its Beta distribution.
    """

    seeks_robustness = False

    def __init__(
        self,
        learner: Learner,
        *,
        m: int = 1,
        kind_of_mix: Mix = "none",
        mix_alpha: float | None = None,
    ) -> None:
        """Binds the learner."""
        self.learner = learner
        self.m = m
        self.kind_of_mix, self.mix_alpha = kind_of_mix, mix_alpha

    def train_minibatch(self, images: Tensor, labels: Tensor, global_size: int) -> Passes:
        """Trains m times on one minibatch.

        Args:
            images: (n, H, W, 3) uint8. labels: (n,) int64.
            global_size: Images of the minibatch over all ranks.
        """
        learner = self.learner
        clean = learner.network_input(images)
        for _ in range(self.m):
            x, targets = mix(clean, labels, self.kind_of_mix, self.mix_alpha)
            learner.update(self.descend, x, targets, global_size)
        return Passes(self.m * global_size)

    def descend(self, x: Tensor, labels: Labels, global_size: int) -> None:
        """One update at (n, 3, H, W) network input `x`."""
        learner = self.learner
        learner.backward(learner.loss(x, labels, global_size, role="clean"))
        learner.apply_gradients()

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing outlives a minibatch."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to continue from."""
