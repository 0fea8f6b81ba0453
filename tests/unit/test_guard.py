"""The guard's rule against noise, its interval, and what its probe measures."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from freeadv_fast.config.attack import Attack
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.threat import Perturbation, ThreatModel
from freeadv_fast.data.build import build_loaders
from freeadv_fast.data.loader import Batch
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.evaluate import count_images, eval_mode
from freeadv_fast.methods.passes import Passes
from freeadv_fast.models.normalize import unit_images
from freeadv_fast.session.guard import Count, Guard, History, has_fallen, probe, random_start
from freeadv_fast.session.rewind import answer
from freeadv_fast.step.graphs import CudaRecorder, GraphRunner

THREAT = ThreatModel(Perturbation.parse("8/255"), Perturbation.parse("2/255"))


def first_alarm(hits, images=64):
    """The check at which a history sees a collapse; None for none."""
    history = History()
    alarms = (i for i, hit in enumerate(hits) if history.add(Count(int(hit), images)))
    return next(alarms, None)


@pytest.mark.parametrize("accuracy", [0.02, 0.1, 0.3, 0.45, 0.7])
def test_noise_raises_no_alarm(accuracy):
    """30 runs of 500 checks, more than 200 epochs of CIFAR-10, each check on 64 new images."""
    hits = np.random.default_rng(7).binomial(64, accuracy, (30, 500))
    assert [first_alarm(run) for run in hits] == [None] * 30


def test_a_rising_run_raises_no_alarm():
    """From nothing to 45 %, a plateau, and a slow decline to 40 %, as robust overfitting is."""
    shares = np.concatenate([np.linspace(0, 0.45, 60), np.linspace(0.45, 0.4, 200)])
    random = np.random.default_rng(8)
    assert all(first_alarm(random.binomial(64, shares)) is None for _ in range(30))


@pytest.mark.parametrize(("before", "after"), [(0.45, 0.05), (0.3, 0.0), (0.5, 0.1)])
@pytest.mark.parametrize("num_before", [4, 40])
def test_a_collapse_is_named(before, after, num_before):
    """By the first check after it or by the second."""
    random = np.random.default_rng(9)
    for _ in range(50):
        healthy = random.binomial(64, before, num_before)
        fallen = random.binomial(64, after, 4)
        assert first_alarm([*healthy, *fallen]) in (num_before, num_before + 1)


def test_few_images_prove_little():
    """A fall of three images to none can be chance; 29 of 64 to 3 cannot."""
    assert not has_fallen(Count(3, 64), Count(0, 64))
    assert not has_fallen(Count(), Count(0, 64))
    assert has_fallen(Count(29, 64), Count(3, 64))
    assert has_fallen(Count(450, 1000), Count(3, 64))
    assert not has_fallen(Count(900, 1000), Count(500, 1000))  # more than 40 % is left


def test_a_history_survives_a_checkpoint():
    """Plain values, and equal again."""
    history = History()
    for hits in (20, 30, 28):
        history.add(Count(hits, 64))
    history.collapses.append({"action": "restore", "rewound_to_update": 7})
    assert History.of(history.state_dict()) == history


def test_the_learning_rate_after_collapses():
    """Halved by each restore; GradAlign goes through free-m's schedule m updates at a time."""
    history = History()
    lr_at = history.slowed(float, m=4)
    assert lr_at(10) == 10
    history.collapses.append({"action": "restore", "rewound_to_update": 4})
    assert lr_at(10) == 5
    history.collapses.append({"action": "gradalign", "rewound_to_update": 8})
    assert lr_at(10) == (8 + 2 * 4) / 2


def test_answers():
    """GradAlign is switched on once, and the third collapse is the last."""
    history = History()
    for option in ("stop", "restore", "gradalign"):
        assert answer(history, option) == option
    history.collapses = [{}]
    assert answer(history, "gradalign") == "restore"
    history.collapses = [{}, {}]
    assert answer(history, "restore") == "stop"


def small_config(**changes):
    """Random pixels, 60 held out."""
    return TrainConfig(
        method="fgsm-rs", m=1, data="synthetic:3", image_size=8, augment="none", batch_size=16,
        holdout_images=60, **changes,
    )  # fmt: skip


def test_the_interval(world):
    """At most 1 % of the passes: 60 images cost 25 thirds each, a minibatch 16 (3 + 2)."""
    config = small_config()
    guard = Guard(config, build_loaders(config, world).guard, History(), world)
    passes = Passes(16, 16)
    num_minibatches = 0
    while not guard.is_due:
        guard.advance(passes)
        num_minibatches += 1
    assert num_minibatches == -(-60 * 25 * 100 // (16 * 5))
    guard.history.add(Count(5, 60))
    assert not guard.is_due
    often = Guard(dataclasses.replace(config, guard_every=2), build_loaders(
        config, world).guard, History(), world)  # fmt: skip
    assert [often.advance(passes) or often.is_due for _ in range(2)] == [False, True]
    off = Guard(config, None, History(minibatches=10**9, thirds=10**9), world)
    assert not off.is_due


def test_the_slice_is_of_held_out_images(world):
    """Of as many classes as it can be, dealt to the ranks; more than there are is refused."""
    loaders = build_loaders(small_config(guard_images=20), world)
    rows = loaders.guard.stream.rows
    assert len(rows) == 20
    assert np.isin(rows, loaders.holdout.stream.rows).all()
    counts = np.bincount([loaders.guard.labels[row] for row in rows])
    assert counts.max() - counts.min() <= 1
    assert build_loaders(small_config(), world).guard.num_images == 60
    shares = [
        build_loaders(small_config(guard_images=20), dataclasses.replace(world, rank=r, size=2))
        for r in range(2)
    ]
    dealt = [row for s in shares for batch in s.guard.epoch(0) for row in batch.indices.tolist()]
    assert sorted(dealt) == rows.tolist()
    with pytest.raises(UserError, match="--guard-images 61: only 60 images are held out; use"):
        build_loaders(small_config(guard_images=61), world)


def probed(network, batch, threat, seed):
    """The probe of a batch, as the guard makes it."""
    start = random_start(batch, threat, seed=seed)
    return probe(network, batch.images, batch.labels, start, threat)


@pytest.fixture
def batch():
    """Twelve random images."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (12, 8, 8, 3), generator=generator, dtype=torch.uint8)
    return Batch(images, torch.arange(12) % 5, 12, torch.arange(12))


def test_the_probe_is_the_evaluations_attack(small_network, batch):
    """The same starts, the same points, the same images that stand."""
    network = small_network()
    labels = network.eval()(unit_images(batch.images)).argmax(1)
    batch = batch._replace(labels=torch.where(torch.arange(12) < 9, labels, (labels + 1) % 5))
    threat = ThreatModel(Perturbation.parse("16/255"), Perturbation.parse("4/255"))
    images, standing, _ = probed(network, batch, threat, seed=3).tolist()
    counts = count_images(network, [batch], [Attack.parse("pgd-10")], threat, seed=3)
    assert images == 12
    assert standing == counts[3]
    assert 0 < standing < 9


def test_the_alignment(small_network, batch):
    """1 for a linear network; for another, the mean cosine of cross-entropy's own gradients."""
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    two_classes = batch._replace(labels=batch.labels % 2)
    assert probed(linear, two_classes, THREAT, seed=0)[2] / 12 == pytest.approx(1, abs=1e-6)
    network = small_network().eval()
    x = unit_images(batch.images)
    generator = torch.Generator().manual_seed(0)
    noise = torch.empty_like(x).uniform_(-8 / 255, 8 / 255, generator=generator)
    gradients = []
    for point in (x, x + noise):
        point = point.requires_grad_()
        loss = nn.functional.cross_entropy(network(point), batch.labels, reduction="sum")
        gradients.append(torch.autograd.grad(loss, point)[0].flatten(1))
    expected = torch.cosine_similarity(*gradients).mean().item()
    assert 0.1 < expected < 0.9999
    found = probed(network, batch, THREAT, seed=0)[2].item() / 12
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_check_leaves_no_trace(small_network, world):
    """Modes, statistics, gradients and torch's generator stay as they are."""
    config = small_config()
    loader = build_loaders(config, world).guard
    network = nn.Sequential(small_network()[:6], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random = torch.get_rng_state()
    check = Guard(config, loader, History(), world).check(network, loader)
    assert check == dataclasses.replace(
        Guard(config, loader, History(), world).check(network, loader), seconds=check.seconds
    )
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert check.line.keys() == {"guard_robust_accuracy", "guard_alignment", "guard_seconds"}
    with eval_mode(network):
        assert -1 <= check.alignment <= 1


class Recorder:
    """Stands for CUDA's: a launch does what was recorded, on the tensors that it was given then."""

    def __init__(self):
        self.num_recordings = 0

    def begin_anew(self):
        pass

    def warming_up(self):
        return contextlib.nullcontext()

    def record(self, step):
        self.num_recordings += 1
        return step


def test_a_recorded_check_is_the_same_check(small_network, world):
    """Of the weights as they are now, of another network, of another slice."""
    config, recorder = small_config(guard_images=20), Recorder()
    loader = build_loaders(config, world).guard
    runner = GraphRunner(pytest.fail, recorder, warm_up=1)
    recorded = Guard(config, loader, History(), world, runner)
    plain = Guard(config, loader, History(), world)

    def counts(network, loader):
        checks = [guard.check(network, loader) for guard in (recorded, plain)]
        assert checks[0] == dataclasses.replace(checks[1], seconds=checks[0].seconds)
        return checks[0].alignment

    network = small_network()
    found = []
    for _ in range(3):
        found.append(counts(network, loader))
        with torch.no_grad():
            network[0].weight.mul_(-0.5)
    assert len(set(found)) == 3
    assert recorder.num_recordings == 2  # minibatches of 16 and of 4
    for _ in range(2):
        counts(small_network(), loader)
    other = build_loaders(small_config(guard_images=16), world).guard
    for _ in range(3):
        counts(network, other)
    assert recorder.num_recordings == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_check_as_a_cuda_graph(small_network, world, precision):
    """Of the weights as they are at the launch, and nothing else of the run is touched."""
    world = dataclasses.replace(world, device=torch.device("cuda"))
    config = small_config(guard_images=16, precision=precision)
    loader, network = build_loaders(config, world).guard, small_network().cuda()
    runner = GraphRunner(pytest.fail, CudaRecorder(), warm_up=1)
    recorded = Guard(config, loader, History(), world, runner)
    plain = Guard(config, loader, History(), world)
    found = []
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        for _ in range(4):
            checks = [guard.check(network, loader) for guard in (recorded, plain)]
            assert abs(checks[0].count.standing - checks[1].count.standing) <= 1
            assert checks[0].alignment == pytest.approx(checks[1].alignment, abs=1e-2)
            found.append(checks[0].alignment)
            with torch.no_grad():
                network[0].weight.mul_(-0.5)
    assert len(set(found)) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "trades"},
        {"method": "pgd", "norm": "l2"},
        {"method": "pgd", "unlabelled": "more.npz", "augment": "none"},
    ],
)
def test_gradalign_goes_on_from_single_step_weights_only(changes):
    """Other losses, other balls and other images are refused at the start."""
    with pytest.raises(UserError, match="--on-collapse gradalign: .* use --on-collapse restore"):
        TrainConfig(m=1, on_collapse="gradalign", **changes)


def test_flags_out_of_range():
    """The line names the flag."""
    with pytest.raises(UserError, match="--guard-every -1: cannot be negative"):
        TrainConfig(guard_every=-1)
    with pytest.raises(UserError, match="--guard-images 0: must be at least 1"):
        TrainConfig(guard_images=0)


def test_a_new_phase_starts_over_and_remembers_collapses():
    """Higher accuracy at another image size before it is no best to fall from."""
    history = History()
    for _ in range(12):
        history.add(Count(60, 64))
    history.collapses.append({"action": "restore"})
    history.forget()
    assert not history.add(Count(2, 64))
    assert history.best == Count(2, 64)
    assert len(history.collapses) == 1
