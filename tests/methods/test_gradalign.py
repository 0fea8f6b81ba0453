"""GradAlign against a slow loop: eager double backward in fp64, SGD by hand."""

import pytest
import torch
import torch.nn.functional as F

from freeadv_fast.config.threat import Perturbation, ThreatModel
from freeadv_fast.distributed.world import World
from freeadv_fast.methods.gradalign import GradAlign
from freeadv_fast.step.learner import Learner, Pixels
from freeadv_fast.step.optim import build_sgd

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
LR, MOMENTUM, DECAY, EPS = 0.05, 0.9, 5e-4, 8


def minibatches(sizes):
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        images = torch.randint(-60, 316, (size, 8, 8, 3), generator=generator)
        labels = torch.randint(0, 5, (size,), generator=generator)
        yield images.clamp(0, 255).to(torch.uint8), labels


def build(network, dtype=torch.float64, **options):
    optimizer = build_sgd(network, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, decay="all")
    learner = Learner(network, optimizer, lambda update: LR, Pixels(MEAN, STD, dtype))
    threat = ThreatModel(Perturbation.parse(f"{EPS}/255"), Perturbation.parse(f"{EPS}/255"))
    return GradAlign(learner, threat, **({"weight": 0.5} | options))


def cosine(a, b):
    a, b = a.flatten(1), b.flatten(1)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def slow_gradalign(network, batches, *, weight, every, through):
    """The paper's text, every gradient taken at the pixels themselves."""
    momentum = {name: torch.zeros_like(p) for name, p in network.named_parameters()}

    def loss_sum(pixels, labels):
        x = (pixels / 255 - MEAN.double()) / STD.double()
        return F.cross_entropy(network(x.permute(0, 3, 1, 2)), labels, reduction="sum")

    def gradient(pixels, labels):
        pixels = pixels.detach().requires_grad_()
        (found,) = torch.autograd.grad(loss_sum(pixels, labels), pixels, create_graph=True)
        return found

    for update, (images, labels) in enumerate(batches):
        pixels = images.double()
        g1 = gradient(pixels, labels)
        adversarial = (pixels + EPS * g1.detach().sign()).clamp(0, 255)
        loss = loss_sum(adversarial, labels)
        if update % every == 0:
            torch.manual_seed(update)
            eta = torch.empty(images.shape).uniform_(-EPS / 255, EPS / 255)
            g2 = gradient(pixels + 255 * eta.double(), labels)
            g1 = g1 if through == "both" else g1.detach()
            loss = loss + weight * every * (1 - cosine(g1, g2)).sum()
        gradients = torch.autograd.grad(loss / len(images), list(network.parameters()))
        with torch.no_grad():
            for (name, p), g in zip(network.named_parameters(), gradients, strict=True):
                momentum[name].mul_(MOMENTUM).add_(g + DECAY * p)
                p.sub_(LR * momentum[name])


@pytest.mark.parametrize("through", ["second", "both"])
@pytest.mark.parametrize("every", [1, 2])
def test_equals_the_slow_loop(small_network, through, every):
    """Weights after three updates to 1e-6 (eta is drawn in fp32), a smaller minibatch last."""
    ours, theirs = small_network(torch.float64), small_network(torch.float64)
    sizes = (6, 6, 4)
    method = build(ours, every=every, through=through)
    counts = []
    for update, (images, labels) in enumerate(minibatches(sizes)):
        images = images.clamp(20, 235)  # the slow loop's gradient knows no clip
        torch.manual_seed(update)
        counts.append(method.train_minibatch(images, labels, len(images)))
    batches = ((images.clamp(20, 235), labels) for images, labels in minibatches(sizes))
    slow_gradalign(theirs, batches, weight=0.5, every=every, through=through)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=1e-6, msg=name)
    assert counts[0] == (6, 12)
    assert counts[1] == (6, 6 if every == 2 else 12)


def test_the_term_matters_and_lambda_zero_is_fgsm(small_network):
    networks = {}
    for weight in (0.0, 0.5, 5.0):
        networks[weight] = small_network(torch.float64)
        method = build(networks[weight], weight=weight)
        for images, labels in minibatches([6]):
            torch.manual_seed(0)
            method.train_minibatch(images, labels, len(images))
    first = [network[0].weight for network in networks.values()]
    assert not torch.allclose(first[0], first[1], atol=1e-5)
    assert not torch.allclose(first[1], first[2], atol=1e-5)


def test_the_term_aligns_gradients(small_network):
    """Trained on one minibatch with a large lambda, the gradients turn the same way."""

    def misalignment(weight):
        network = small_network(torch.float64)
        method = build(network, weight=weight)
        ((images, labels),) = minibatches([6])
        for _ in range(25):
            method.train_minibatch(images, labels, len(images))
        learner = method.learner
        clean = learner.network_input(images)
        torch.manual_seed(0)
        g1 = learner.input_gradient(clean, labels)
        return method.misalignment_at(clean, labels, g1).item()

    assert misalignment(2.0) < 0.5 * misalignment(0.0)


def test_attack_computes_no_weight_gradient(small_network):
    network = small_network(torch.float64)
    learner = build(network).learner
    seen = []
    for parameter in network.parameters():
        parameter.register_hook(seen.append)
    ((images, labels),) = minibatches([6])
    learner.input_gradient(learner.network_input(images), labels)
    assert not seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("through", ["second", "both"])
def test_half_precision_learns_and_is_never_nan(small_network, dtype, through):
    network = small_network()
    method = build(network, dtype, weight=0.2, through=through)
    if dtype is torch.float16:
        method.learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    ((images, labels),) = minibatches([6])
    losses = []
    for _ in range(40):
        method.train_minibatch(images, labels, len(images))
        losses.append(method.learner.meters.read(World(0, 1, torch.device("cpu"))).loss)
    assert all(torch.isfinite(p).all() for p in network.parameters())
    assert losses[-1] < 0.8 * losses[0]


def test_images_without_a_gradient_contribute_nothing(small_network):
    """A network that ignores its input: no NaN, no term."""
    network = small_network()
    with torch.no_grad():
        network[-1].weight.zero_()
    method = build(network, torch.float32)
    ((images, labels),) = minibatches([6])
    method.train_minibatch(images, labels, len(images))
    assert all(torch.isfinite(p).all() for p in network.parameters())
