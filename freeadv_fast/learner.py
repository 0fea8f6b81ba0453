"""The network and everything that turns a loss into its next weights.

Methods speak to a `Learner` in the words of their papers: network input, loss, backward, step.
Precision, gradient scaling, data parallelism, the learning rate and the meters live behind them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freeadv_fast import ops
from freeadv_fast.meters import Meters


@dataclasses.dataclass(frozen=True)
class Pixels:
    """How pixels become the network's input.

    Attributes:
        mean: (3,) float32 on the device, subtracted from pixels in [0, 1].
        std: (3,) float32 on the device, the divisor.
        dtype: The network input's dtype.
    """

    mean: Tensor
    std: Tensor
    dtype: torch.dtype


class Learner:
    """A network in training.

    Args:
        net: The network, wrapped for data parallelism when there are several ranks.
        optimizer: Its optimizer.
        lr_at: Learning rate of an update, by its index.
        pixels: Input statistics and dtype.
        precision: bfloat16 and float16 run the network under autocast; float16 adds a gradient
            scaler. The input's dtype by default.
        num_ranks: Ranks over which gradients are averaged.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_at: Callable[[int], float],
        pixels: Pixels,
        precision: torch.dtype | None = None,
        num_ranks: int = 1,
    ) -> None:
        """Starts at update 0."""
        device = pixels.mean.device
        self.net = net
        self.optimizer = optimizer
        self.lr_at = lr_at
        self.pixels = pixels
        self.precision = precision or pixels.dtype
        self.num_ranks = num_ranks
        self.updates = 0
        self.meters = Meters(device)
        self.scaler = torch.amp.grad_scaler.GradScaler(
            device.type, enabled=self.precision is torch.float16
        )

    def network_input(
        self, images: Tensor, delta: Tensor | None = None, unit: float = 1.0
    ) -> Tensor:
        """The normalised network input at images + delta.

        Args:
            images: (n, H, W, 3) uint8.
            delta: (n, H, W, 3) perturbation in `unit` grey levels; None for clean images.
            unit: Grey levels that one unit of `delta` stands for.

        Returns:
            (n, 3, H, W) in the network's input dtype, channels_last, a leaf.
        """
        return ops.perturb_normalize(
            images, delta, self.pixels.mean, self.pixels.std, unit=unit, dtype=self.pixels.dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits at network input `x`, under autocast in half precision."""
        is_half = self.precision in (torch.bfloat16, torch.float16)
        with torch.autocast(x.device.type, self.precision if is_half else None, enabled=is_half):
            logits: Tensor = self.net(x)
        return logits

    def loss(self, x: Tensor, labels: Tensor, global_size: int) -> Tensor:
        """Cross-entropy at network input `x`: this rank's sum over the global minibatch's size.

        Data parallelism averages gradients over the ranks, hence the factor `num_ranks`: the
        update is the gradient of the global mean also when ranks hold different counts.

        Args:
            x: (n, 3, H, W) network input. labels: (n,) int64.
            global_size: Images of the minibatch over all ranks.
        """
        logits = self.forward(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss_sum = F.cross_entropy(logits, labels, reduction="sum")
        self.meters.add(loss_sum.detach(), logits.detach(), labels)
        return loss_sum * (self.num_ranks / global_size)

    def backward(self, loss: Tensor) -> None:
        """One backward pass; the sign of every gradient is that of the unscaled loss.

        The old gradients go just before the new ones come. Dropped right after the update, their
        pages went back to the system and were faulted in again: 9 % of a step on a CPU (ResNet-18
        at 32 px, 16 images).
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()

    def step(self) -> None:
        """One optimizer update at this update's learning rate; fp16 overflows skip it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(self.updates)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.updates += 1

    @torch.no_grad()
    def clean_hits(self, images: Tensor, labels: Tensor) -> Tensor:
        """How many clean images the network classifies right now, in eval mode; a () tensor.

        Changes nothing: batch-norm statistics stay as they are.
        """
        was_training = self.net.training
        self.net.eval()
        hits = (self.forward(self.network_input(images)).argmax(1) == labels).sum()
        self.net.train(was_training)
        return hits

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, scaler and update counter; weights and meters are saved apart."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved state."""
        fused = [group["fused"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, is_fused in zip(self.optimizer.param_groups, fused, strict=True):
            group["fused"] = is_fused  # this device's, not that of the machine that saved
        self.scaler.load_state_dict(state["scaler"])
        self.updates = int(state["updates"])
