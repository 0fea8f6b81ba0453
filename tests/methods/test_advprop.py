"""AdvProp against a slow loop: PGD-K towards a wrong label, then both branches."""

import pytest
import torch
from torch.func import functional_call

import slow_advprop as slow
from freeadv_fast.config.threat import Perturbation, ThreatModel
from freeadv_fast.methods.advprop import AdvProp
from freeadv_fast.models.batch_norm import DualNetwork, add_auxiliary_bn
from freeadv_fast.step.learner import Learner, Pixels
from freeadv_fast.step.optim import build_sgd

EPS, STEP = 8, 2
P_ADV = 1 / 3


def minibatch():
    generator = torch.Generator().manual_seed(4)
    images = torch.randint(-60, 316, (6, 8, 8, 3), generator=generator)
    return images.clamp(0, 255).to(torch.uint8), torch.randint(0, 5, (6,), generator=generator)


def build(network, **options):
    net = DualNetwork(add_auxiliary_bn(network, 6)).train()
    optimizer = build_sgd(
        network, lr=slow.LR, momentum=slow.MOMENTUM, weight_decay=slow.DECAY, decay="all"
    )
    learner = Learner(
        net, optimizer, lambda update: slow.LR, Pixels(slow.MEAN, slow.STD, torch.float64)
    )
    threat = ThreatModel(Perturbation.parse(f"{EPS}/255"), Perturbation.parse(f"{STEP}/255"))
    return AdvProp(learner, threat, num_classes=5, **options)


def slow_attack(network, images, targets, delta, steps):
    """Sign steps down the target's cross-entropy, in eval mode on the auxiliary statistics."""
    state = {
        n.replace(".aux_bn.", "."): v.detach() for n, v in network.state_dict().items()
        if ".aux_bn." in n or f"{n.rsplit('.', 1)[0]}.aux_bn.weight" not in network.state_dict()
    }  # fmt: skip
    pixels, delta = images.double(), delta.double()
    for _ in range(steps):
        d = delta.clone().requires_grad_()
        x = ((pixels + d).clamp(0, 255) / 255 - slow.MEAN.double()) / slow.STD.double()
        logits = functional_call(network.eval(), state, x.permute(0, 3, 1, 2), strict=False)
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, d)
        delta = (delta - STEP * gradient.sign()).clamp(-EPS, EPS)
    network.train()
    return delta


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_equals_the_slow_loop(small_network, steps, decoupled):
    network, reference = small_network(torch.float64), slow.SlowNetwork(small_network().double())
    method = build(network, attack_steps=steps, p_adv=P_ADV if decoupled else None)
    images, labels = minibatch()
    num_adv = 2 if decoupled else 6
    attacked, clean = images[:num_adv], images[num_adv if decoupled else 0 :]
    adv_labels, clean_labels = labels[:num_adv], labels[num_adv if decoupled else 0 :]
    torch.manual_seed(0)
    start = method.threat.uniform_delta(attacked)
    targets = method.wrong_labels(adv_labels)
    delta = slow_attack(network, attacked, targets, start, steps)
    torch.manual_seed(0)
    passes = method.train_minibatch(images, labels, len(images))
    assert passes == (len(clean) + num_adv, steps * num_adv)

    reference.require_gradients()
    clean_gradient = reference.gradients(
        reference.loss_sum(clean.double(), clean_labels, "main", 1)
    )
    adv_gradient = reference.gradients(
        reference.loss_sum(attacked.double() + delta, adv_labels, "auxiliary", 1)
    )
    gradients = {
        name: (clean_gradient[name] + adv_gradient[name]) / slow.count(name, len(clean), num_adv)
        for name in reference.parameters
    }
    reference.step(gradients, slow.LR)
    plain = dict(network.named_parameters())
    for name, value in reference.parameters.items():
        branch, _, rest = name.rpartition(":")
        if branch == "auxiliary":
            layer, leaf = rest.rsplit(".", 1)
            rest = f"{layer}.aux_bn.{leaf}"
        torch.testing.assert_close(plain[rest].detach(), value.detach(), rtol=0, atol=1e-6)


def test_attack_passes_compute_no_weight_gradient_and_move_no_statistics(small_network):
    """Hooks on every parameter see nothing; buffers stay; the input alone gets a gradient."""
    network = small_network(torch.float64)
    method = build(network, attack_steps=2)
    seen = []
    for parameter in network.parameters():
        parameter.register_hook(seen.append)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    images, labels = minibatch()
    delta, _ = method.attack(images, labels)
    assert delta.abs().max() > 0
    assert not seen
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(b, before[name]) for name, b in network.named_buffers())


def test_the_target_is_never_the_true_label_and_every_other_one_is_drawn(small_network):
    method = build(small_network(torch.float64))
    labels = torch.arange(5).repeat(2000)
    targets = method.wrong_labels(labels)
    assert not (targets == labels).any()
    pairs = torch.bincount(labels * 5 + targets, minlength=25).view(5, 5)
    assert (pairs + torch.eye(5, dtype=torch.int64) * 2000 > 400).all()


def test_the_attack_moves_towards_its_target(small_network):
    """The target's probability rises on most images."""
    network = small_network(torch.float64)
    method = build(network, attack_steps=5, uniform_start=False)
    images, labels = minibatch()
    torch.manual_seed(1)
    targets = method.wrong_labels(labels)
    torch.manual_seed(1)
    delta, unit = method.attack(images, labels)
    learner = method.learner

    def probability(perturbation):
        x = learner.network_input(images, perturbation, unit)
        return learner.forward(x, "attack").softmax(1).gather(1, targets[:, None])

    with torch.no_grad():
        risen = probability(delta) > probability(torch.zeros_like(delta))
    assert risen.sum() >= 5
