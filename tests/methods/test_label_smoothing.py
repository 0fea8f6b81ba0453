"""Smoothed labels in every method's loss, against targets written out, and in which attacks."""

import functools

import pytest
import torch
import torch.nn.functional as F

import slow_steps as slow
from freeadv_fast.config.method_names import DUAL, METHODS
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.errors import UserError
from freeadv_fast.methods.build import build_method
from freeadv_fast.methods.dat import phi
from freeadv_fast.models.batch_norm import DualNetwork, add_auxiliary_bn
from freeadv_fast.step.mixing import MixedLabels
from freeadv_fast.step.task import Classification

SHARE, BETA = 0.4, 3.0
# Methods whose attack ascends the loss that trains weights.
SMOOTHED = {"free", "fgsm", "fgsm-rs", "n-fgsm", "yopo", "fast-advprop"}
OPTIONS = {
    "gradalign": {"reg_every": 2},  # the term is not in the second update
    "elle": {"reg_adaptive": False, "reg_lambda": 0.0},
    "fast-advprop": {"p_adv": 0.5},
    "advprop": {"attack_start": "zero"},
}


def smoothed(logits, labels, share=SHARE):
    """Cross-entropy with the targets written out, summed over the images."""
    targets = torch.full_like(logits, share / logits.shape[1])
    targets[torch.arange(len(labels)), labels] += 1 - share
    return -(targets * logits.log_softmax(1)).sum()


def kl(p, q):
    """KL(softmax(p) || softmax(q)), summed over the images."""
    return (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum()


def loss_of(name, logits, labels):
    """A method's loss from the logits of its training passes, in their order."""
    match name:
        case "trades" | "free-trades":
            clean, adversarial = logits
            return (smoothed(clean, labels) + BETA * kl(clean, adversarial)) / len(labels)
        case "dat":
            return sum(smoothed(z, labels) for z in logits) / len(labels)
        case "elle":  # its term weighs nothing here
            return smoothed(logits[0], labels) / len(labels)
        case "fast-advprop":
            noise, clean, adversarial = logits
            halves = labels.chunk(2)
            weighed = 0.5 * (smoothed(noise, halves[0]) + smoothed(adversarial, halves[0]))
            return (weighed + smoothed(clean, halves[1])) / len(labels)
        case "advprop":
            clean, adversarial = logits
            weighed = smoothed(clean, labels) + 0.5 * smoothed(adversarial, labels)
            return weighed / (1.5 * len(labels))
    (only,) = logits
    return smoothed(only, labels) / len(labels)


def build(name, network, share, **changes):
    """A method as the trainer builds it, with smoothed labels."""
    if name in DUAL:
        network = DualNetwork(add_auxiliary_bn(network, 2))
    learner = slow.build_learner(network)
    learner.task = Classification(share)
    config = TrainConfig(
        method=name, image_size=8, batch_size=6, aux_bn_group=2, eps=Perturbation.parse("8/255"),
        sync_speed=False, trades_beta=BETA, **{"m": 1} | OPTIONS.get(name, {}) | changes,
    )  # fmt: skip
    return build_method(config, learner, torch.device("cpu"), num_classes=5)


def noting(learner):
    """Lists the inputs of passes for the weights, with their branches, as they are made."""
    seen, forward = [], learner.forward

    def noting_forward(x, branch=None, **options):
        if not options.get("attack") and not options.get("evaluating"):
            seen.append((x.detach().clone(), branch))
        return forward(x, branch, **options)

    learner.forward = noting_forward
    return seen


@pytest.mark.parametrize("name", METHODS)
def test_weights_descend_the_smoothed_loss(small_network, name):
    """To 1e-12, and the meters count it."""
    method = build(name, small_network(torch.float64), SHARE)
    learner = method.learner
    learner.updates = 1
    learner.apply_gradients = lambda: None
    seen = noting(learner)
    ((images, labels),) = slow.minibatches([6])
    method.train_minibatch(images, labels, 6)
    twin = small_network(torch.float64)
    twin = DualNetwork(add_auxiliary_bn(twin, 2)) if name in DUAL else twin
    logits = [twin(x) if branch is None else twin(x, branch) for x, branch in seen]
    loss = loss_of(name, logits, labels)
    expected = torch.autograd.grad(loss, list(twin.parameters()), materialize_grads=True)
    for ours, theirs in zip(learner.module.parameters(), expected, strict=True):
        found = torch.zeros_like(ours) if ours.grad is None else ours.grad
        torch.testing.assert_close(found, theirs, rtol=0, atol=1e-12)
    if len(logits) == 1:
        counted = learner.meters.sums[:, 0].sum()
        torch.testing.assert_close(counted, 6 * loss.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_which_attacks_ascend_it(small_network, name):
    """The first two updates' or passes' inputs differ where smoothing moves the attack."""
    inputs = []
    steps = {"attack_steps": 2}  # two of yopo's passes
    replays = {"m": 2} if name == "free" else {}
    for share in (0.0, 0.9):
        method = build(name, small_network(torch.float64), share, **steps, **replays)
        seen = noting(method.learner)
        method.learner.lr_at = lambda update: 0.0  # else free's second replay has other weights
        torch.manual_seed(7)
        ((images, labels),) = slow.minibatches([6])
        method.train_minibatch(images, labels, 6)
        inputs.append([x for x, _ in seen])
    is_same = all(torch.equal(a, b) for a, b in zip(*inputs, strict=True))
    assert is_same is (name not in SMOOTHED)


@pytest.mark.parametrize("share", [0.0, SHARE])
def test_the_learners_loss_is_torchs(small_network, share):
    """Of plain and of mixed labels, with gradients; without smoothing to the bit."""
    learner = slow.build_learner(small_network(torch.float64))
    learner.task = Classification(share)
    ((images, labels),) = slow.minibatches([6])
    mixed = MixedLabels(labels, labels.flip(0), 0.3)
    torchs = functools.partial(F.cross_entropy, reduction="sum", label_smoothing=share)
    x = learner.network_input(images)
    for asked, expected in (
        (labels, lambda z: torchs(z, labels)),
        (mixed, lambda z: 0.3 * torchs(z, mixed.own) + 0.7 * torchs(z, mixed.other)),
    ):
        values = []
        ours = functools.partial(learner.loss_sum, labels=asked, role="clean")
        for loss in (ours, expected):
            logits = learner.forward(x).detach().requires_grad_()
            value = loss(logits)
            value.backward()
            values.append((value.detach(), logits.grad))
        for mine, torchs_own in zip(*values, strict=True):
            torch.testing.assert_close(mine, torchs_own, rtol=0, atol=1e-12 if share else 0)


def test_terms_of_the_loss_keep_plain_labels(small_network):
    """GradAlign's second gradient and ELLE's errors of linearity."""
    ((images, labels),) = slow.minibatches([6])
    for name in ("gradalign", "elle"):
        found = []
        for share in (0.0, SHARE):
            method = build(name, small_network(torch.float64), share)
            torch.manual_seed(7)
            if name == "elle":
                found.append(method.linearity_errors(images, labels))
            else:
                clean = method.learner.network_input(images)
                found.append(method.differentiable_gradient(clean, labels))
        assert torch.equal(*found)


def test_unlabelled_images_have_no_label_to_smooth():
    """DAT's kl: labelled images' attacked term is smoothed, the others' divergence is not."""
    generator = torch.Generator().manual_seed(0)
    clean, adversarial = (torch.randn(4, 5, generator=generator).double() for _ in range(2))
    values = phi(clean, adversarial, torch.tensor([2, ~0, 0, ~4]), SHARE)
    for row, label in ((0, 2), (2, 0)):
        expected = smoothed(adversarial[row, None], torch.tensor([label]))
        torch.testing.assert_close(values[row], expected, rtol=0, atol=1e-12)
    for row in (1, 3):
        expected = kl(clean[row, None], adversarial[row, None])
        torch.testing.assert_close(values[row], expected, rtol=0, atol=1e-12)


def test_dat_smooths_with_unlabelled_images_too(small_network):
    """Where all are labelled both of its ways are one loss."""
    networks = [small_network(torch.float64) for _ in range(2)]
    ((images, labels),) = slow.minibatches([6])
    for network, has_marks in zip(networks, (False, True), strict=True):
        method = build("dat", network, SHARE)
        method.has_marks = has_marks
        torch.manual_seed(7)
        method.train_minibatch(images, labels, 6)
    slow.assert_equal_networks(*networks, tolerance=1e-12)


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan"), float("inf")])
def test_a_share_outside_0_to_1_is_refused(share):
    with pytest.raises(UserError, match=r"--label-smoothing .*: must be at least 0 and below 1"):
        TrainConfig(label_smoothing=share)
