"""Natural training, with the minibatch replay of Free AT's figure 1.

With m = 1 this is ordinary training. With m > 1 each minibatch is trained on m times in a row and
the epochs are divided by m: figure 1 of "Adversarial Training for Free!" measures what the replay
alone costs in accuracy.
"""

from __future__ import annotations

from torch import Tensor

from freeadv_fast.learner import Learner


class Natural:
    """Training on clean images.

    Args:
        learner: The network in training.
        m: Replays of each minibatch.
    """

    is_adversarial = False

    def __init__(self, learner: Learner, *, m: int = 1) -> None:
        """Binds the learner."""
        self.learner = learner
        self.m = m

    def train_minibatch(self, images: Tensor, labels: Tensor, global_size: int) -> None:
        """Trains m times on one minibatch.

        Args:
            images: (n, H, W, 3) uint8. labels: (n,) int64.
            global_size: Images of the minibatch over all ranks.
        """
        learner = self.learner
        x = learner.network_input(images)
        for _ in range(self.m):
            learner.backward(learner.loss(x, labels, global_size))
            learner.step()

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing outlives a minibatch."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to continue from."""
