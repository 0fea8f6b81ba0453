"""Layer-wise adaptive rates against the formula in double precision, tensor by tensor."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from freeadv_fast.config.budget import Budget
from freeadv_fast.errors import UserError
from freeadv_fast.kernels import lalr as kernel
from freeadv_fast.ops import dispatch
from freeadv_fast.recipes.catalogue import RECIPES
from freeadv_fast.session.network import build_learner
from freeadv_fast.step.lalr import Lalr
from freeadv_fast.step.optim import build_optimizer, is_capturable

LR, BETA, DECAY = 0.02, 0.9, 1e-2


def build(network, *, decay="all", lr=LR, least=0.0, greatest=10.0, exempt=False):
    optimizer = build_optimizer(
        network,
        name="lalr",
        lr=lr,
        momentum=BETA,
        weight_decay=DECAY,
        decay=decay,
        lalr_min=least,
        lalr_max=greatest,
        lalr_exempt=exempt,
    )
    assert isinstance(optimizer, Lalr)
    return optimizer


def set_gradients(network, seed, *, without=()):
    random = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        gradient = torch.randn(parameter.shape, generator=random).to(parameter)
        parameter.grad = None if name in without else gradient


class SlowLalr:
    """The formula, a tensor at a time, on copies of the parameters in double precision."""

    def __init__(self, network, *, least=0.0, greatest=10.0, exempt=(), undecayed=()):
        copies = {n: p.detach().double().clone() for n, p in network.named_parameters()}
        self.theta = copies
        self.m = {name: torch.zeros_like(copy) for name, copy in copies.items()}
        self.v = {name: torch.zeros_like(copy) for name, copy in copies.items()}
        self.least, self.greatest = least, greatest
        self.exempt, self.undecayed = exempt, undecayed
        self.ratios = {}

    def step(self, network, lr):
        for name, parameter in network.named_parameters():
            if parameter.grad is None:
                continue
            g, theta = parameter.grad.double(), self.theta[name]
            self.m[name] = BETA * self.m[name] + (1 - BETA) * g
            self.v[name] = 0.999 * self.v[name] + 0.001 * g**2
            u = self.m[name] / (self.v[name] ** 0.5 + 1e-6)
            if name not in self.undecayed:
                u += DECAY * theta
            length, u_length = float((theta**2).sum() ** 0.5), float((u**2).sum() ** 0.5)
            length, ratio = min(max(length, self.least), self.greatest), 1.0
            if length and u_length and name not in self.exempt:
                ratio = length / u_length
            self.ratios[name] = ratio
            self.theta[name] = theta - lr * ratio * u


def assert_near(network, slow, rtol):
    for name, parameter in network.named_parameters():
        expected = slow.theta[name]
        torch.testing.assert_close(parameter.double(), expected, rtol=rtol, atol=rtol)


VECTORS = ("1.weight", "1.bias", "3.bias", "4.weight", "4.bias", "7.bias")


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"least": 2.0, "greatest": 3.0}, {"least": 2.0, "greatest": 3.0}),
        ({"exempt": True}, {"exempt": VECTORS}),
        ({"decay": "kernels"}, {"undecayed": VECTORS}),
        (
            {"decay": "no-bn", "exempt": True, "greatest": 0.5},
            {
                "undecayed": ("1.weight", "1.bias", "4.weight", "4.bias"),
                "exempt": VECTORS,
                "greatest": 0.5,
            },
        ),
    ],
    ids=["plain", "both bounds", "exempt", "kernels", "no-bn, exempt, bounded"],
)
def test_equals_the_formula(small_network, ours, theirs, memory_format, dtype, rtol):
    """Five updates; batch norm's biases start at zero, and one weight gets its gradient later."""
    network = small_network(dtype).to(memory_format=memory_format)
    optimizer, slow = build(network, **ours), SlowLalr(network, **theirs)
    for step in range(5):
        set_gradients(network, step, without=("3.weight",) if step < 2 else ())
        lr = LR / (step + 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        slow.step(network, lr)
        if step == 0:
            assert (slow.ratios["1.bias"] == 1) == ("least" not in ours)
            assert slow.ratios["0.weight"] != 1
    assert_near(network, slow, rtol)


def test_bounds_bind(small_network):
    """A tensor's step is lr times its norm, within the bounds, in any direction of the gradient."""
    for least, greatest in ((0.0, 10.0), (3.0, 10.0), (0.0, 0.5)):
        network = small_network()
        weight = network[0].weight
        before = weight.detach().clone()
        optimizer = build(network, least=least, greatest=greatest)
        set_gradients(network, 0)
        optimizer.step()
        norm = min(max(float(before.norm()), least), greatest)
        assert float((weight.detach() - before).norm()) == pytest.approx(LR * norm, rel=1e-5)
    assert 0.5 < float(before.norm()) < 3.0  # so that each case is another


def test_zeros_without_a_direction_stay_zeros(small_network):
    """Without gradient and decay u is zero, and 0 / 0 is nowhere."""
    network = small_network()
    optimizer = build(network)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert not network[1].bias.any()
    assert all(p.isfinite().all() for p in network.parameters())
    assert not torch.equal(network[0].weight, small_network()[0].weight)  # decayed


def test_a_zero_tensor_counts_with_the_least_norm(small_network):
    """With c_l above 0 nothing is divided by zero: the formula holds."""
    network = small_network()
    optimizer = build(network, least=0.3)
    set_gradients(network, 0)
    optimizer.step()
    assert float(network[1].bias.detach().norm()) == pytest.approx(LR * 0.3, rel=1e-5)


def test_the_rate_may_be_a_tensor(small_network):
    ours, theirs = small_network(), small_network()
    for network, lr in ((ours, torch.tensor(LR)), (theirs, LR)):
        optimizer = build(network)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for step in range(3):
            set_gradients(network, step)
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_batches_do_not_show(small_network, monkeypatch):
    """Tensors share calls and a scratch; one in each gives the same bits."""
    networks = [small_network(), small_network()]
    for network, batch in zip(networks, (1 << 18, 1), strict=True):
        monkeypatch.setattr(kernel, "BATCH", batch)
        optimizer = build(network)
        for step in range(3):
            set_gradients(network, step)
            optimizer.step()
    for ours, theirs in zip(*(n.parameters() for n in networks), strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_in_another_order_are_copied(small_network):
    """torch's fused Adam, which does moments and direction, reads memory from end to end."""
    networks = [small_network().to(memory_format=torch.channels_last) for _ in range(2)]
    for network, memory_format in zip(
        networks, (torch.channels_last, torch.contiguous_format), strict=True
    ):
        set_gradients(network, 0)
        weight = network[3].weight
        weight.grad = weight.grad.contiguous(memory_format=memory_format)
        build(network).step()
    assert networks[0][3].weight.grad.stride() != networks[1][3].weight.grad.stride()
    assert torch.equal(networks[0][3].weight, networks[1][3].weight)


def test_a_saved_moment_takes_the_order_of_its_parameter(small_network):
    """A checkpoint may come from where weights lay otherwise."""
    saved, network = small_network(), small_network().to(memory_format=torch.channels_last)
    theirs, ours = build(saved), build(network)
    for step in range(2):
        set_gradients(saved, step)
        theirs.step()
    network.load_state_dict(saved.state_dict())
    ours.load_state_dict(theirs.state_dict())
    weight = network[3].weight
    assert ours.state[weight]["exp_avg"].stride() == weight.stride() != saved[3].weight.stride()
    for each, optimizer in ((saved, theirs), (network, ours)):
        set_gradients(each, 2)
        optimizer.step()
    torch.testing.assert_close(weight, saved[3].weight, rtol=1e-6, atol=1e-7)


def test_a_weight_with_gaps_is_refused():
    """Its neighbours in memory would be taken for its own values."""
    network = torch.nn.Linear(4, 3, bias=False)
    network.weight = torch.nn.Parameter(torch.randn(3, 8)[:, ::2])
    with pytest.raises(UserError, match=r"--optimizer lalr: a weight of shape \(3, 4\) has gaps"):
        build(network)


def test_an_overflow_skips_the_update(small_network):
    """fp16's scaler reads its verdict on the host where there is no kernel."""
    network, expected = small_network(), small_network()
    optimizer = build(network)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))  # makes the scaler's tensors
    set_gradients(network, 0)
    network[0].weight.grad[0, 0, 0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    for ours, theirs in zip(network.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(not moment.any() for s in optimizer.state.values() for moment in s.values())
    set_gradients(network, 1)
    set_gradients(expected, 1)
    torch._foreach_mul_([p.grad for p in network.parameters()], scaler.get_scale())
    scaler.step(optimizer)
    build(expected).step()
    for ours, theirs in zip(network.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_kernels_take_the_scalers_verdict_and_can_be_captured(small_network, monkeypatch):
    """What a GPU would run, with the kernels' calls written down in their place."""
    calls = []
    monkeypatch.setattr(dispatch, "backend", lambda device: "triton")
    monkeypatch.setattr(kernel, "Table", lambda params, exempt: (len(params), exempt))
    monkeypatch.setattr(kernel, "lalr_", lambda *args, **rest: calls.append((args, rest)))
    network = small_network()
    optimizer = build(network, decay="kernels", exempt=True)
    assert is_capturable(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    set_gradients(network, 0)
    network[0].weight.grad[0, 0, 0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    optimizer.step()
    assert [args[0] for args, _ in calls] == [(3, True), (len(VECTORS), True)] * 2
    verdicts = [(rest["grad_scale"], rest["found_inf"]) for _, rest in calls]
    assert verdicts == [(4.0, 1.0)] * 2 + [(None, None)] * 2
    assert [rest["weight_decay"] for _, rest in calls] == [DECAY, 0.0] * 2


def test_kernels_take_float32_alone(small_network, monkeypatch):
    """Other weights go by the reference, also on a GPU, and are not recorded."""
    monkeypatch.setattr(dispatch, "backend", lambda device: "triton")
    monkeypatch.setattr(kernel, "Table", lambda params, exempt: pytest.fail("made a table"))
    assert not is_capturable(build(small_network(torch.float64)))


def test_it_trains(small_network, world):
    """A learner with lalr fits a few images; on a CPU no graph holds its step."""
    config = dataclasses.replace(RECIPES["digits-natural"], optimizer="lalr", lr=0.05)
    network = small_network()
    learner = build_learner(network, config, world, Budget.of(config, [3]))
    learner.lr_at = lambda update: config.lr
    assert isinstance(learner.optimizer, Lalr)
    assert not is_capturable(learner.optimizer)
    random = torch.Generator().manual_seed(0)
    images = torch.randn(10, 3, 8, 8, generator=random)
    labels = torch.arange(10) % 5
    losses = []

    def descend(images, labels):
        loss = F.cross_entropy(network(images), labels)
        learner.backward(loss)
        learner.apply_gradients()
        losses.append(float(loss.detach()))

    for _ in range(30):
        learner.update(descend, images, labels)
    assert losses[-1] < 0.2 * losses[0]
