"""Fast AdvProp against a slow loop written from the paper."""

import numpy as np
import pytest
import torch

import slow_advprop as slow
from freeadv_fast.config.threat import Perturbation, ThreatModel
from freeadv_fast.distributed.shuffle import global_permutation
from freeadv_fast.distributed.world import World
from freeadv_fast.methods.fast_advprop import FastAdvProp
from freeadv_fast.models.batch_norm import DualNetwork, add_auxiliary_bn, apply_bn_groups
from freeadv_fast.step.learner import Learner, Pixels
from freeadv_fast.step.optim import build_sgd

SEED, NUM_CLEAN, NUM_ADV, MAIN_GROUP, AUX_GROUP = 7, 12, 6, 6, 2


def threat(eps, step):
    return ThreatModel(Perturbation.parse(f"{eps}/255"), Perturbation.parse(f"{step}/255"))


def minibatches(number):
    generator = torch.Generator().manual_seed(2)
    for _ in range(number):
        images = torch.randint(-60, 316, (NUM_CLEAN + NUM_ADV, 8, 8, 3), generator=generator)
        labels = torch.randint(0, 5, (NUM_CLEAN + NUM_ADV,), generator=generator)
        yield images.clamp(0, 255).to(torch.uint8), labels


def build_learner(network, dtype=torch.float64):
    apply_bn_groups(network, MAIN_GROUP)
    net = DualNetwork(add_auxiliary_bn(network, AUX_GROUP)).train()
    optimizer = build_sgd(
        network, lr=slow.LR, momentum=slow.MOMENTUM, weight_decay=slow.DECAY, decay="all"
    )
    return Learner(net, optimizer, lambda update: slow.LR / (1 + update),
                   Pixels(slow.MEAN, slow.STD, dtype))  # fmt: skip


def build(network, eps=8, step=8, *, shuffled=True, dtype=torch.float64, **options):
    world = World(0, 1, torch.device("cpu"))

    def shuffle(images, labels, update):
        return world.shuffle(images, labels, seed=SEED, step=update)

    return FastAdvProp(
        build_learner(network, dtype), threat(eps, step), p_adv=NUM_ADV / (NUM_CLEAN + NUM_ADV),
        shuffle=shuffle if shuffled else None, **options,
    )  # fmt: skip


def assert_same_parameters(network, reference, tolerance):
    plain = dict(network.named_parameters())
    for name, value in reference.parameters.items():
        branch, _, rest = name.rpartition(":")
        if branch == "auxiliary":
            layer, leaf = rest.rsplit(".", 1)
            rest = f"{layer}.aux_bn.{leaf}"
        torch.testing.assert_close(
            plain[rest].detach(), value.detach(), rtol=0, atol=tolerance, msg=name
        )


@pytest.mark.parametrize(
    ("eps", "step", "options"),
    [
        (8, 8, {}),
        (1, 1, {}),
        (3, 2, {"sync_speed": False}),
        (8, 8, {"noise_weight": 1.0, "adv_weight": 1.0}),
        (8, 8, {"uniform_start": False}),
    ],
    ids=["large", "paper", "no-sync", "no-rebalance", "zero-start"],
)
def test_equals_the_slow_loop(small_network, eps, step, options):
    """Every parameter of every group after three updates; 1e-6 of fp64 (the noise is fp32)."""
    network, reference = small_network(torch.float64), slow.SlowNetwork(small_network().double())
    method = build(network, eps, step, **options)
    for update, (images, labels) in enumerate(minibatches(3)):
        torch.manual_seed(update)
        if method.uniform_start:
            delta = method.threat.uniform_delta(images[:NUM_ADV])
        else:
            delta = torch.zeros(NUM_ADV, 8, 8, 3)
        torch.manual_seed(update)
        passes = method.train_minibatch(images, labels, len(images))
        slow.slow_fast_advprop(
            reference, images, labels, delta,
            global_permutation([NUM_ADV], seed=SEED, step=update),
            num_adv=NUM_ADV, groups=(NUM_CLEAN // MAIN_GROUP, NUM_ADV // AUX_GROUP),
            eps=eps, step=step, lr=slow.LR / (1 + update),
            weights=(options.get("noise_weight", 0.5), options.get("adv_weight", 0.5)),
            sync_speed=options.get("sync_speed", True),
        )  # fmt: skip
    assert passes == (NUM_CLEAN + 2 * NUM_ADV, 0)
    assert_same_parameters(network, reference, 1e-6)


def test_every_parameter_group_moves_and_the_shuffle_matters(small_network):
    """What the equality above rests on: without the permutation the weights are others."""
    shuffled, still = small_network(torch.float64), small_network(torch.float64)
    for network, is_shuffled in ((shuffled, True), (still, False)):
        method = build(network, shuffled=is_shuffled)
        torch.manual_seed(0)
        for images, labels in minibatches(1):
            method.train_minibatch(images, labels, len(images))
    fresh = small_network(torch.float64)
    first = dict(fresh.named_parameters())
    for name, parameter in shuffled.named_parameters():
        assert not torch.equal(parameter, first[name.replace(".aux_bn.", ".")]), name
    assert not torch.equal(shuffled[0].weight, still[0].weight)
    assert sorted(global_permutation([NUM_ADV], seed=SEED, step=0)) == list(range(NUM_ADV))
    assert not np.array_equal(global_permutation([NUM_ADV], seed=SEED, step=0), range(NUM_ADV))


def test_clean_images_leave_the_auxiliary_statistics_alone_and_vice_versa(small_network):
    """One share is exchanged for another one: only its own branch's statistics change."""

    def statistics(images, labels):
        network = small_network()
        method = build(network, dtype=torch.float32)
        torch.manual_seed(0)
        method.train_minibatch(images, labels, len(images))
        return {n: b.clone() for n, b in network.named_buffers() if b.is_floating_point()}

    ((images, labels),) = minibatches(1)
    before = statistics(images, labels)
    for changed_rows, is_auxiliary in (
        (slice(NUM_ADV, None), False),
        (slice(0, NUM_ADV), True),
    ):
        others = images.clone()
        others[changed_rows] = 255 - others[changed_rows]
        after = statistics(others, labels)
        for name, value in after.items():
            is_moved = not torch.equal(value, before[name])
            assert is_moved is ((".aux_bn." in name) is is_auxiliary), name


def test_auxiliary_statistics_take_two_updates_a_step_and_main_ones_take_one(small_network):
    network = small_network()
    method = build(network, dtype=torch.float32, attack_steps=1)
    for images, labels in minibatches(2):
        method.train_minibatch(images, labels, len(images))
    assert network[1].num_batches_tracked.item() == 2
    assert network[1].aux_bn.num_batches_tracked.item() == 4


@pytest.mark.parametrize(
    ("eps", "step", "uniform", "dtype"),
    [
        ("1/255", "1/255", False, torch.uint8),
        ("4/255", "2/255", False, torch.uint8),
        ("2/255", "2.5/255", False, torch.float16),
        ("1/255", "1/255", True, torch.float16),
    ],
)
def test_images_travel_in_the_smallest_exact_form(small_network, eps, step, uniform, dtype):
    method = build(small_network(), uniform_start=uniform)
    method.threat = ThreatModel(Perturbation.parse(eps), Perturbation.parse(step))
    ((images, _),) = minibatches(1)
    delta, unit = method.start(images)
    if not uniform:
        delta = torch.randint(-1, 2, images.shape).to(delta.dtype)
    found = method.perturbed(images, delta, unit)
    exact = (images.double() + delta.double() * unit).clamp(0, 255)
    assert found.dtype is dtype
    tolerance = 0 if dtype is torch.uint8 else 1 / 16
    assert (found.double() - exact).abs().max() <= tolerance
    assert found.is_contiguous()


def test_the_start_is_uniform_in_the_ball_and_in_the_pixel_range():
    images = torch.tensor([0, 1, 128, 254, 255], dtype=torch.uint8).repeat(4000, 1)
    delta = threat(4, 4).uniform_delta(images)
    moved = images + delta
    assert moved.min() >= 0
    assert moved.max() <= 255
    assert delta.abs().max() <= 4
    inner = delta[:, 2]
    assert abs(inner.mean()) < 0.15
    assert abs(inner.std() - 8 / 12**0.5) < 0.1
    assert (moved[:, 0] == 0).float().mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns(small_network, dtype):
    network = small_network()
    method = build(network, 2, 2, dtype=dtype, kind_of_mix="none")
    method.learner.lr_at = lambda update: 0.02
    ((images, labels),) = minibatches(1)
    losses = []
    for _ in range(12):
        method.train_minibatch(images, labels, len(images))
        losses.append(method.learner.meters.read(World(0, 1, torch.device("cpu"))).loss)
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.isfinite(p).all() for p in network.parameters())


def test_meters_keep_the_roles_apart(small_network):
    method = build(small_network(), dtype=torch.float32)
    for images, labels in minibatches(2):
        method.train_minibatch(images, labels, len(images))
    reading = method.learner.meters.read(World(0, 1, torch.device("cpu")))
    assert set(reading.accuracy) == {"clean", "noise", "adversarial"}
    assert reading.passes == 2 * (NUM_CLEAN + 2 * NUM_ADV)
