"""Attacks against foolbox, exact cases and a network on which merging by loss would be wrong."""

from __future__ import annotations

import foolbox
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from freeadv_fast.config.attack import Attack
from freeadv_fast.config.threat import L2ThreatModel, Perturbation, ThreatModel
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.attacks import ascend, is_correct, margin, perturb, random_point


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def threat_of(eps: str, step: str) -> ThreatModel:
    return ThreatModel(Perturbation.parse(eps), Perturbation.parse(step))


def small_batch(network, num_images=200):
    """Images, some at the box's edge, whose labels are mostly the network's own guesses."""
    images = torch.rand(num_images, 3, 8, 8)
    images[: num_images // 4] = images[: num_images // 4].round()
    with torch.no_grad():
        labels = network(images).argmax(1)
    labels[::10] = (labels[::10] + 1) % 5
    return images, labels


@pytest.fixture
def network(small_network):
    network = small_network().eval()
    for layer in network:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_var.uniform_(0.2, 0.4)
    return network


class StartedPGD(foolbox.attacks.LinfProjectedGradientDescentAttack):
    """foolbox's attack from a given start."""

    def __init__(self, start, **options):
        super().__init__(random_start=start is not None, **options)
        self.start = start

    def get_random_start(self, x0, epsilon):
        return foolbox.attacks.gradient_descent_base.ep.astensor(self.start)


@pytest.mark.parametrize("is_started", [False, True])
@pytest.mark.parametrize(
    ("eps", "step", "steps"), [("2/255", "0.5/255", 10), ("3/255", "1/255", 20)]
)
def test_pgd_agrees_with_foolbox(network, is_started, eps, step, steps):
    images, labels = small_batch(network)
    threat = threat_of(eps, step)
    start = None
    if is_started:
        radius = float(threat.eps)
        start = images + torch.empty_like(images).uniform_(-radius, radius)
    theirs = StartedPGD(start, abs_stepsize=float(threat.step), steps=steps).run(
        foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu"),
        images,
        foolbox.criteria.Misclassification(labels),
        epsilon=float(threat.eps),
    )
    attack = Attack("pgd", steps)
    ours = ascend(
        network, images, labels, start=images if start is None else start, attack=attack,
        threat=threat,
    )  # fmt: skip
    with torch.no_grad():
        is_right, is_theirs_right = (is_correct(network(x), labels) for x in (ours, theirs))
    assert (is_right == is_theirs_right).float().mean() >= 0.99
    assert 0.1 < is_right.float().mean() < 0.8  # the comparison is not between two constants
    assert (ours - theirs).abs().mean() < 0.02 * float(threat.eps)
    if not is_started:
        result = perturb(network, images, labels, attack=attack, threat=threat, random_start=False)
        was_right = is_correct(network(images), labels)
        assert torch.equal(result.is_fooled, ~(was_right & is_right))


@pytest.mark.parametrize("name", ["pgd-7", "pgd-3-3", "cw-5"])
def test_points_stay_in_the_ball_and_the_box(network, name):
    images, labels = small_batch(network, 40)
    threat = threat_of("8/255", "3/255")
    result = perturb(network, images, labels, attack=Attack.parse(name), threat=threat)
    lower = (images - float(threat.eps)).clamp(min=0)
    upper = (images + float(threat.eps)).clamp(max=1)
    assert (result.images >= lower).all()
    assert (result.images <= upper).all()
    assert (result.images - images).abs().max() > 7 / 255


def test_misclassified_images_fall_without_being_attacked(network):
    images, labels = small_batch(network, 50)
    result = perturb(
        network, images, labels, attack=Attack("pgd", 2), threat=threat_of("8/255", "2/255")
    )
    is_wrong = ~is_correct(network(images), labels)
    assert is_wrong.sum() >= 5
    assert result.is_fooled[is_wrong].all()
    assert torch.equal(result.images[is_wrong], images[is_wrong])
    is_point_wrong = ~is_correct(network(result.images), labels)
    assert torch.equal(result.is_fooled, is_point_wrong)


class TwoHills(nn.Module):
    """Loss rises to either side of the image; label 0 falls on the left, at the smaller loss.

    To the right of 1/2 all ten logits approach each other but 0 stays ahead: the cross entropy
    rises towards ln 10. To the left logit 1 overtakes: misclassified at a little over ln 2.
    """

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, images):
        side = ((images.flatten(1)[:, 0] - 0.5) / self.eps).clamp(-1, 1)
        lead = 5 - 5.1 * side.abs() * (side < 0) - 4.9 * side * (side > 0)
        others = torch.where(side < 0, -20.0, 0.0)[:, None].repeat(1, 8)
        return torch.cat([lead[:, None], torch.zeros_like(lead)[:, None], others], dim=1)


def test_restarts_are_an_or_and_not_a_merge_by_loss():
    threat = threat_of("8/255", "1/255")
    network = TwoHills(float(threat.eps))
    images, labels = torch.full((64, 1, 1, 1), 0.5), torch.zeros(64, dtype=torch.int64)
    attack = Attack("pgd", 20, restarts=4)
    generator = torch.Generator().manual_seed(0)
    result = perturb(network, images, labels, attack=attack, threat=threat, generator=generator)

    generator.manual_seed(0)
    radius = float(threat.eps)
    noise = [torch.empty_like(images).uniform_(-radius, radius, generator=generator)
             for _ in range(4)]  # fmt: skip
    starts = torch.stack(noise).flatten(1)
    assert torch.equal(result.is_fooled, (starts < 0).any(0))
    # Keeping the larger loss would keep the right-hand hill wherever a restart climbed it.
    ends = images + starts.sign()[:, :, None, None, None] * radius
    losses = torch.stack([F.cross_entropy(network(x), labels, reduction="none") for x in ends])
    merged = ends[losses.argmax(0), torch.arange(64)]
    fooled_by_merge = ~is_correct(network(merged), labels)
    assert fooled_by_merge.sum() < result.is_fooled.sum() / 2


def test_later_restarts_attack_only_images_that_stand():
    calls = []

    class Counting(TwoHills):
        def forward(self, images):
            calls.append(len(images))
            return super().forward(images)

    threat = threat_of("8/255", "8/255")
    images, labels = torch.full((64, 1, 1, 1), 0.5), torch.zeros(64, dtype=torch.int64)
    perturb(Counting(float(threat.eps)), images, labels, attack=Attack("pgd", 1, 20), threat=threat)
    assert calls[:3] == [64, 64, 64]
    assert calls[1:] == sorted(calls[1:], reverse=True)
    assert calls[-1] < 4


@pytest.mark.parametrize("num_classes", [2, 3, 100])
def test_margin_against_a_loop(num_classes):
    logits = torch.randn(30, num_classes, requires_grad=True)
    labels = torch.randint(num_classes, (30,))
    expected, gradient = 0.0, torch.zeros(30, num_classes)
    for row in range(30):
        z = logits[row].tolist()
        label = int(labels[row])
        best = max((j for j in range(num_classes) if j != label), key=lambda j: z[j])
        if z[label] > z[best]:
            expected -= z[label] - z[best]
            gradient[row, label], gradient[row, best] = -1, 1
    loss = margin(logits, labels)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(torch.autograd.grad(loss, logits)[0], gradient)


@pytest.mark.parametrize("num_classes", [3, 100])
def test_cw_fools_a_linear_network_where_it_can(num_classes):
    """Against one rival the best point in the ball is known: margin - eps * |w_y - w_j|_1."""
    weight = torch.randn(num_classes, 12)
    weight[2:] = 0
    bias = torch.full((num_classes,), -100.0)
    bias[:2] = 0
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))
    network[1].weight.data, network[1].bias.data = weight, bias
    images = torch.rand(100, 3, 2, 2) * 0.5 + 0.25
    bias[0] = -(images.flatten(1) @ (weight[0] - weight[1])).mean()  # the margins straddle 0
    labels = network(images).argmax(1)
    threat = threat_of("8/255", "2/255")
    result = perturb(network, images, labels, attack=Attack("cw", 12), threat=threat)
    logits = network(images)[:, :2]
    reach = float(threat.eps) * (weight[0] - weight[1]).abs().sum()
    expected = (logits[:, 0] - logits[:, 1]).abs() < reach
    assert torch.equal(result.is_fooled, expected)
    assert 10 < expected.sum() < 90


class Broken(nn.Module):
    """Logits with a NaN gradient in one pixel and an infinite one in another."""

    def forward(self, images):
        x = images.flatten(1)
        nan = torch.sqrt((x[:, 0] - x[:, 0].detach()).abs()) * 0
        infinite = torch.sqrt((x[:, 1] - x[:, 1].detach()).clamp_min(0))
        score = x[:, 2] + nan + infinite
        return torch.stack([1 - score, torch.full_like(score, -5)], dim=1)


def test_non_finite_gradients_move_nothing():
    images = torch.full((2, 3, 1, 1), 0.5)
    labels = torch.zeros(2, dtype=torch.int64)
    network = Broken()
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(leaf)[:, 0].sum(), leaf)
    assert not gradient[:, :2].isfinite().any()
    points = ascend(
        network, images, labels, start=images, attack=Attack("pgd", 3),
        threat=threat_of("8/255", "2/255"),
    )  # fmt: skip
    assert torch.equal(points[:, :2], images[:, :2])
    assert (points[:, 2] > images[:, 2]).all()


def test_a_gradient_that_all_pixels_share_is_a_gradient():
    """That of a sum is one number, expanded: nothing can be written into it."""

    class Sum(nn.Module):
        def forward(self, images):
            score = images.sum((1, 2, 3))
            return torch.stack([1 - score, torch.full_like(score, -5)], dim=1)

    images, labels = torch.full((2, 3, 2, 2), 0.5), torch.zeros(2, dtype=torch.int64)
    attack, threat = Attack("pgd", 2), threat_of("8/255", "2/255")
    points = ascend(Sum(), images, labels, start=images, attack=attack, threat=threat)
    assert torch.allclose(points, images + 4 / 255)


def test_nan_logits_are_never_correct():
    logits = torch.tensor([[torch.nan, 0.0], [1.0, 0.0], [torch.nan, torch.nan]])
    assert is_correct(logits, torch.zeros(3, dtype=torch.int64)).tolist() == [False, True, False]


def test_attacking_leaves_the_network_alone(network):
    images, labels = small_batch(network, 10)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    perturb(network, images, labels, attack=Attack("pgd", 2), threat=threat_of("2/255", "1/255"))
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_a_ball_of_radius_zero_changes_nothing(network):
    images, labels = small_batch(network, 10)
    result = perturb(
        network, images, labels, attack=Attack("pgd", 2), threat=threat_of("0", "1/255")
    )
    assert torch.equal(result.images, images)
    assert torch.equal(result.is_fooled, ~is_correct(network(images), labels))


@pytest.mark.parametrize(
    ("text", "attack"),
    [
        ("pgd-50", Attack("pgd", 50)),
        ("pgd-50-10", Attack("pgd", 50, 10)),
        ("cw-100", Attack("cw", 100)),
        ("cw-100-2", Attack("cw", 100, 2)),
    ],
)
def test_names_are_read_and_given_back(text, attack):
    assert Attack.parse(text) == attack
    assert str(attack) == text
    assert Attack.parse(attack) is attack


@pytest.mark.parametrize(
    "text",
    ["", "pgd", "pgd-", "pgd-0", "pgd--5", "pgd-5-0", "fgsm-1", "PGD-5", "pgd-5-5-5", "cw-1.5"],
)
def test_other_names_are_refused(text):
    with pytest.raises(UserError) as caught:
        Attack.parse(text)
    said = str(caught.value)
    assert said.startswith(f"--eval-attacks {text}: no such attack; ")
    assert said.endswith(
        "write pgd-50 (50 steps), pgd-50-10 (10 restarts), cw-100 (margin loss), apgd-ce-100 or "
        "autoattack"
    )


def test_an_overconfident_network_is_still_attacked(network):
    """Logits a thousand times larger: cross entropy's fp32 gradient is 0, the attack's is not."""

    class Overconfident(nn.Module):
        def forward(self, images):
            return 1000 * network(images)

    confident = Overconfident()
    images, labels = small_batch(network)
    x = images.clone().requires_grad_()
    loss = F.cross_entropy(confident(x), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    is_flat = gradient.flatten(1).abs().amax(1) == 0
    assert is_flat.sum() > 20  # the trap is there
    threat = threat_of("3/255", "1/255")
    fooled = perturb(
        confident, images, labels, attack=Attack("pgd", 10), threat=threat, random_start=False
    )
    moved = (fooled.images - images).flatten(1).abs().amax(1) > 0
    assert moved[is_flat & (confident(images).argmax(1) == labels)].all()
    calm = perturb(
        network, images, labels, attack=Attack("pgd", 10), threat=threat, random_start=False
    )
    agreement = (fooled.is_fooled == calm.is_fooled).float().mean()
    assert agreement > 0.9  # the same ball, the same network up to scale


def l2(eps, step):
    return L2ThreatModel(Perturbation.parse(eps), Perturbation.parse(step))


def linear_network(num_values, seed=0):
    """Two logits, w.x and 0: the gradient is along w everywhere."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(num_values, 2, bias=False)).eval()
    with torch.no_grad():
        network[1].weight[1] = 0
    return network


def test_l2_steps_have_the_right_length_and_direction():
    """One step on a linear network: along -w for the label 0, `step` long."""
    network = linear_network(3 * 16)
    images, labels = torch.full((2, 3, 4, 4), 0.5), torch.tensor([0, 0])
    points = ascend(
        network, images, labels, start=images, attack=Attack("pgd", 1),
        threat=l2("128/255", "51/255"),
    )  # fmt: skip
    moved = (points - images).flatten(1)
    torch.testing.assert_close(moved.norm(dim=1), torch.full((2,), 0.2))
    w = network[1].weight[0].detach()
    torch.testing.assert_close(moved[0], -0.2 * w / w.norm())


def test_l2_points_stay_in_the_ball_and_in_the_pixel_range():
    network = linear_network(3 * 16)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 4, 4, generator=generator)
    threat = l2("128/255", "64/255")
    perturbed = perturb(
        network, images, torch.zeros(6, dtype=torch.int64), attack=Attack("pgd", 10), threat=threat,
        generator=generator, is_standing=torch.ones(6, dtype=torch.bool),
    )  # fmt: skip
    distance = (perturbed.images - images).flatten(1).norm(dim=1)
    assert (distance <= 128 / 255 + 1e-6).all()
    assert distance.max() > 0.4
    assert perturbed.images.min() >= 0
    assert perturbed.images.max() <= 1


def test_l2_starts_fill_the_ball():
    """Uniform in 48 dimensions: the distance's mean is 48/49 of the radius."""
    images = torch.zeros(4000, 3, 4, 4)
    noise = random_point(images, l2("128/255", "1/255"), torch.Generator().manual_seed(0))
    distance = noise.flatten(1).norm(dim=1) / (128 / 255)
    assert distance.max() <= 1 + 1e-6
    assert abs(distance.mean() - 48 / 49) < 2e-3
    assert noise.mean().abs() < 1e-3


def test_l2_images_without_a_gradient_wait():
    network = linear_network(3 * 16)
    with torch.no_grad():
        network[1].weight.zero_()
    images = torch.rand(2, 3, 4, 4)
    points = ascend(
        network, images, torch.tensor([0, 1]), start=images, attack=Attack("pgd", 3),
        threat=l2("1/255", "1/255"),
    )  # fmt: skip
    torch.testing.assert_close(points, images)


def test_l2_agrees_with_foolbox():
    """The same logits fall, image by image, from the same start (the image itself)."""
    torch.manual_seed(3)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 4)
    ).eval()
    images = torch.rand(40, 3, 8, 8)
    with torch.no_grad():
        labels = network(images).argmax(1)
    threat = l2("51/255", "10/255")
    ours = perturb(
        network, images, labels, attack=Attack("pgd", 20), threat=threat, random_start=False
    )
    model = foolbox.PyTorchModel(network, bounds=(0, 1))
    attack = foolbox.attacks.L2ProjectedGradientDescentAttack(
        abs_stepsize=10 / 255, steps=20, random_start=False
    )
    _, _, theirs = attack(model, images, labels, epsilons=51 / 255)
    assert 5 < theirs.sum() < 35
    assert (ours.is_fooled == theirs).float().mean() >= 0.95
