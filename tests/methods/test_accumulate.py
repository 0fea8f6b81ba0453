"""Updates made in parts: N minibatches of B are one of N * B with batch norm in groups of B."""

import copy
import itertools

import pytest
import torch
from torch import nn

import slow_steps as slow
from freeadv_fast.config.method_names import DUAL, METHODS
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.threat import Perturbation, ThreatModel
from freeadv_fast.methods.build import build_method
from freeadv_fast.models.batch_norm import apply_bn_groups
from freeadv_fast.session.changes import for_ranks

BATCH = 4
# Whole updates of two minibatches, and a smaller one in parts of 3 and 2 images.
SIZES = [8, 8, 5, 8]
OPTIONS = {
    "natural": {"m": 2, "mix": "mixup"},
    "free": {"m": 2},
    "free-trades": {"m": 2},
    "gradalign": {"reg_every": 2, "reg_lambda": 0.5},
    "elle": {"reg_lambda": 30.0},
}
ACCUMULATING = [method for method in METHODS if method not in DUAL]


def noise_by_image(threat, images):
    """Stands for noise: a function of the image, whatever else is in the part."""
    delta = (images.float() * 37 + 11) % 17 - 8
    return (images + delta).clamp(0, 255) - images


@pytest.fixture(autouse=True)
def _no_draws(monkeypatch):
    """Noise does not depend on how an update is divided."""
    monkeypatch.setattr(ThreatModel, "uniform_delta", noise_by_image)
    monkeypatch.setattr(torch, "rand", lambda *shape, **kind: torch.full(shape, 0.3, **kind))


def build(name, network, accumulate, batch_size, dtype=torch.float64, **changes):
    """A method as the trainer builds it. Running statistics stand still: a part moves them, too."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.0
    config = TrainConfig(
        method=name, image_size=8, batch_size=batch_size, accumulate=accumulate, attack_steps=2,
        eps=Perturbation.parse("8/255"), **{"m": 1} | OPTIONS.get(name, {}) | changes,
    )  # fmt: skip
    learner = slow.build_learner(network, dtype)
    return build_method(config, learner, torch.device("cpu"), num_classes=5)


def train(method, sizes=SIZES):
    """Each minibatch's passes."""
    torch.manual_seed(1)
    return [
        method.train_minibatch(images, labels, len(images))
        for images, labels in slow.minibatches(sizes)
    ]


def assert_equal_weights(method, other, tolerance):
    for a, b in zip(method.learner.net.parameters(), other.learner.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", [name for name in ACCUMULATING if name != "elle"])
def test_two_minibatches_are_one_of_twice_the_size(small_network, name):
    """Weights, momentum, what the method keeps, meters and counts."""
    parts = build(name, small_network(torch.float64), 2, BATCH)
    whole = build(name, apply_bn_groups(small_network(torch.float64), BATCH), 1, 2 * BATCH)
    before = copy.deepcopy(parts.learner.net)
    assert train(parts) == train(whole)
    assert_equal_weights(parts, whole, tolerance=1e-9)
    assert not torch.equal(before[0].weight, parts.learner.net[0].weight)
    for key, value in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[key], value)
    assert parts.learner.updates == whole.learner.updates
    sums = whole.learner.meters.sums
    torch.testing.assert_close(parts.learner.meters.sums, sums, rtol=1e-7, atol=0)
    assert slow.total_passes(parts) > 0


@pytest.mark.parametrize("adaptive", [False, True])
def test_elle_judges_the_error_of_a_whole_update(small_network, adaptive, monkeypatch):
    """An image's three points lie in one group or another, so that both sides need groups."""
    kinds = itertools.cycle([noise_by_image, lambda threat, images: -images.float() // 64])
    monkeypatch.setattr(ThreatModel, "uniform_delta", lambda *of: next(kinds)(*of))
    networks = [apply_bn_groups(small_network(torch.float64), BATCH) for _ in range(2)]
    parts = build("elle", networks[0], 2, BATCH, reg_adaptive=adaptive)
    whole = build("elle", networks[1], 1, 2 * BATCH, reg_adaptive=adaptive)
    parts.sensitivity = whole.sensitivity = 0.0  # any error above the mean is a jump
    sizes = [8] * 12
    assert train(parts, sizes) == train(whole, sizes)
    assert_equal_weights(parts, whole, tolerance=1e-9)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[key], value, rtol=1e-6, atol=0)
    assert float(whole.lam) > 0  # it has jumped
    assert not adaptive or float(whole.history[1]) > 0
    assert int(parts.history[0]) == (len(sizes) if adaptive else 0)


def test_each_part_has_its_own_statistics(small_network):
    """Without groups on the other side the two are not the same training."""
    parts = build("natural", small_network(torch.float64), 2, BATCH)
    whole = build("natural", small_network(torch.float64), 1, 2 * BATCH)
    train(parts), train(whole)
    assert (parts.learner.net[0].weight - whole.learner.net[0].weight).abs().max() > 1e-4


@pytest.mark.parametrize("name", ACCUMULATING)
def test_no_pass_has_more_images_than_a_minibatch_and_none_has_one(small_network, name):
    """Three points an image go through the network together in elle."""
    network, seen = small_network(torch.float64), []
    method = build(name, network, 3, 2)
    network[0].register_forward_hook(lambda layer, inputs, output: seen.append(len(output)))
    train(method, [6, 5, 3])
    assert min(seen) >= 2
    assert max(seen) <= 3 * (3 if name == "elle" else 1)  # five images are parts of 3 and 2


def test_one_minibatch_is_trained_as_it_is(small_network):
    """The method's own step gets the caller's own tensors."""
    method = build("pgd", small_network(torch.float64), 1, 8)
    descend, given = method.descend, []

    def noting(*inputs):
        given.extend(inputs[:2])
        descend(*inputs)

    method.descend = noting
    ((images, labels),) = slow.minibatches([8])
    method.train_minibatch(images, labels, 8)
    assert given[0] is images
    assert given[1] is labels


@pytest.mark.parametrize("name", ACCUMULATING)
def test_the_scaler_steps_once_an_update(small_network, name):
    """fp16 with a scale at which nothing overflows: it grows after as many updates, not parts."""
    method = build(name, small_network(), 2, BATCH, torch.float32)
    method.learner.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    train(method)
    assert method.learner.scaler.get_scale() == 4.0 * 2**method.learner.updates


def test_an_overflow_in_any_part_skips_the_update(small_network):
    network = small_network()
    method = build("natural", network, 2, BATCH, torch.float32, m=1, mix="none")
    method.learner.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    weight, calls = network[0].weight.detach().clone(), []

    def overflow(gradient):
        calls.append(None)
        return gradient * torch.inf if len(calls) == 1 else gradient

    network[0].weight.register_hook(overflow)
    train(method, [8])
    assert len(calls) == 2
    assert torch.equal(network[0].weight, weight)
    assert method.learner.scaler.get_scale() == 2.0


def test_a_failed_part_leaves_the_next_update_whole(small_network):
    method = build("natural", small_network(torch.float64), 2, BATCH)
    loss, failures = method.learner.loss, iter([False, True])

    def failing_loss(*arguments, **options):
        if next(failures, False):
            raise RuntimeError("once")
        return loss(*arguments, **options)

    method.learner.loss = failing_loss
    with pytest.raises(RuntimeError, match="once"):
        train(method, [8])
    again = build("natural", small_network(torch.float64), 2, BATCH)
    train(method), train(again)
    assert_equal_weights(method, again, tolerance=0)


def test_clean_accuracy_is_counted_a_minibatch_at_a_time(small_network):
    network, seen = small_network(torch.float64), []
    learner = build("natural", network, 3, BATCH).learner
    ((images, labels),) = slow.minibatches([10])
    learner.minibatch_size = None
    expected = learner.clean_hits(images, labels)
    network[0].register_forward_hook(lambda layer, inputs, output: seen.append(len(output)))
    learner.minibatch_size = BATCH
    assert learner.clean_hits(images, labels) == expected
    assert seen == [4, 4, 2]


def test_delta_has_a_row_for_each_image_of_an_update(small_network):
    assert build("free", small_network(), 3, BATCH).delta.shape == (12, 8, 8, 3)


def test_other_ranks_share_a_minibatch_and_accumulate_as_many():
    config = TrainConfig(batch_size=8, accumulate=3)
    shared = for_ranks(config, made_for=2, num_ranks=4)
    assert (shared.batch_size, shared.accumulate, 4 * shared.update_size) == (4, 3, 48)
