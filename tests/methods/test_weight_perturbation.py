"""AWP for PGD and TRADES against a slow loop, written after the authors' with a proxy network."""

import copy

import pytest
import recorded_training
import test_pgd
import test_trades
import torch

import slow_steps as slow
from freeadv_fast.config import method_names
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.errors import UserError
from freeadv_fast.methods.pgd import Pgd
from freeadv_fast.methods.trades import Trades
from freeadv_fast.models.half_weights import half_copy, use_half_weights
from freeadv_fast.session.guard import History
from freeadv_fast.step.graphs import WARM_UP, GraphRunner
from freeadv_fast.step.learner import Learner, Pixels
from freeadv_fast.step.optim import build_sgd
from freeadv_fast.step.weight_perturbation import WeightPerturbation

GAMMA = 0.05
METHODS = pytest.mark.parametrize("name", ["pgd", "trades"])


def build(name, network, dtype=torch.float64, awp=GAMMA):
    kind, learner = {"pgd": Pgd, "trades": Trades}[name], slow.build_learner(network, dtype)
    options = {"beta": test_trades.BETA} if name == "trades" else {}
    return kind(learner, slow.threat(8, 3), attack_steps=3, awp=awp, **options)


def slow_point(name, trainer, images, labels):
    """Where the attack ends."""
    if name == "trades":
        return test_trades.slow_attack(trainer, images, "linf", 3)
    delta = test_pgd.slow_start(images, "linf")
    for _ in range(3):
        gradient = trainer.loss_gradient(images, delta, labels)
        delta = test_pgd.slow_ascent(delta, gradient, images, "linf")
    return delta


def slow_loss(name, trainer, images, delta, labels):
    if name == "trades":
        return test_trades.slow_loss(trainer, images, delta, labels)
    return trainer.loss(images, delta, labels)


def slow_steps_up(network, loss_of, gamma):
    """v of each weight: an SGD step of a proxy, brought to its length."""
    proxy = copy.deepcopy(network)
    optimizer = torch.optim.SGD(proxy.parameters(), lr=0.01)
    (-loss_of(proxy)).backward()
    optimizer.step()
    steps = {}
    for (key, old), new in zip(network.named_parameters(), proxy.parameters(), strict=True):
        if "weight" in key and old.dim() > 1:
            difference = (new - old).detach()
            steps[key] = gamma * old.detach().norm() * difference / difference.norm()
    return steps


def slow_update(name, trainer, images, labels, num_parts):
    """One update, each part with a perturbation of its own."""
    network, total = trainer.network, 0
    parts = zip(images.tensor_split(num_parts), labels.tensor_split(num_parts), strict=True)
    for own_images, own_labels in parts:
        delta = slow_point(name, trainer, own_images, own_labels)

        def loss_of(net, images=own_images, labels=own_labels, delta=delta):
            proxy = copy.copy(trainer)
            proxy.network = net
            return slow_loss(name, proxy, images, delta, labels)

        steps = slow_steps_up(network, loss_of, GAMMA)
        before = {key: p.detach().clone() for key, p in network.named_parameters()}
        with torch.no_grad():
            for key, step in steps.items():
                network.get_parameter(key).add_(step)
        share = len(own_images) / len(images)
        gradients = torch.autograd.grad(share * loss_of(network), list(network.parameters()))
        with torch.no_grad():
            for key, value in before.items():
                network.get_parameter(key).copy_(value)
        total = [g + (total[i] if total else 0) for i, g in enumerate(gradients)]
    trainer.descend(total)


@pytest.mark.parametrize("num_parts", [1, 2])
@METHODS
def test_equals_the_slow_loop(small_network, name, num_parts):
    """Weights and running statistics, with a smaller last minibatch."""
    ours, theirs = small_network(torch.float64), small_network(torch.float64)
    method = build(name, ours)
    weight_passes = {"pgd": 1, "trades": 2}[name]
    torch.manual_seed(7)
    for images, labels in slow.minibatches([6, 6, 4]):
        n = len(images)
        method.learner.minibatch_size = n // num_parts
        passes = method.train_minibatch(images, labels, n)
        assert passes == (weight_passes * n, (3 + weight_passes) * n)
    torch.manual_seed(7)
    trainer = slow.SlowTrainer(theirs)
    for images, labels in slow.minibatches([6, 6, 4]):
        slow_update(name, trainer, images, labels, num_parts)
    slow.assert_equal_networks(ours, theirs)
    assert slow.total_passes(method) == weight_passes * 16


def test_the_steps_are_exact_and_come_back(small_network):
    """To 1e-12 of the proxy's; biases and batch norm stay, and all is as it was to the bit."""
    network = small_network(torch.float64)
    learner = slow.build_learner(network)
    ((images, labels),) = slow.minibatches([6])
    x = learner.network_input(images)

    def loss():
        return learner.loss(x, labels, 6, role="adversarial")

    expected = slow_steps_up(
        network, lambda net: torch.nn.functional.cross_entropy(net(x), labels), GAMMA
    )
    assert list(expected) == ["0.weight", "3.weight", "7.weight"]
    before = copy.deepcopy(network.state_dict())
    with WeightPerturbation(learner, GAMMA).up(loss):
        for key, value in network.state_dict().items():
            wanted = before[key] + expected[key] if key in expected else before[key]
            torch.testing.assert_close(value, wanted, rtol=0, atol=1e-12)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not learner.meters.sums.any()
    with pytest.raises(RuntimeError, match="inside"), WeightPerturbation(learner, GAMMA).up(loss):
        raise RuntimeError("inside")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_gamma_0_costs_nothing(small_network):
    """test_pgd.py and test_trades.py train without."""
    perturbation = WeightPerturbation(slow.build_learner(small_network()), 0.0)
    with perturbation.up(lambda: pytest.fail("the loss was computed")):
        assert perturbation.passes == 0


@METHODS
def test_recorded_training_is_the_same_training(small_network, name):
    states = []
    for recorder in (None, recorded_training.Recorder()):
        learner = recorded_training.build_learner(small_network())
        learner.attack_scale_at = lambda update: 1.0
        if recorder is not None:
            recorder.learner = learner
            learner.record_with(GraphRunner(lambda line: pytest.fail(line), recorder))
        kind = {"pgd": Pgd, "trades": Trades}[name]
        method = kind(learner, slow.threat(8, 3), attack_steps=2, awp=GAMMA)
        torch.manual_seed(7)
        for images, labels in slow.minibatches([6] * (WARM_UP + 3)):
            method.train_minibatch(images, labels, 6)
        states.append(learner.net)
    assert recorder.num_launches == 3
    slow.assert_equal_networks(*states, tolerance=0)


@METHODS
def test_never_waits_for_the_device(small_network, name):
    slow.assert_never_reads(build(name, small_network(), torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns(small_network, dtype):
    slow.assert_learns(build("pgd", small_network(), dtype))


@METHODS
def test_fp16_overflow_moves_no_weight_and_spoils_no_statistics(small_network, name):
    method = build(name, small_network(), torch.float16)
    slow.assert_overflow_moves_no_weight(method)
    assert all(torch.isfinite(buffer).all() for buffer in method.learner.net.buffers())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_copies_follow_the_weights(small_network, half):
    """To the last bit the training without copies, and afterwards they are the weights."""
    networks = []
    for has_copies in (True, False):
        network = small_network()
        if has_copies:
            assert use_half_weights(network, half) == 5
        optimizer = build_sgd(network, lr=0.1, momentum=0.9, weight_decay=1e-2, decay="kernels")
        pixels = Pixels(torch.tensor(slow.MEAN), torch.tensor(slow.STD), half)
        method = Pgd(
            Learner(network, optimizer, lambda update: 0.1, pixels),
            slow.threat(8, 3), attack_steps=2, awp=GAMMA,
        )  # fmt: skip
        torch.manual_seed(7)
        for images, labels in slow.minibatches([6, 6, 6]):
            method.train_minibatch(images, labels, 6)
        networks.append(network)
    slow.assert_equal_networks(*networks, tolerance=0)
    copied = [p for p in networks[0].parameters() if half_copy(p)]
    assert all(torch.equal(half_copy(p).tensor, p.detach().to(half)) for p in copied)


def test_a_run_that_becomes_gradalign_leaves_it_out():
    config = TrainConfig(method="pgd", m=1, awp=0.01, on_collapse="gradalign")
    assert History(collapses=[{"action": "gradalign"}]).method_config(config).awp == 0


@pytest.mark.parametrize("awp", [-0.01, float("nan"), float("inf")])
def test_an_impossible_awp_is_refused(awp):
    with pytest.raises(UserError, match=r"--awp .*: must be zero or a positive number"):
        TrainConfig(method="pgd", m=1, awp=awp)


@pytest.mark.parametrize(
    "name", [name for name in method_names.METHODS if name not in ("pgd", "trades")]
)
def test_awp_is_for_pgd_and_trades(name):
    with pytest.raises(UserError, match=f"--awp 0.01: not for {name}; leave it out"):
        TrainConfig(method=name, m=1, awp=0.01)
