"""ELLE and ELLE-A against slow loops written from the paper."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import slow_steps as slow
from freeadv_fast.methods.elle import Elle
from freeadv_fast.models.batch_norm import apply_bn_groups

EPS = 8


def build(network, dtype=torch.float64, **options):
    return Elle(slow.build_learner(network, dtype), slow.threat(EPS, EPS), **options)


class SlowLambda:
    """ELLE-A's rule over a list of all errors so far."""

    def __init__(self, lambda_max, adaptive):
        self.value, self.lambda_max = 0.0 if adaptive else lambda_max, lambda_max
        self.adaptive, self.errors = adaptive, []

    def adapt(self, error):
        if not self.adaptive:
            return
        if len(self.errors) > 2 and error > np.mean(self.errors) + 2 * np.std(self.errors):
            self.value = self.lambda_max
        else:
            self.value *= 0.99
        self.errors.append(error)


def slow_elle(network, sizes, *, lambda_max, adaptive):
    trainer, lam, lambdas = slow.SlowTrainer(network), SlowLambda(lambda_max, adaptive), []
    for images, labels in slow.minibatches(sizes):
        zero = torch.zeros(images.shape, dtype=torch.float64)
        delta = EPS * trainer.loss_gradient(images, zero, labels).sign()
        loss = trainer.loss(images, delta, labels)
        x_a = trainer.x(images, slow.uniform(images, EPS))
        x_b = trainer.x(images, slow.uniform(images, EPS))
        a = torch.rand(len(images), dtype=torch.float64)
        w = a.view(-1, 1, 1, 1)
        logits = network(torch.cat([x_a, x_b, (1 - w) * x_a + w * x_b]))
        loss_a, loss_b, loss_c = (
            F.cross_entropy(part, labels, reduction="none") for part in logits.chunk(3)
        )
        error = ((loss_c - (1 - a) * loss_a - a * loss_b) ** 2).mean()
        trainer.step(loss, lam.value * error)
        lam.adapt(error.item())
        lambdas.append(lam.value)
    return lambdas


@pytest.mark.parametrize("adaptive", [False, True])
def test_equals_the_slow_loop(small_network, adaptive):
    """Weights, running statistics and every lambda over many minibatches, some smaller."""
    sizes = slow.SIZES * 5
    ours, theirs = small_network(torch.float64), small_network(torch.float64)
    method = build(ours, lambda_max=30.0, adaptive=adaptive)
    lambdas = []
    torch.manual_seed(7)
    for images, labels in slow.minibatches(sizes):
        n = len(images)
        assert method.train_minibatch(images, labels, n) == (4 * n, n)
        lambdas.append(float(method.lam))
    torch.manual_seed(7)
    expected = slow_elle(theirs, sizes, lambda_max=30.0, adaptive=adaptive)
    np.testing.assert_allclose(lambdas, expected, rtol=1e-5)
    slow.assert_equal_networks(ours, theirs)
    assert slow.total_passes(method) == 4 * sum(sizes)
    if adaptive:
        assert lambdas[0] == 0
        assert max(lambdas) == 30


def test_lambda_jumps_with_the_error_and_decays_without(small_network):
    """Against mean and standard deviation of a list; non-finite errors leave no trace there."""
    method = build(small_network(torch.float64))
    slow_lambda, generator = SlowLambda(4000.0, True), np.random.default_rng(0)
    jumps = 0
    for i in range(300):
        error = generator.lognormal() * (50 if i % 70 == 69 else 1)
        method.adapt(torch.tensor(error))
        slow_lambda.adapt(error)
        assert float(method.lam) == pytest.approx(slow_lambda.value, rel=1e-5)
        jumps += slow_lambda.value == 4000
    assert 4 <= jumps < 30
    history, lam = method.history.clone(), float(method.lam)
    for bad in (torch.nan, torch.inf):
        method.adapt(torch.tensor(bad))
    assert torch.equal(method.history, history)
    assert float(method.lam) == pytest.approx(lam * 0.99**2)


def test_a_linear_loss_has_no_error(small_network):
    """Two classes far apart: the cross-entropy of a wrong label is a difference of logits."""
    torch.manual_seed(3)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2)).double()
    with torch.no_grad():
        network[1].bias.copy_(torch.tensor([200.0, -200.0]))
    images = torch.full((6, 8, 8, 3), 128, dtype=torch.uint8)
    method = build(network)
    assert method.linearity_errors(images, torch.ones(6, dtype=torch.int64)).max() < 1e-20
    network = small_network(torch.float64)
    assert build(network).linearity_errors(images, torch.arange(6) % 5).max() > 1e-6


def test_continues_from_a_state(small_network):
    """lambda and its history; the next minibatches are the same."""
    networks = [small_network(torch.float64) for _ in range(2)]
    methods = [build(network, lambda_max=30.0) for network in networks]
    batches = list(slow.minibatches(slow.SIZES * 3))
    torch.manual_seed(7)
    for images, labels in batches[:9]:
        methods[0].train_minibatch(images, labels, len(images))
    networks[1].load_state_dict(networks[0].state_dict())
    methods[1].learner.load_state_dict(copy.deepcopy(methods[0].learner.state_dict()))
    methods[1].load_state_dict(methods[0].state_dict())
    for method in methods:
        torch.manual_seed(8)
        for images, labels in batches[9:]:
            method.train_minibatch(images, labels, len(images))
    slow.assert_equal_networks(*networks, tolerance=0)
    assert torch.equal(methods[0].lam, methods[1].lam)
    assert torch.equal(methods[0].history, methods[1].history)


def test_the_attack_computes_no_weight_gradient(small_network):
    """Hooks see the two terms of the loss, and no second derivative."""
    network = small_network(torch.float64)
    method, seen = build(network), slow.watch_weight_gradients(network)
    ((images, labels),) = slow.minibatches([6])
    method.fgsm.attack(images, labels)
    assert not seen
    method.train_minibatch(images, labels, 6)
    assert len(seen) == 2 * len(list(network.parameters()))


def test_trains_with_groups_of_one_minibatch(small_network):
    """x + delta is one batch-norm group, the three points are three."""
    slow.assert_learns(build(apply_bn_groups(small_network(), 6), torch.float32, lambda_max=1.0))


def test_starts_at_noise_like_n_fgsm(small_network):
    method = build(small_network(torch.float64), start="noisy")
    images = torch.full((6, 8, 8, 3), 128, dtype=torch.uint8)
    delta = method.fgsm.attack(images, torch.arange(6) % 5)
    assert delta.abs().max() > 2.5 * EPS


@pytest.mark.parametrize("adaptive", [False, True])
def test_never_waits_for_the_device(small_network, adaptive):
    slow.assert_never_reads(build(small_network(), torch.float32, adaptive=adaptive))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns(small_network, dtype):
    slow.assert_learns(build(small_network(), dtype, lambda_max=1.0, adaptive=False))


def test_fp16_overflow_moves_no_weight(small_network):
    slow.assert_overflow_moves_no_weight(build(small_network(), torch.float16))
