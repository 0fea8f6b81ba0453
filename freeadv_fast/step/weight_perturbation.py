"""AWP: Wu, Xia and Wang, "Adversarial Weight Perturbation Helps Robust Generalization".

NeurIPS 2020. The weights descend the loss where they have moved up it, each tensor by a share gamma
of its own length, so that training comes to where the loss is flat in the weights, too:

    v_l   <- gamma * |w_l| * g_l / |g_l|,   g = gradient of the loss at w    layer by layer, l
    theta <- theta - tau * gradient of the loss at w + v

The loss is the method's own, at inputs that were attacked at w. Only weights of more than one
dimension move: kernels and matrices, not biases, batch norm or embeddings of positions.

As in the authors' code (csdongxian/AWP, utils_awp.py) it is one step. They take it with an SGD on a
copy of the network, whose rate cancels where v is brought to its length. That copy's pass moves
running statistics of its own alone; the descent's, at w + v, moves the network's. So it is here.
Where we differ from that code:
- It subtracts v after the optimizer's step, so that weight decay acts on w + v. Here w is put back
  before the step, bit by bit, and an optimizer that reads w reads w.
- Its v is that of the whole minibatch over all GPUs. Here every rank, and with --accumulate every
  part of an update, moves by the gradient of its own images, as its attack and its batch norm know
  these alone (m-sharpness: Foret et al. 2021, section 4.1). Nothing more travels between ranks;
  gradients are averaged and weights are equal as ever.
- Its code for TRADES leaves v out in the first 9 epochs, to save time. Here it is never left out.

gamma of the paper: 0.01 for PGD training, 0.005 for TRADES.

Cost: the passes of the loss once more, a full backward pass each; a copy of the weights that move.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from freeadv_fast.step.learner import Learner


class WeightPerturbation:
    """Moves weights up a loss for a while.

    Args:
        learner: The network in training.
        gamma: Length of a tensor's step in units of the tensor's own; 0 moves nothing.

    Attributes:
        passes: Times that the loss is computed for the perturbation: 1, or 0.
        weights: What moves.
    """

    def __init__(self, learner: Learner, gamma: float) -> None:
        """Finds the weights."""
        self.learner, self.gamma = learner, gamma
        self.passes = int(gamma > 0)
        self.weights: list[Tensor] = [
            parameter
            for name, parameter in learner.module.named_parameters()
            if parameter.requires_grad and parameter.dim() > 1 and "weight" in name
        ]

    @contextlib.contextmanager
    def up(self, loss: Callable[[], Tensor]) -> Iterator[None]:
        """In here the weights are at w + v; after it at w, to the bit.

        Args:
            loss: The training loss, (), of any scale; called once, before anything moves.
        """
        if not self.passes:
            yield
            return
        steps = self._steps(loss)
        before = [weight.detach().clone() for weight in self.weights]
        with torch.no_grad():
            torch._foreach_add_(self.weights, steps)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, before)

    def _steps(self, loss: Callable[[], Tensor]) -> list[Tensor]:
        """v of each weight, like it; running statistics and meters are as they were.

        Components that are not finite, as fp16's loss scale may make them, count as zero: a weight
        that is not finite would leave batch norm with statistics that are not.
        """
        learner = self.learner
        kept = [*learner.module.buffers(), learner.meters.sums]
        values = [tensor.clone() for tensor in kept]
        with learner.without_reduction():  # no gradient of a weight is kept, none is averaged
            scaled = learner.scaler.scale(loss())
        found = torch.autograd.grad(scaled, self.weights, materialize_grads=True)
        with torch.no_grad():
            torch._foreach_copy_(kept, values)
            gradients = [
                g.to(w.dtype).nan_to_num(0, 0, 0) for g, w in zip(found, self.weights, strict=True)
            ]
            lengths = torch.stack(torch._foreach_norm(gradients))
            reaches = self.gamma * torch.stack(torch._foreach_norm(self.weights))
            factors = (reaches / lengths).nan_to_num(0, 0, 0)  # without a gradient there is no way
            return list(torch._foreach_mul(gradients, list(factors)))
