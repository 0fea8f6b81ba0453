"""Free adversarial training: Shafahi et al., "Adversarial Training for Free!", NeurIPS 2019.

Algorithm 1. Each minibatch is replayed m times. One backward pass yields the gradient of the
weights and the gradient of the perturbation; both are taken at the same point (x + delta, theta).
The perturbation is never reset: it carries over from one minibatch to the next.

Where paper and reference code differ: Algorithm 1 adds delta without clipping to the pixel range,
both reference implementations clip x + delta before the network and let the gradient through
where 0 <= x + delta <= 1. We follow the code. Row i of delta belongs to batch slot i; a smaller
last minibatch uses and updates the first rows only, as in the reference code. Where minibatches
differ in shape, delta is resampled from one to the next (`step.warm_start`). Batch norm stays in
training mode, and its running statistics move in every replay. With ``--label-smoothing`` both
gradients are those of the smoothed loss: there is one backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from freeadv_fast.config.threat import ThreatModel
from freeadv_fast.methods.passes import Passes
from freeadv_fast.step.learner import Learner
from freeadv_fast.step.warm_start import WarmStart


class Free:
    """Algorithm 1 of the paper, one minibatch at a time.

    Args:
        learner: The network in training.
        threat: Radius eps and step size of the perturbation; the paper's step is eps.
        m: Replays of each minibatch.
        minibatch_shape: (N, H, W, 3) of a full minibatch on this rank, all parts of an update; of
            any height and width where minibatches differ in them, for delta starts at zero.
        device: Where training runs.
    """

    seeks_robustness = True

    def __init__(
        self,
        learner: Learner,
        threat: ThreatModel,
        *,
        m: int,
        minibatch_shape: tuple[int, int, int, int],
        device: torch.device,
    ) -> None:
        """Starts with delta = 0, line 2 of Algorithm 1."""
        self.learner = learner
        self.m = m
        self.eps = float(threat.eps.levels)
        self.step_size = float(threat.step.levels)
        self.unit = threat.delta_unit
        self.carried = WarmStart(threat.zero_delta(minibatch_shape, device))

    @property
    def delta(self) -> Tensor:
        """The perturbation, (N, H, W, 3)."""
        return self.carried.delta

    def train_minibatch(self, images: Tensor, labels: Tensor, global_size: int) -> Passes:
        """Replays one minibatch m times; delta carries over to the next one.

        Args:
            images: (n, H, W, 3) uint8, n at most N. labels: (n,) int64.
            global_size: Images of the minibatch over all ranks.
        """
        self.carried.carry_to(images)
        delta = self.delta[: len(images)]
        x = self.learner.network_input(images, delta, self.unit).requires_grad_()
        for _ in range(self.m):
            self.learner.update(self.replay, x, images, labels, global_size)
        return Passes(self.m * global_size)

    def replay(self, x: Tensor, images: Tensor, labels: Tensor, global_size: int) -> None:
        """Lines 6 to 12: updates the weights, delta, and `x`, which becomes the next replay's.

        Args:
            x: (n, 3, H, W) network input at images + delta, a leaf.
            images: (n, H, W, 3) uint8. labels: (n,) int64.
            global_size: Images of the minibatch over all ranks.
        """
        learner = self.learner
        delta = self.delta[learner.slots(images)]
        loss = learner.loss(x, labels, global_size, role="adversarial")
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
        self.carried.load(state["delta"])
