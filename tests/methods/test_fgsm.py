"""FGSM, FGSM-RS and N-FGSM against slow loops written from the papers."""

import pytest
import torch

import slow_steps as slow
from freeadv_fast.methods.fgsm import Fgsm

EPS = 8
ALPHA = {"zero": 8, "uniform": 10, "noisy": 8}


def build(network, start, dtype=torch.float64, **options):
    learner = slow.build_learner(network, dtype)
    return Fgsm(learner, slow.threat(EPS, ALPHA[start]), start=start, **options)


def slow_fgsm(network, start, *, k=2):
    """One step from the start that the paper names, and SGD; returns the last perturbation."""
    trainer = slow.SlowTrainer(network)
    for images, labels in slow.minibatches():
        if start == "zero":
            delta = torch.zeros(images.shape, dtype=torch.float64)
        else:
            delta = slow.uniform(images, EPS if start == "uniform" else k * EPS)
        gradient = trainer.loss_gradient(images, delta, labels)
        delta = delta + ALPHA[start] * gradient.sign()
        if start != "noisy":
            delta = delta.clamp(-EPS, EPS)
        trainer.step(trainer.loss(images, delta, labels))
    return delta


@pytest.mark.parametrize("start", ["zero", "uniform", "noisy"])
def test_equals_the_slow_loop(small_network, start):
    """Weights and running statistics over two epochs with a smaller last minibatch."""
    ours, theirs = small_network(torch.float64), small_network(torch.float64)
    method = build(ours, start)
    torch.manual_seed(7)
    for images, labels in slow.minibatches():
        assert method.train_minibatch(images, labels, len(images)) == (len(images), len(images))
    torch.manual_seed(7)
    slow_fgsm(theirs, start)
    slow.assert_equal_networks(ours, theirs)
    assert slow.total_passes(method) == sum(slow.SIZES)


def test_n_fgsm_with_another_k(small_network):
    ours, theirs = small_network(torch.float64), small_network(torch.float64)
    method = build(ours, "noisy", noise=1.0)
    torch.manual_seed(7)
    for images, labels in slow.minibatches():
        method.train_minibatch(images, labels, len(images))
    torch.manual_seed(7)
    slow_fgsm(theirs, "noisy", k=1)
    slow.assert_equal_networks(ours, theirs)


def test_the_ball_holds_for_fgsm_rs_and_not_for_n_fgsm(small_network):
    """On grey images, where no clip interferes, N-FGSM reaches up to 3 eps."""
    images = torch.full((6, 8, 8, 3), 128, dtype=torch.uint8)
    labels = torch.arange(6) % 5
    reached = {}
    for start in ALPHA:
        delta = build(small_network(torch.float64), start).attack(images, labels)
        reached[start] = float(delta.abs().max())
    assert reached["zero"] == EPS
    assert reached["uniform"] == EPS
    assert 2.5 * EPS < reached["noisy"] <= 3 * EPS


@pytest.mark.parametrize("start", ["zero", "uniform", "noisy"])
def test_the_attack_computes_no_weight_gradient(small_network, start):
    """Hooks see nothing; running statistics move, as in the authors' code."""
    network = small_network(torch.float64)
    method, seen = build(network, start), slow.watch_weight_gradients(network)
    before = network[1].running_mean.clone()
    ((images, labels),) = slow.minibatches([6])
    method.attack(images, labels)
    assert not seen
    assert all(p.grad is None for p in network.parameters())
    assert not torch.equal(network[1].running_mean, before)


@pytest.mark.parametrize("start", ["zero", "uniform", "noisy"])
def test_never_waits_for_the_device(small_network, start):
    slow.assert_never_reads(build(small_network(), start, torch.float32))


@pytest.mark.parametrize("start", ["zero", "noisy"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns(small_network, dtype, start):
    slow.assert_learns(build(small_network(), start, dtype))


@pytest.mark.parametrize("start", ["zero", "uniform", "noisy"])
def test_fp16_overflow_moves_no_weight(small_network, start):
    slow.assert_overflow_moves_no_weight(build(small_network(), start, torch.float16))


def test_fp16_attacks_still_move_at_the_scale_of_a_long_run(small_network):
    """The scaler reaches 2^17 after 2,000 good steps; 256 images then still have gradients."""
    method = build(small_network(), "zero", torch.float16)
    learner = method.learner
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (256, 8, 8, 3), generator=generator).to(torch.uint8)
    labels = torch.randint(0, 5, (256,), generator=generator)
    delta = method.attack(images, labels)
    assert learner.meters.nonfinite_gradients.item() == 0
    assert (delta != 0).float().mean() > 0.5


@pytest.mark.parametrize("start", ["zero", "uniform", "noisy"])
def test_warm_up_shortens_the_step(small_network, start):
    """A quarter of the way through the warm-up the step is a quarter of its length."""
    images = torch.full((6, 8, 8, 3), 128, dtype=torch.uint8)
    labels = torch.arange(6) % 5
    method = build(small_network(torch.float64), start)
    torch.manual_seed(0)
    noise = method.noise.uniform_delta(images) if start != "zero" else torch.zeros(images.shape)
    torch.manual_seed(0)
    moved = (method.attack(images, labels, 0.25) - noise).abs()
    torch.testing.assert_close(moved.max(), torch.tensor(ALPHA[start] / 4))
