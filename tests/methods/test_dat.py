"""DAT against a slow loop written from the formula, labelled and unlabelled."""

import pytest
import torch
import torch.nn.functional as F

import slow_dat
import slow_steps as slow
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.methods.build import build_method
from freeadv_fast.methods.dat import Dat, phi
from freeadv_fast.methods.pgd import Pgd

CPU = torch.device("cpu")
SIZES = [6, 6, 4] * 2


def build(network, dtype=torch.float64, *, has_marks=False, **options):
    return Dat(
        slow.build_learner(network, dtype), slow_dat.THREAT,
        attack_steps=slow_dat.NUM_STEPS, has_marks=has_marks, **options,
    )  # fmt: skip


def minibatches(sizes=SIZES):
    """Every second image is unlabelled, and others in a last minibatch."""
    for images, labels in slow.minibatches(sizes):
        is_labelled = [row % 2 == len(images) // 6 for row in range(len(images))]
        yield images, labels, is_labelled


def marked(labels, is_labelled):
    return torch.where(torch.tensor(is_labelled), labels, ~labels)


@pytest.mark.parametrize("clean_weight", [1.0, 0.3])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_labelled_images_equal_the_slow_loop(small_network, mode, clean_weight):
    """Weights and running statistics; pseudo labels are labels here."""
    ours, theirs = small_network(torch.float64), small_network(torch.float64)
    method = build(ours, mode=mode, clean_weight=clean_weight)
    torch.manual_seed(7)
    for images, labels, _ in minibatches():
        n = len(images)
        assert method.train_minibatch(images, labels, n) == (2 * n, slow_dat.NUM_STEPS * n)
    torch.manual_seed(7)
    all_labelled = [(images, labels, [True] * len(images)) for images, labels, _ in minibatches()]
    slow_dat.train(slow.SlowTrainer(theirs), all_labelled, mode, clean_weight)
    slow.assert_equal_networks(ours, theirs)
    assert slow.total_passes(method) == 2 * sum(SIZES)


@pytest.mark.parametrize("clean_weight", [1.0, 0.3])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_unlabelled_images_equal_the_slow_loop(small_network, mode, clean_weight):
    """Both kinds in one minibatch, which batch norm sees whole."""
    ours, theirs = small_network(torch.float64), small_network(torch.float64)
    method = build(ours, mode=mode, clean_weight=clean_weight, has_marks=True)
    torch.manual_seed(7)
    for images, labels, is_labelled in minibatches():
        n = len(images)
        passes = method.train_minibatch(images, marked(labels, is_labelled), n)
        assert passes == (2 * n, slow_dat.NUM_STEPS * n)
    torch.manual_seed(7)
    slow_dat.train(slow.SlowTrainer(theirs), minibatches(), mode, clean_weight)
    slow.assert_equal_networks(ours, theirs)
    assert slow.total_passes(method) == 2 * sum(SIZES)


@pytest.mark.parametrize("has_marks", [False, True])
def test_gradients_equal_those_of_the_formula(small_network, has_marks, monkeypatch):
    """To 1e-9, where the attack ends: no update in between that would round."""
    network = small_network(torch.float64)
    method = build(network, has_marks=has_marks, clean_weight=0.3)
    ((images, labels, is_labelled),) = minibatches([6])
    delta = slow.uniform(images, 8)
    monkeypatch.setattr(method, "attack", lambda *_: delta.float())
    monkeypatch.setattr(method, "attack_with_unlabelled", lambda *_: delta.float())
    monkeypatch.setattr(method.learner, "apply_gradients", lambda: None)
    if has_marks:
        method.descend_with_unlabelled(images, marked(labels, is_labelled), 6)
    else:
        method.descend(images, labels, 6)
        is_labelled = [True] * 6
    trainer = slow.SlowTrainer(small_network(torch.float64))
    # Our own network input: its rounding is not what is compared here.
    trainer.x = lambda images, delta: method.learner.network_input(images, delta.float())
    losses = slow_dat.losses(trainer, images, delta, labels, is_labelled, 0.3)
    expected = torch.autograd.grad(sum(losses), list(trainer.network.parameters()))
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-9)


def test_marks_on_no_image_change_nothing(small_network):
    """Both ways through the code are one loss; the attack's noise is drawn and not used."""
    plain, with_marks = small_network(torch.float64), small_network(torch.float64)
    ((images, labels, _),) = minibatches([6])
    for network, has_marks in ((plain, False), (with_marks, True)):
        torch.manual_seed(7)
        build(network, has_marks=has_marks).train_minibatch(images, labels, 6)
    slow.assert_equal_networks(plain, with_marks)


def test_unlabelled_images_have_no_use_for_their_pseudo_labels(small_network):
    networks = []
    for shift in (0, 1):
        network = small_network(torch.float64)
        method = build(network, has_marks=True)
        torch.manual_seed(7)
        for images, labels, is_labelled in minibatches([6, 6]):
            others = torch.where(torch.tensor(is_labelled), labels, (labels + shift) % 5)
            method.train_minibatch(images, marked(others, is_labelled), 6)
        networks.append(network)
    slow.assert_equal_networks(*networks, tolerance=0)


def test_the_meters_count_hits_against_pseudo_labels(small_network):
    """Labels that the network gives itself are all hit, marked or not."""
    network = small_network(torch.float64)
    method = build(network, has_marks=True)
    ((images, _, is_labelled),) = minibatches([6])
    with torch.no_grad():
        guesses = network(method.learner.network_input(images)).argmax(1)
    method.train_minibatch(images, marked(guesses, is_labelled), 6)
    clean = method.learner.meters.sums[0]
    assert clean[1:3].tolist() == [6, 6]


def test_attacks_in_eval_mode_move_no_statistics(small_network):
    """In training mode they move once a pass, and once for p(x)."""
    ((images, labels, is_labelled),) = minibatches([6])
    for mode, plain, with_unlabelled in (("eval", 0, 0), ("train", 4, 5)):
        network = small_network(torch.float64)
        method = build(network, mode=mode)
        method.attack(images, labels)
        assert network[1].num_batches_tracked == plain
        clean = method.learner.network_input(images)
        method.attack_with_unlabelled(images, clean, marked(labels, is_labelled))
        assert network[1].num_batches_tracked == plain + with_unlabelled


def test_phi_is_cross_entropy_or_divergence():
    generator = torch.Generator().manual_seed(0)
    clean, adversarial = (torch.randn(4, 5, generator=generator).double() for _ in range(2))
    values = phi(clean, adversarial, torch.tensor([2, ~0, 0, ~4]))
    for row, label in ((0, 2), (2, 0)):
        expected = F.cross_entropy(adversarial[row], torch.tensor(label))
        torch.testing.assert_close(values[row], expected)
    for row in (1, 3):
        torch.testing.assert_close(values[row], slow_dat.kl(clean[row], adversarial[row]))


def test_the_fgsm_branch_equals_the_slow_loop(small_network):
    """One step of 1.25 eps in training mode, adversarial images only."""
    ours, theirs = small_network(torch.float64), small_network(torch.float64)
    config = TrainConfig(data="x", method="dat", m=1, dat_attack="fgsm", eps="8/255")
    method = build_method(config, slow.build_learner(ours), CPU, 5)
    torch.manual_seed(7)
    for images, labels in slow.minibatches(SIZES):
        assert method.train_minibatch(images, labels, len(images)) == (len(images), len(images))
    torch.manual_seed(7)
    trainer = slow.SlowTrainer(theirs)
    for images, labels in slow.minibatches(SIZES):
        delta = slow.uniform(images, 8)
        gradient = trainer.loss_gradient(images, delta, labels)
        delta = (delta + 10 * gradient.sign()).clamp(-8, 8)
        trainer.step(trainer.loss(images, slow.in_pixel_range(delta, images), labels))
    slow.assert_equal_networks(ours, theirs)


def test_a_clean_weight_of_zero_is_pgd_with_attacks_in_training_mode(small_network):
    """But for the running statistics, which the clean pass moves."""
    ours, theirs = small_network(torch.float64), small_network(torch.float64)
    dat = build(ours, mode="train", clean_weight=0.0)
    learner = slow.build_learner(theirs)
    pgd = Pgd(learner, slow_dat.THREAT, attack_steps=slow_dat.NUM_STEPS, start="uniform")
    for method in (dat, pgd):
        torch.manual_seed(7)
        for images, labels in slow.minibatches(SIZES):
            method.train_minibatch(images, labels, len(images))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_the_config_chooses(small_network):
    learner = slow.build_learner(small_network())
    common = {"data": "x", "method": "dat", "m": 1, "eps": "8/255", "attack_steps": 5}
    method = build_method(TrainConfig(**common), learner, CPU, 5)
    assert isinstance(method, Dat)
    assert (method.attack_steps, method.clean_weight) == (5, 1.0)
    assert (method.is_evaluating, method.has_marks) == (True, False)
    assert str(method.threat.step) == "4/255"
    chosen = {"dat_mode": "train", "dat_clean_weight": 0.5, "dat_unlabelled": "kl"}
    file = {"unlabelled": "file.npz", "augment": "pad-crop-flip"}
    for more, has_marks in ((chosen, False), (chosen | file, True)):
        method = build_method(TrainConfig(**common, **more), learner, CPU, 5)
        assert (method.clean_weight, method.is_evaluating) == (0.5, False)
        assert method.has_marks is has_marks


@pytest.mark.parametrize("has_marks", [False, True])
def test_never_waits_for_the_device(small_network, has_marks):
    slow.assert_never_reads(build(small_network(), torch.float32, has_marks=has_marks))


@pytest.mark.parametrize("has_marks", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns(small_network, dtype, has_marks):
    slow.assert_learns(build(small_network(), dtype, has_marks=has_marks))


@pytest.mark.parametrize("has_marks", [False, True])
def test_fp16_overflow_moves_no_weight(small_network, has_marks):
    slow.assert_overflow_moves_no_weight(build(small_network(), torch.float16, has_marks=has_marks))
