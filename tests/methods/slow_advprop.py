"""Fast AdvProp and AdvProp written slowly: separate parameters a branch, SGD by hand, no trainer.

Every group of a batch norm goes through the network by itself, every loss has a backward pass of
its own, and the gradients are put together as the paper's text says.
"""

import torch
import torch.nn.functional as F
from torch.func import functional_call

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
LR, MOMENTUM, DECAY = 0.05, 0.9, 5e-4


def is_batch_norm(network, name):
    return isinstance(network.get_submodule(name.rsplit(".", 1)[0]), torch.nn.BatchNorm2d)


class SlowNetwork:
    """A plain network's parameters, its batch norms' twice."""

    def __init__(self, network):
        self.network = network
        values = {n: p.detach().clone() for n, p in network.named_parameters()}
        self.norms = [name for name in values if is_batch_norm(network, name)]
        self.parameters = {n: v for n, v in values.items() if n not in self.norms}
        for branch in ("main", "auxiliary"):
            self.parameters |= {f"{branch}:{n}": values[n].clone() for n in self.norms}
        self.momentum = {n: torch.zeros_like(v) for n, v in self.parameters.items()}

    def loss_sum(self, pixels, labels, branch, groups):
        """Summed cross-entropy of (n, H, W, 3) grey levels, group by group."""
        pixels = pixels.clamp(0, 255) / 255
        x = ((pixels - MEAN.to(pixels)) / STD.to(pixels)).permute(0, 3, 1, 2)
        chosen = {n: self.parameters.get(n, self.parameters.get(f"{branch}:{n}"))
                  for n, _ in self.network.named_parameters()}  # fmt: skip
        logits = [functional_call(self.network, chosen, chunk) for chunk in x.tensor_split(groups)]
        return F.cross_entropy(torch.cat(logits), labels, reduction="sum")

    def gradients(self, loss):
        """Every parameter's gradient; zero for those that the loss does not reach."""
        values = list(self.parameters.values())
        found = torch.autograd.grad(loss, values, allow_unused=True)
        return {n: torch.zeros_like(v) if g is None else g
                for (n, v), g in zip(self.parameters.items(), found, strict=True)}  # fmt: skip

    def require_gradients(self):
        self.parameters = {n: v.detach().requires_grad_() for n, v in self.parameters.items()}

    def step(self, gradients, lr):
        with torch.no_grad():
            for name, value in self.parameters.items():
                gradient = gradients[name] + DECAY * value
                self.momentum[name].mul_(MOMENTUM).add_(gradient)
                value.sub_(lr * self.momentum[name])


def count(name, num_clean, num_aux):
    """The weighted images that a parameter saw."""
    if name.startswith("main:"):
        return num_clean
    return num_aux if name.startswith("auxiliary:") else num_clean + num_aux


def slow_fast_advprop(slow, images, labels, delta, permutation, *, num_adv, groups, eps, step, lr,
                      weights=(0.5, 0.5), sync_speed=True, half=True):  # fmt: skip
    """One update. `delta` is the noise, `permutation` the source of each shuffled image."""
    slow.require_gradients()
    attacked, clean = images[:num_adv].double(), images[num_adv:].double()
    adv_labels, clean_labels = labels[:num_adv], labels[num_adv:]
    main_groups, aux_groups = groups
    clean_gradient = slow.gradients(slow.loss_sum(clean, clean_labels, "main", main_groups))
    noise = delta.double().requires_grad_()
    noise_loss = slow.loss_sum(attacked + noise, adv_labels, "auxiliary", aux_groups)
    (input_gradient,) = torch.autograd.grad(noise_loss, noise, retain_graph=True)
    noise_gradient = slow.gradients(noise_loss)
    moved = (delta.double() + step * input_gradient.sign()).clamp(-eps, eps)
    adversarial = (attacked + moved).clamp(0, 255)
    if half:
        adversarial = adversarial.float().half().double()
    adv_gradient = slow.gradients(
        slow.loss_sum(adversarial[permutation], adv_labels[permutation], "auxiliary", aux_groups)
    )
    num_clean, num_aux = len(clean), num_adv * sum(weights)
    gradients = {
        n: (clean_gradient[n] + weights[0] * noise_gradient[n] + weights[1] * adv_gradient[n])
        / (count(n, num_clean, num_aux) if sync_speed else num_clean + num_aux)
        for n in slow.parameters
    }
    slow.step(gradients, lr)
    return adversarial
