"""Methods that were written for classifiers train a detector, as a slow loop does without padding.

The slow loop knows no padding: it hands torchvision a list of images of different sizes.
"""

from __future__ import annotations

import pytest
import torch

import slow_advprop
import slow_steps as slow
from freeadv_fast.distributed.shuffle import global_permutation
from freeadv_fast.methods.fast_advprop import FastAdvProp
from freeadv_fast.methods.fgsm import Fgsm
from freeadv_fast.methods.free import Free
from freeadv_fast.methods.natural import Natural
from freeadv_fast.methods.pgd import Pgd
from freeadv_fast.models.batch_norm import DualNetwork, add_auxiliary_bn, apply_bn_groups
from freeadv_fast.step.objects import Objects
from slow_detection import SUM, SlowBranches, SlowDetector, build_learner
from small_detector import SIDE, minibatches, small_detector

EPS, STEP = 8, 3


def is_image(targets):
    """(n, H, W, 1) bool."""
    return Objects.of(targets).is_image(SIDE, SIDE).permute(0, 2, 3, 1)


@pytest.fixture(params=["l1", "giou"])
def networks(request):
    """The same detector twice."""
    return [small_detector(torch.float64, request.param) for _ in range(2)]


def test_natural_training_equals_the_slow_loop(networks):
    ours, theirs = networks
    method, trainer = Natural(build_learner(ours)), SlowDetector(theirs)
    for images, targets in minibatches(2):
        method.train_minibatch(images, targets, len(images))
        trainer.step(trainer.loss(images, 0, targets))
    slow.assert_equal_networks(ours, theirs)
    assert slow.total_passes(method) == 12


def test_free_training_equals_the_slow_loop_and_never_moves_padding(networks):
    ours, theirs = networks
    shape = (6, SIDE, SIDE, 3)
    method = Free(
        build_learner(ours), slow.threat(EPS, STEP), m=2,
        minibatch_shape=shape, device=torch.device("cpu"),
    )  # fmt: skip
    trainer, delta = SlowDetector(theirs), torch.zeros(shape, dtype=torch.float64)
    for images, targets in minibatches(2):
        method.train_minibatch(images, targets, len(images))
        for _ in range(2):
            leaf = delta.clone().requires_grad_()
            loss = trainer.loss(images, leaf, targets)
            gradient, *others = torch.autograd.grad(loss, [leaf, *theirs.parameters()])
            trainer.descend(others)
            delta = (delta + STEP * gradient.sign()).clamp(-EPS, EPS)
    slow.assert_equal_networks(ours, theirs)
    assert torch.equal(method.delta.double(), delta)
    padding = ~is_image(targets)  # of each minibatch: their images have the same sizes
    assert padding.any()
    assert method.delta.masked_select(padding).count_nonzero() == 0
    assert method.delta.masked_select(~padding).count_nonzero() > 0


@pytest.mark.parametrize("sync_speed", [True, False])
def test_fast_advprop_equals_the_slow_loop(sync_speed, world):
    num_adv, num_images, groups = 4, 10, (2, 2)
    network = small_detector(torch.float64)
    reference = SlowBranches(small_detector(torch.float64))
    apply_bn_groups(network, 3)
    net = DualNetwork(add_auxiliary_bn(network, 2)).train()

    def shuffle(images, targets, update):
        return world.shuffle(images, targets, seed=7, step=update)

    method = FastAdvProp(
        build_learner(network, net), slow.threat(EPS, EPS), p_adv=num_adv / num_images,
        sync_speed=sync_speed, shuffle=shuffle,
    )  # fmt: skip
    for update, (images, targets) in enumerate(minibatches(2, num_images)):
        torch.manual_seed(update)
        delta = method.threat.uniform_delta(images[:num_adv])
        torch.manual_seed(update)
        passes = method.train_minibatch(images, targets, num_images)
        slow_advprop.slow_fast_advprop(
            reference, images, targets, delta, global_permutation([num_adv], seed=7, step=update),
            num_adv=num_adv, groups=groups, eps=EPS, step=EPS, lr=slow.LR / (1 + update),
            sync_speed=sync_speed,
        )  # fmt: skip
    assert passes == (num_images + num_adv, 0)
    found = dict(network.named_parameters())
    for name, value in reference.parameters.items():
        branch, _, rest = name.rpartition(":")
        if branch == "auxiliary":
            rest = "{}.aux_bn.{}".format(*rest.rsplit(".", 1))
        torch.testing.assert_close(found[rest], value, rtol=0, atol=1e-6, msg=name)
    reading = method.learner.meters.read(world)
    assert reading.passes == 2 * (num_images + num_adv)


def gradients_of(trainer, images, leaf, targets, parts):
    """Of each loss from a pass of its own; running statistics move in the first alone."""
    gradients, moved = [], None
    for part in parts:
        loss = trainer.loss(images, leaf, targets, part)
        gradients += torch.autograd.grad(loss, leaf)
        moved = moved or {n: b.clone() for n, b in trainer.network.named_buffers()}
        trainer.network.load_state_dict(moved, strict=False)
    return gradients


@pytest.mark.parametrize(
    ("attack_loss", "parts"),
    [("sum", [SUM]), ("classification", [SUM[:1]]), ("box", [SUM[1:]]),
     ("stronger", [SUM[:1], SUM[1:]])],
)  # fmt: skip
def test_pgd_equals_the_slow_loop_whatever_it_ascends(attack_loss, parts):
    ours, theirs = (small_detector(torch.float64) for _ in range(2))
    for detector in (ours, theirs):  # so that neither loss is the stronger one of all images
        detector.head.regression_head.bbox_reg.weight.data.mul_(0.1)
    learner = build_learner(ours, attack_loss=attack_loss)
    method = Pgd(learner, slow.threat(EPS, STEP), attack_steps=2, start="zero")
    trainer, chosen_of_all = SlowDetector(theirs), set()
    for images, targets in minibatches(1):
        method.train_minibatch(images, targets, len(images))
        delta = torch.zeros(images.shape, dtype=torch.float64)
        for _ in range(2):
            leaf = delta.clone().requires_grad_()
            gradients = gradients_of(trainer, images, leaf, targets, parts)
            # Of each image the direction along which all of its loss rises most, to first order.
            rises = [(sum(gradients) * own.sign()).sum((1, 2, 3)) for own in gradients]
            chosen = [int(torch.stack(of_image).argmax()) for of_image in zip(*rises, strict=True)]
            direction = torch.stack([gradients[k][i].sign() for i, k in enumerate(chosen)])
            chosen_of_all.update(chosen)
            delta = (delta + STEP * direction).clamp(-EPS, EPS)
            delta = slow.in_pixel_range(delta, images)
        trainer.step(trainer.loss(images, delta, targets))
    assert len(chosen_of_all) == len(parts)  # each is the stronger one of some image
    slow.assert_equal_networks(ours, theirs)


def build_fgsm(learner):
    return Fgsm(learner, slow.threat(EPS, 1.25 * EPS), start="uniform")


def build_pgd(learner):
    return Pgd(learner, slow.threat(EPS, STEP), attack_steps=2, start="uniform")


@pytest.mark.parametrize("build", [build_fgsm, build_pgd])
def test_random_starts_show_the_network_no_padding(build):
    """Their noise is everywhere; what the network sees is 0 at padding in every pass."""
    network, seen = small_detector(), []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    method = build(build_learner(network, dtype=torch.float32))
    ((images, targets),) = minibatches(1)
    method.train_minibatch(images, targets, len(images))
    clean, inside = method.learner.network_input(images), is_image(targets).permute(0, 3, 1, 2)
    assert len(seen) == 2 + (build is build_pgd)
    for x in seen:
        assert x.masked_select(~inside).count_nonzero() == 0
        assert ((x != clean) & inside).sum() > inside.sum()  # of three channels, most
    assert method.attack(images, targets).masked_select(~is_image(targets)).count_nonzero() > 0


def test_never_waits_for_the_device(world):
    network = small_detector()
    net = DualNetwork(add_auxiliary_bn(network, 2)).train()
    learner = build_learner(network, net, torch.float32)
    ((images, targets),) = minibatches(1)
    with slow.HostReads() as reads:
        FastAdvProp(learner, slow.threat(1, 1), p_adv=0.5).train_minibatch(images, targets, 6)
    assert reads.count == 0


def test_half_precision_learns(world):
    network = small_detector()
    method = Natural(build_learner(network, dtype=torch.bfloat16))
    method.learner.lr_at = lambda update: 0.02
    ((images, targets),) = minibatches(1)
    losses = []
    for _ in range(6):
        method.train_minibatch(images, targets, len(images))
        losses.append(method.learner.meters.read(world).loss)
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.isfinite(p).all() for p in network.parameters())


def test_fp16_overflow_moves_no_weight():
    network = small_detector()
    learner = build_learner(network, dtype=torch.float16)
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [p.detach().clone() for p in network.parameters()]
    ((images, targets),) = minibatches(1)
    Natural(learner).train_minibatch(images, targets, len(images))
    assert learner.scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))
