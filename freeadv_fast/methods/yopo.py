"""YOPO-K-n: Zhang et al., "You Only Propagate Once", NeurIPS 2019.

The perturbation touches the first layer f_0 alone. With p, the loss's gradient at the first layer's
output, held fixed, delta can take several steps without the rest of the network:

    delta <- a uniform point of the ball
    K times:  full pass at x + delta: the weights' gradients add up, p = dL/df_0(x + delta)
              n times: delta <- project(delta + alpha * sign(gradient of <p, f_0(x + delta)>))
    theta <- theta - tau * the sum of the K gradients

The projection is onto the L-infinity ball, then onto the pixel range. f_0 is the first convolution,
with the per-image standardisation before it where the network has one. Gradients are summed over
the K passes, not averaged; hence the authors' rates, 0.1 * 2/K for PreActResNet-18 and 0.1 * 4/K
for WRN-34-10. Batch norm is in training mode, and its running statistics move in all K passes.

Where we differ from the authors' code:
- It adds the first layer's gradient of <p, f_0> at the moved delta to that of the full pass, so
  that this one layer counts twice. Here all layers descend the same K losses, so that under data
  parallelism one all-reduce an update is right for them all. The inner steps after the last full
  pass, which then nothing would use, are left out.
- Its first full pass may see pixels out of range; here starts are clipped.
- A convolution is linear, so that its n inner steps share one gradient. Here they are taken as one
  step of n * alpha, which ends at the same point. With a standardiser they are taken one by one.

``--label-smoothing`` smooths the loss of the full passes, and with it p.

Presets, in 1/255: YOPO-5-3 with eps 8, alpha 2 on CIFAR-10.

Cost: K full passes, K steps of natural training, and K - 1 passes through the first convolution.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from freeadv_fast.config.threat import Perturbation, ThreatModel
from freeadv_fast.errors import UserError
from freeadv_fast.methods.passes import Passes
from freeadv_fast.models.normalize import StandardizedNetwork, plain_network
from freeadv_fast.step.learner import Learner
from freeadv_fast.step.meters import Role


class Yopo:
    """YOPO-K-n, one minibatch at a time.

    Args:
        learner: The network in training.
        threat: Radius eps, and alpha as its step.
        outer_steps: K, at least 1.
        inner_steps: n, at least 1.

    Raises:
        UserError: the network has no convolution that takes the image.
    """

    seeks_robustness = True

    def __init__(
        self,
        learner: Learner,
        threat: ThreatModel,
        *,
        outer_steps: int = 5,
        inner_steps: int = 3,
    ) -> None:
        """Finds the first layer."""
        self.learner, self.threat = learner, threat
        self.outer_steps, self.inner_steps = outer_steps, inner_steps
        self.first_layer = first_layer(learner.module)
        if len(self.first_layer) == 1:  # the convolution alone: n steps are one
            long_step = Perturbation(threat.step.levels * inner_steps)
            self.threat, self.inner_steps = dataclasses.replace(threat, step=long_step), 1

    def train_minibatch(self, images: Tensor, labels: Tensor, global_size: int) -> Passes:
        """Makes one update from one minibatch.

        Args:
            images: (n, H, W, 3) uint8. labels: (n,) int64.
            global_size: Images of the minibatch over all ranks.
        """
        self.learner.update(self.descend, images, labels, global_size)
        return Passes(self.outer_steps * global_size)

    def descend(self, images: Tensor, labels: Tensor, global_size: int) -> None:
        """K full passes with the first layer's steps between them, and the update."""
        learner = self.learner
        delta = self.threat.uniform_delta(images)
        learner.zero_grad()
        role: Role = "noise"
        for _ in range(self.outer_steps - 1):
            with learner.without_reduction():
                p = self.full_pass(images, delta, labels, global_size, role)
            for _ in range(self.inner_steps):
                learner.ascend_(delta, self.pull_back(p, images, delta), images, self.threat)
            role = "adversarial"
        self.full_pass(images, delta, labels, global_size, role)
        learner.apply_gradients()

    def full_pass(
        self, images: Tensor, delta: Tensor, labels: Tensor, global_size: int, role: Role
    ) -> Tensor:
        """Adds the weights' gradients at x + delta; returns p, in the shape of f_0's output."""
        learner = self.learner
        x = learner.network_input(images, delta)
        with gradients_at_output(self.first_layer[-1]) as gradients:
            learner.add_gradients(learner.loss(x, labels, global_size, role=role))
        (p,) = gradients
        return p

    def pull_back(self, p: Tensor, images: Tensor, delta: Tensor) -> Tensor:
        """Gradient of <p, f_0> at the network input x + delta, (n, 3, H, W)."""
        x = self.learner.network_input(images, delta).requires_grad_()
        with self.learner.autocast():
            output = self.first_layer(x)
        (gradient,) = torch.autograd.grad(output, x, grad_outputs=p)
        return gradient

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing outlives a minibatch."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to continue from."""


def first_layer(network: nn.Module) -> nn.Sequential:
    """f_0: the first convolution in order of registration, and the standardiser before it.

    Args:
        network: As `zoo.build_model` returns it; its modules are shared, not copied.

    Returns:
        A function of the network's input that ends in a convolution.

    Raises:
        UserError: there is no convolution, or the first does not take the three colours.
    """
    convolution = next((layer for layer in network.modules() if isinstance(layer, nn.Conv2d)), None)
    if convolution is None or convolution.in_channels != 3:
        name = type(plain_network(network)).__name__
        raise UserError(
            f"--method yopo: {name} does not start with a convolution of the image, the layer "
            "through which YOPO attacks; use --method pgd"
        )
    if isinstance(network, StandardizedNetwork):
        return nn.Sequential(network.get_submodule("standardize"), convolution)
    return nn.Sequential(convolution)


@contextlib.contextmanager
def gradients_at_output(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the gradients at a layer's output in the passes in here, one a pass.

    A hook on the output tensor sees the gradient before an in-place activation, as in VGG.
    """
    gradients: list[Tensor] = []

    def watch(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(gradients.append)

    handle = layer.register_forward_hook(watch)
    try:
        yield gradients
    finally:
        handle.remove()
