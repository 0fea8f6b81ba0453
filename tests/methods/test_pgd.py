"""PGD training against a slow loop, and the geometry of the L2 ball."""

import pytest
import torch

import slow_steps as slow
from freeadv_fast.config.threat import L2ThreatModel, Perturbation
from freeadv_fast.methods.pgd import Pgd

THREATS = {"linf": slow.threat(8, 3), "l2": slow.l2_threat(60, 25)}


def build(network, norm, dtype=torch.float64, **options):
    return Pgd(slow.build_learner(network, dtype), THREATS[norm], **options)


def norms(delta):
    return delta.double().flatten(1).norm(dim=1)


def slow_ascent(delta, gradient, images, norm):
    """One step and both projections, image by image in L2."""
    eps, step = (float(p.levels) for p in (THREATS[norm].eps, THREATS[norm].step))
    if norm == "linf":
        delta = (delta + step * gradient.sign()).clamp(-eps, eps)
    else:
        rows = []
        for d, g in zip(delta, gradient, strict=True):
            moved = d + step * g / g.norm()
            rows.append(moved * min(1, eps / moved.norm()))
        delta = torch.stack(rows)
    return slow.in_pixel_range(delta, images)


def slow_start(images, norm):
    """A uniform point of the ball, in the order in which random numbers are drawn."""
    eps = float(THREATS[norm].eps.levels)
    if norm == "linf":
        return slow.uniform(images, eps)
    direction = torch.randn(images.shape).double()
    distance = eps * torch.rand(len(images)).double() ** (1 / 192)
    direction *= (distance / norms(direction)).view(-1, 1, 1, 1)
    return slow.in_pixel_range(direction, images)


@pytest.mark.parametrize("start", ["zero", "uniform"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_equals_the_slow_loop(small_network, norm, start):
    """Weights and running statistics over two epochs with a smaller last minibatch."""
    ours, theirs = small_network(torch.float64), small_network(torch.float64)
    method = build(ours, norm, attack_steps=4, start=start)
    torch.manual_seed(7)
    for images, labels in slow.minibatches():
        n = len(images)
        assert method.train_minibatch(images, labels, n) == (n, 4 * n)
    torch.manual_seed(7)
    trainer = slow.SlowTrainer(theirs)
    for images, labels in slow.minibatches():
        delta = torch.zeros(images.shape, dtype=torch.float64)
        if start == "uniform":
            delta = slow_start(images, norm)
        for _ in range(4):
            gradient = trainer.loss_gradient(images, delta, labels)
            delta = slow_ascent(delta, gradient, images, norm)
        trainer.step(trainer.loss(images, delta, labels))
    slow.assert_equal_networks(ours, theirs)
    assert slow.total_passes(method) == sum(slow.SIZES)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attacks_stay_in_the_ball_and_in_the_pixel_range(small_network, norm):
    ((images, labels),) = slow.minibatches([6])
    delta = build(small_network(torch.float64), norm, attack_steps=10).attack(images, labels)
    eps = float(THREATS[norm].eps.levels)
    lengths = norms(delta) if norm == "l2" else delta.abs()
    assert lengths.max() <= eps * (1 + 1e-6)
    assert lengths.max() > 0.8 * eps
    moved = images.double() + delta.double()
    assert 0 <= moved.min()
    assert moved.max() <= 255


def test_the_attack_computes_no_weight_gradient(small_network):
    network = small_network(torch.float64)
    seen = slow.watch_weight_gradients(network)
    ((images, labels),) = slow.minibatches([6])
    build(network, "l2", attack_steps=2).attack(images, labels)
    assert not seen
    assert all(p.grad is None for p in network.parameters())


def test_an_l2_step_has_its_length_in_pixels(small_network):
    """Grey images, one step from zero: along the gradient with respect to pixels, not inputs."""
    images, labels = torch.full((6, 8, 8, 3), 128, dtype=torch.uint8), torch.arange(6) % 5
    images += torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1)
    network = small_network(torch.float64)
    delta = build(network, "l2", attack_steps=1, start="zero").attack(images, labels).double()
    torch.testing.assert_close(norms(delta), torch.full((6,), 25.0).double(), rtol=1e-6, atol=0)
    trainer = slow.SlowTrainer(small_network(torch.float64))
    gradient = trainer.loss_gradient(images, torch.zeros_like(delta), labels)
    cosine = torch.cosine_similarity(delta.flatten(1), gradient.flatten(1))
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-6, atol=0)


def test_an_image_without_gradient_waits_and_bad_components_count_as_zero():
    """Also the smallest gradients, whose squares underflow, have a direction."""
    threat = slow.l2_threat(60, 25)
    gradient = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    gradient[1] = 0
    gradient[2] *= 1e-30
    gradient[3, 0, 0, 0], gradient[3, 1, 2, 3] = torch.nan, -torch.inf
    delta, nonfinite = torch.zeros(4, 8, 8, 3), torch.zeros(1, dtype=torch.int64)
    threat.ascend_(delta, gradient, nonfinite)
    torch.testing.assert_close(norms(delta), torch.tensor([25.0, 0, 25, 25]).double())
    assert nonfinite.item() == 2
    assert delta[3, 0, 0, 0] == 0
    assert delta[3, 2, 3, 1] == 0
    threat.ascend_(delta, gradient, nonfinite)
    threat.ascend_(delta, gradient, nonfinite)
    torch.testing.assert_close(norms(delta), torch.tensor([60.0, 0, 60, 60]).double())


def test_uniform_starts_fill_the_l2_ball():
    """(r / eps)^d is uniform in 0..1; a clipped start is only shorter."""
    threat = L2ThreatModel(Perturbation.parse("60/255"), Perturbation.parse("1/255"))
    images = torch.full((4000, 2, 2, 3), 128, dtype=torch.uint8)
    torch.manual_seed(0)
    share = (norms(threat.uniform_delta(images)) / 60) ** 12
    assert abs(share.mean() - 1 / 2) < 0.02
    assert abs(share.var() - 1 / 12) < 0.01
    torch.manual_seed(0)
    black = threat.uniform_delta(torch.zeros_like(images))
    assert (black >= 0).all()
    assert (norms(black) <= 60).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_never_waits_for_the_device(small_network, norm):
    slow.assert_never_reads(build(small_network(), norm, torch.float32))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns(small_network, dtype, norm):
    slow.assert_learns(build(small_network(), norm, dtype, attack_steps=3))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fp16_overflow_moves_no_weight(small_network, norm):
    slow.assert_overflow_moves_no_weight(build(small_network(), norm, torch.float16))
