"""TRADES and free-TRADES against slow loops written from the formula."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slow_steps as slow
from freeadv_fast.methods.trades import FreeTrades, Trades, divergence
from freeadv_fast.step.learner import evaluating_tree

THREATS = {"linf": slow.threat(8, 3), "l2": slow.l2_threat(60, 25)}
BETA = 3.0


def build(network, norm="linf", dtype=torch.float64, attack_steps=3):
    learner = slow.build_learner(network, dtype)
    return Trades(learner, THREATS[norm], attack_steps=attack_steps, beta=BETA)


def build_free(network, dtype=torch.float64, *, eps=8, step=8, m=3):
    return FreeTrades(
        slow.build_learner(network, dtype), slow.threat(eps, step), m=m, beta=BETA,
        minibatch_shape=(6, 8, 8, 3), device=torch.device("cpu"),
    )  # fmt: skip


def slow_divergence(clean_logits, adversarial_logits):
    """sum over the classes of p(x) log(p(x) / p(x + delta)), summed over the images."""
    p, q = clean_logits.softmax(1), adversarial_logits.softmax(1)
    return (p * (p / q).log()).sum()


def slow_attack(trainer, images, norm, steps):
    """Ascent of the divergence with a copy of the network in eval mode."""
    frozen = copy.deepcopy(trainer.network).eval()
    eps, step = (float(p.levels) for p in (THREATS[norm].eps, THREATS[norm].step))
    noise = torch.randn(images.shape) * 0.255
    delta = slow.in_pixel_range(noise.double(), images)
    clean_logits = frozen(trainer.x(images, torch.zeros_like(delta))).detach()
    for _ in range(steps):
        delta.requires_grad_()
        kl = slow_divergence(clean_logits, frozen(trainer.x(images, delta)))
        (gradient,) = torch.autograd.grad(kl, delta)
        delta = delta.detach()
        if norm == "linf":
            delta = (delta + step * gradient.sign()).clamp(-eps, eps)
        else:
            delta = delta + step * F.normalize(gradient.flatten(1)).view_as(delta)
            lengths = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            delta = delta * (eps / lengths).clamp(max=1)
        delta = slow.in_pixel_range(delta, images)
    return delta


def slow_loss(trainer, images, delta, labels):
    clean_logits = trainer.network(trainer.x(images, torch.zeros_like(delta)))
    adversarial_logits = trainer.network(trainer.x(images, delta))
    kl = slow_divergence(clean_logits, adversarial_logits)
    return F.cross_entropy(clean_logits, labels) + BETA * kl / len(images)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_equals_the_slow_loop(small_network, norm):
    """Weights and running statistics over two epochs with a smaller last minibatch."""
    ours, theirs = small_network(torch.float64), small_network(torch.float64)
    method = build(ours, norm)
    torch.manual_seed(7)
    for images, labels in slow.minibatches():
        n = len(images)
        assert method.train_minibatch(images, labels, n) == (2 * n, 3 * n)
    torch.manual_seed(7)
    trainer = slow.SlowTrainer(theirs)
    for images, labels in slow.minibatches():
        delta = slow_attack(trainer, images, norm, 3)
        trainer.step(slow_loss(trainer, images, delta, labels))
    slow.assert_equal_networks(ours, theirs)
    assert slow.total_passes(method) == 2 * sum(slow.SIZES)


def test_the_divergence_is_from_clean_to_adversarial():
    """KL(p || q) = sum p log(p / q) by hand; swapped it is another number."""
    clean, adversarial = torch.tensor([[2.0, 0, 0]]), torch.tensor([[0.0, 0, 1]])
    p, q = clean.softmax(1)[0].tolist(), adversarial.softmax(1)[0].tolist()
    by_hand = sum(a * torch.tensor(a / b).log() for a, b in zip(p, q, strict=True))
    torch.testing.assert_close(divergence(clean, adversarial), by_hand)
    assert abs(divergence(adversarial, clean) - by_hand) > 0.05


def test_the_divergence_reaches_the_weights_through_both_arguments():
    clean = torch.randn(4, 5, requires_grad=True)
    adversarial = torch.randn(4, 5, requires_grad=True)
    divergence(clean, adversarial).backward()
    assert clean.grad.abs().min() > 0
    torch.testing.assert_close(adversarial.grad, (adversarial.softmax(1) - clean.softmax(1)))


def test_the_attack_moves_no_statistics_and_computes_no_weight_gradient(small_network):
    """It runs in eval mode, and no module changes its mode for it."""
    network = small_network(torch.float64)
    method, seen = build(network), slow.watch_weight_gradients(network)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    ((images, _),) = slow.minibatches([6])
    delta = method.attack(images, method.learner.network_input(images))
    assert delta.abs().max() == 8
    assert not seen
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(b, before[name]) for name, b in network.named_buffers())
    assert all(module.training for module in network.modules())


def test_the_attack_raises_the_divergence(small_network):
    network = small_network(torch.float64)
    method = build(network, attack_steps=5)
    ((images, _),) = slow.minibatches([6])
    clean = method.learner.network_input(images)
    noise = torch.randint(0, 2, images.shape) * 16.0 - 8

    def kl(delta):
        x = method.learner.network_input(images, delta)
        logits = (method.learner.forward(y, evaluating=True) for y in (clean, x))
        return divergence(*logits)

    delta = method.attack(images, clean)
    with torch.no_grad():
        assert kl(delta) > 3 * kl(noise)


def test_the_evaluating_tree_shares_every_tensor():
    """It follows later updates; dropout is off in it and on in the network."""
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 2, 1)))
    twin = evaluating_tree(network)
    x = torch.randn(4, 3, 5, 5)
    network(x)
    with torch.no_grad():
        network[1][1].weight.mul_(2)
    network.eval()
    expected = network(x)
    network.train()
    assert torch.equal(twin(x), expected)
    assert not torch.equal(network(x), expected)
    assert twin.state_dict().keys() == network.state_dict().keys()


@pytest.mark.parametrize(("eps", "step"), [(8, 8), (3, 2)])
def test_free_trades_equals_the_slow_loop(small_network, eps, step):
    """Replays with one gradient for weights and delta, which carries over."""
    ours, theirs = small_network(torch.float64), small_network(torch.float64)
    torch.manual_seed(7)
    method = build_free(ours, eps=eps, step=step)
    delta = (method.delta.double() * method.unit).clone()
    assert (delta.abs() == min(eps, step)).all()
    trainer = slow.SlowTrainer(theirs)
    for images, labels in slow.minibatches():
        n = len(images)
        assert method.train_minibatch(images, labels, n) == (6 * n, 0)
        for _ in range(3):
            d = delta[:n].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(slow_loss_once(trainer, images, d, labels), d)
            trainer.step(slow_loss(trainer, images, delta[:n], labels))
            delta[:n] = (delta[:n] + step * gradient.sign()).clamp(-eps, eps)
    torch.testing.assert_close(method.delta.double() * method.unit, delta, rtol=0, atol=1e-6)
    slow.assert_equal_networks(ours, theirs)
    assert slow.total_passes(method) == 6 * sum(slow.SIZES)


def slow_loss_once(trainer, images, delta, labels):
    """The loss with a copy of the network, so that the running statistics move once only."""
    twin = slow.SlowTrainer(copy.deepcopy(trainer.network))
    return slow_loss(twin, images, delta, labels)


def test_free_trades_starts_in_both_directions_and_continues_from_a_state(small_network):
    torch.manual_seed(7)
    method = build_free(small_network(torch.float64))
    assert method.delta.dtype is torch.int8
    assert method.delta.unique().tolist() == [-1, 1]
    other = build_free(small_network(torch.float64))
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.delta, method.delta)


@pytest.mark.parametrize("make", [build, build_free])
def test_never_waits_for_the_device(small_network, make):
    slow.assert_never_reads(make(small_network(), dtype=torch.float32))


@pytest.mark.parametrize("make", [build, build_free])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns(small_network, dtype, make):
    slow.assert_learns(make(small_network(), dtype=dtype))


@pytest.mark.parametrize("make", [build, build_free])
def test_fp16_overflow_moves_no_weight(small_network, make):
    options = {"m": 1} if make is build_free else {}
    slow.assert_overflow_moves_no_weight(make(small_network(), dtype=torch.float16, **options))
