"""What the slow loops of the fast family share: minibatches, pixels, SGD by hand.

The loops differentiate to the perturbation itself, in (n, H, W, 3) grey levels, and in float64.
"""

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from freeadv_fast.config.threat import L2ThreatModel, Perturbation, ThreatModel
from freeadv_fast.step.learner import Learner, Pixels
from freeadv_fast.step.optim import build_sgd

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
LR, MOMENTUM, DECAY = 0.05, 0.9, 5e-4
SIZES = [6, 6, 4] * 2


def minibatches(sizes=SIZES, seed=0):
    """Minibatches of random 8x8 images, with the extremes 0 and 255 common in them."""
    generator = torch.Generator().manual_seed(seed)
    for size in sizes:
        images = torch.randint(-60, 316, (size, 8, 8, 3), generator=generator)
        labels = torch.randint(0, 5, (size,), generator=generator)
        yield images.clamp(0, 255).to(torch.uint8), labels


def threat(eps, step, kind=ThreatModel):
    return kind(Perturbation.parse(f"{eps}/255"), Perturbation.parse(f"{step}/255"))


def l2_threat(eps, step):
    return threat(eps, step, L2ThreatModel)


def build_learner(network, dtype=torch.float64):
    """A learner with a falling learning rate."""
    optimizer = build_sgd(network, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, decay="all")
    pixels = Pixels(torch.tensor(MEAN), torch.tensor(STD), dtype)
    return Learner(network, optimizer, lambda update: LR / (1 + update), pixels)


class SlowTrainer:
    """A network and SGD with momentum, written out."""

    def __init__(self, network):
        self.network = network
        self.momentum = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
        self.update = 0

    def x(self, images, delta):
        """The normalised network input at images + delta, differentiable."""
        pixels = (images.double() + delta).clamp(0, 255) / 255
        x = (pixels - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
        return x.permute(0, 3, 1, 2)

    def loss(self, images, delta, labels):
        return F.cross_entropy(self.network(self.x(images, delta)), labels)

    def loss_gradient(self, images, delta, labels):
        """Gradient of the loss with respect to delta."""
        delta = delta.clone().requires_grad_()
        return torch.autograd.grad(self.loss(images, delta, labels), delta)[0]

    def step(self, *losses):
        self.descend(torch.autograd.grad(sum(losses), list(self.network.parameters())))

    def descend(self, gradients):
        with torch.no_grad():
            for (name, p), g in zip(self.network.named_parameters(), gradients, strict=True):
                self.momentum[name].mul_(MOMENTUM).add_(g + DECAY * p)
                p.sub_(self.momentum[name] * LR / (1 + self.update))
        self.update += 1


def uniform(images, radius):
    """Uniform noise, clipped so that images + noise stay in 0..255; rounded to float32."""
    noise = torch.empty(images.shape).uniform_(-radius, radius)
    return ((images.float() + noise).clamp(0, 255) - images.float()).double()


def in_pixel_range(delta, images):
    return (images.double() + delta).clamp(0, 255) - images.double()


def assert_equal_networks(ours, theirs, tolerance=1e-6):
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def watch_weight_gradients(network):
    """A list that grows whenever a gradient of a weight is computed."""
    seen = []
    for parameter in network.parameters():
        parameter.register_hook(seen.append)
    return seen


class HostReads(TorchDispatchMode):
    """Counts reads of a tensor's value by the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def assert_never_reads(method):
    """One minibatch without a read by the host."""
    ((images, labels),) = minibatches([6])
    with HostReads() as reads:
        method.train_minibatch(images, labels, 6)
    assert reads.count == 0


def assert_learns(method, rounds=10):
    """Rounds on one minibatch lower the clean loss, and everything stays finite."""
    learner = method.learner
    learner.lr_at = lambda update: LR
    ((images, labels),) = minibatches([6])

    def loss():
        with torch.no_grad():
            return F.cross_entropy(learner.net(learner.network_input(images).float()), labels)

    before = loss()
    for _ in range(rounds):
        method.train_minibatch(images, labels, 6)
    assert loss() < 0.7 * before
    assert all(torch.isfinite(t).all() for t in learner.net.state_dict().values())


def assert_overflow_moves_no_weight(method):
    """A loss scale too large for fp16: the step is skipped, and the scale falls."""
    learner = method.learner
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = {name: p.detach().clone() for name, p in learner.net.named_parameters()}
    ((images, labels),) = minibatches([6])
    method.train_minibatch(images, labels, 6)
    assert learner.scaler.get_scale() == 2.0**39
    assert learner.meters.nonfinite_gradients.item() > 0
    for name, p in learner.net.named_parameters():
        assert torch.equal(p, before[name]), name


def total_passes(method):
    """What the meters counted since they were last read."""
    return int(method.learner.meters.sums[:, 2].sum())
