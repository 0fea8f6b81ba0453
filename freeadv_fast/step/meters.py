"""Training metrics that stay on the device until somebody reads them."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import torch
from torch import Tensor

from freeadv_fast import ops
from freeadv_fast.distributed.world import World

# What a pass was for: clean images, images moved at random, or images moved by an attack.
Role = Literal["clean", "noise", "adversarial"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclasses.dataclass(frozen=True)
class Reading:
    """Means over the images since the last reading, all ranks together.

    Attributes:
        loss: Mean cross-entropy over the passes for the weights, of smoothed labels with
            --label-smoothing. Not all of it is what they minimise: trades and free-trades count
            adversarial images here, elle the plain losses of its images moved at random.
        accuracy: Share of the network inputs classified right, 0..1, by the role of the pass;
            roles that were not played are missing.
        passes: Images forwarded and backwarded.
        nonfinite_losses: Passes over a minibatch whose loss was not finite.
        nonfinite_gradients: Input-gradient entries that were not finite; they moved nothing.
        skipped_updates: Updates whose weight gradients were not finite; they moved nothing.
    """

    loss: float
    accuracy: dict[Role, float]
    passes: int
    nonfinite_losses: int
    nonfinite_gradients: int
    skipped_updates: int


class Meters:
    """Sums of loss, hits and images on the device; `add` never waits for it."""

    def __init__(self, device: torch.device) -> None:
        """Starts at zero on `device`."""
        # A row a role: loss sum, correct, images, minibatch passes with a non-finite loss. float64
        # counts images exactly and sums losses without drift.
        self.sums = torch.zeros(len(ROLES), 4, dtype=torch.float64, device=device)
        self.nonfinite_gradients = torch.zeros(1, dtype=torch.int64, device=device)
        self.skipped_updates = torch.zeros(1, dtype=torch.int64, device=device)

    def of(self, role: Role) -> Tensor:
        """A role's sums, to count a pass into."""
        return self.sums[ROLES.index(role)]

    def add(self, role: Role, loss_sum: Tensor, hits: Tensor, num_images: int) -> None:
        """Counts one pass over a minibatch.

        Args:
            role: What the pass was for.
            loss_sum: () summed loss. A non-finite one is counted apart, not summed.
            hits: () images classified right; a fraction of an image with mixed labels.
            num_images: Images of the pass.
        """
        ops.count_pass_(self.of(role), loss_sum, hits, num_images)

    def read(self, world: World) -> Reading:
        """Sums over the ranks, resets, and returns the means; waits for the device."""
        counters = [self.nonfinite_gradients, self.skipped_updates]
        flat = torch.cat([self.sums.flatten(), *(c.to(torch.float64) for c in counters)])
        *sums, gradients, skipped = world.sum_(flat).tolist()
        for sum_or_count in (self.sums, *counters):
            sum_or_count.zero_()
        losses, correct, images, nonfinite = (sums[column::4] for column in range(4))
        return Reading(
            loss=sum(losses) / max(sum(images), 1.0),
            accuracy={role: c / n for role, c, n in zip(ROLES, correct, images, strict=True) if n},
            passes=int(sum(images)),
            nonfinite_losses=int(sum(nonfinite)),
            nonfinite_gradients=int(gradients),
            skipped_updates=int(skipped) // world.size,  # all ranks skip together
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The sums so far, for a checkpoint."""
        return {
            "sums": self.sums.cpu(),
            "nonfinite_gradients": self.nonfinite_gradients.cpu(),
            "skipped_updates": self.skipped_updates.cpu(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continues from saved sums."""
        self.sums.copy_(state["sums"])
        self.nonfinite_gradients.copy_(state["nonfinite_gradients"])
        if "skipped_updates" in state:  # 0.2.0 did not count them
            self.skipped_updates.copy_(state["skipped_updates"])
