"""Training metrics that stay on the device until somebody reads them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from freeadv_fast.distributed import World


@dataclasses.dataclass(frozen=True)
class Reading:
    """Means over the images since the last reading, all ranks together.

    Attributes:
        loss: Mean cross-entropy.
        accuracy: Share of the network inputs classified right, 0..1; adversarial inputs when the
            method perturbs them.
        passes: Images forwarded and backwarded.
        nonfinite_losses: Passes over a minibatch whose loss was not finite.
        nonfinite_gradients: Input-gradient entries that were not finite; they moved nothing.
    """

    loss: float
    accuracy: float
    passes: int
    nonfinite_losses: int
    nonfinite_gradients: int


class Meters:
    """Sums of loss, hits and images on the device; `add` never waits for it."""

    def __init__(self, device: torch.device) -> None:
        """Starts at zero on `device`."""
        # loss sum, correct, images, minibatch passes with a non-finite loss. float64 counts
        # images exactly and sums losses without drift.
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.nonfinite_gradients = torch.zeros(1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, loss_sum: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Counts one pass over a minibatch.

        Args:
            loss_sum: () summed loss. A non-finite one is counted apart, not summed.
            logits: (n, K). labels: (n,) int64.
        """
        is_finite = torch.isfinite(loss_sum)
        self.sums[0] += torch.where(is_finite, loss_sum, 0.0)
        self.sums[1] += (logits.argmax(1) == labels).sum()
        self.sums[2] += len(labels)
        self.sums[3] += ~is_finite

    def read(self, world: World) -> Reading:
        """Sums over the ranks, resets, and returns the means; waits for the device."""
        flat = torch.cat([self.sums, self.nonfinite_gradients.to(torch.float64)])
        loss, correct, images, losses, gradients = world.sum_(flat).tolist()
        self.sums.zero_()
        self.nonfinite_gradients.zero_()
        count = max(images, 1.0)
        return Reading(loss / count, correct / count, int(images), int(losses), int(gradients))

    def state_dict(self) -> dict[str, Tensor]:
        """The sums so far, for a checkpoint."""
        return {"sums": self.sums.cpu(), "nonfinite_gradients": self.nonfinite_gradients.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continues from saved sums."""
        self.sums.copy_(state["sums"])
        self.nonfinite_gradients.copy_(state["nonfinite_gradients"])
