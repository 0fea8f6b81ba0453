"""Which parameters are under weight decay, the ways to compute SGD's update, and any by its name.

What lalr computes is tested in test_lalr.py.
"""

import dataclasses
import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from freeadv_fast.config.budget import Budget
from freeadv_fast.config.file import config_to_dict, load_config
from freeadv_fast.errors import UserError
from freeadv_fast.recipes.catalogue import RECIPES
from freeadv_fast.runs import checkpoint
from freeadv_fast.runs.log import RunFolder, save_config
from freeadv_fast.session.network import build_learner
from freeadv_fast.session.resume import find_checkpoint
from freeadv_fast.step.optim import (
    build_optimizer,
    is_capturable,
    load_apex_sgd,
    parameter_groups,
)

SGD_NAMES = ("sgd", "sgd-foreach", "apex-sgd")

# What PyPI's package does: it wants a version of Pyramid that nobody has.
WEB_TOOLKIT = "raise ImportError('cannot import name UnencryptedCookieSessionFactoryConfig')\n"

# FusedSGD as NVIDIA/apex 6424da3 has it, without what amp's master weights need; amp_C in Python.
FUSED_SGD = """
import amp_C
import torch


class FusedSGD(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum=0, dampening=0, weight_decay=0, nesterov=False):
        super().__init__(params, {
            "lr": lr, "momentum": momentum, "dampening": dampening,
            "weight_decay": weight_decay, "nesterov": nesterov,
        })

    def zero_grad(self):
        super().zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            first_run = True
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                first_run = "momentum_buffer" not in self.state[p]
                if first_run:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            for p in parameters:
                amp_C.multi_tensor_sgd(
                    p.grad, p, self.state[p]["momentum_buffer"], group["weight_decay"],
                    group["momentum"], float(group["lr"]), first_run,
                )
"""
# Rounds as torch's loop over the parameters does; the kernel itself is not under test.
AMP_C = """
def multi_tensor_sgd(grad, weight, velocity, weight_decay, momentum, lr, first_run):
    if weight_decay:
        grad = grad.add(weight, alpha=weight_decay)
    velocity.copy_(grad if first_run else velocity * momentum + grad)
    weight.add_(velocity, alpha=-lr)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts modules, by path and text, where `import` finds them first; forgets them afterwards."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(files, *, only=False):
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        sys.path[:] = [str(tmp_path)] if only else [str(tmp_path), *sys.path]
        importlib.invalidate_caches()

    forget_apex()
    yield write
    forget_apex()


def forget_apex():
    for name in apex_modules():
        del sys.modules[name]


def apex_modules():
    return [name for name in sys.modules if name.partition(".")[0] in ("apex", "amp_C")]


@pytest.fixture
def apex(install):
    """NVIDIA's apex, as far as this machine can have it."""
    install({"apex/__init__.py": "", "apex/optimizers/__init__.py": FUSED_SGD, "amp_C.py": AMP_C})


@pytest.mark.parametrize(
    ("decay", "decayed"),
    [
        ("all", {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"}),
        ("kernels", {"0.weight", "2.weight"}),
        ("no-bn", {"0.weight", "0.bias", "2.weight", "2.bias"}),
    ],
)
def test_decay(decay, decayed):
    """Everything is in one group or the other, in the network's order."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 1e-4, decay)
    for group in groups:
        is_decayed = group["weight_decay"] > 0
        expected = [name for name in names.values() if (name in decayed) == is_decayed]
        assert [names[parameter] for parameter in group["params"]] == expected
    assert sum(len(group["params"]) for group in groups) == len(names)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "NVIDIA apex is not installed; build https://github.com/NVIDIA/apex with APEX_"),
        (
            {"apex/__init__.py": WEB_TOOLKIT, "apex/lib/__init__.py": ""},
            "apex/__init__.py is not NVIDIA's (PyPI's is a web toolkit of that name); remove it",
        ),
        # A folder of that name on the path, such as the repository's own, where one works in it.
        ({"apex/README.md": ""}, "apex is not NVIDIA's (PyPI's is a web toolkit"),
        (
            {"apex/__init__.py": "", "apex/optimizers/__init__.py": FUSED_SGD},
            "this NVIDIA apex has no CUDA extensions (amp_C is missing); build https",
        ),
        (
            {
                "apex/__init__.py": "from . import multi_tensor_apply, optimizers",
                "apex/multi_tensor_apply.py": "",
                "apex/optimizers/__init__.py": "raise ImportError('undefined\\nsymbol: _ZN2at')",
                "amp_C.py": AMP_C,
            },
            f"does not load with torch {torch.__version__} (undefined symbol: _ZN2at); build https",
        ),
    ],
    ids=["nothing", "web toolkit", "folder", "no extensions", "other torch"],
)
def test_an_apex_that_cannot_be_used_gets_one_line(install, files, message):
    """Each with its own fix, and no module of a failed import left behind."""
    install(files, only=True)
    with pytest.raises(UserError) as caught:
        load_apex_sgd()
    line = str(caught.value)
    assert line.startswith("--optimizer apex-sgd: ")
    assert line.endswith(", or use --optimizer sgd")
    assert message in line
    assert "\n" not in line
    assert not apex_modules()


def test_apex_needs_a_gpu(apex, monkeypatch):
    """Before any of it is imported."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--optimizer apex-sgd: its kernel needs a GPU; use --opt"):
        build(nn.Linear(3, 2), "apex-sgd")
    assert not apex_modules()


def test_apex_is_imported_for_apex_alone(apex):
    for name in ("sgd", "sgd-foreach"):
        build(nn.Linear(3, 2), name)
    assert not apex_modules()
    build(nn.Linear(3, 2), "apex-sgd")
    assert apex_modules()


def test_apex_refuses_weights_that_it_would_not_train(apex):
    """Its step passes over all but float32 and float16, without a word."""
    with pytest.raises(UserError, match="apex-sgd: trains float32 weights, not torch.bfloat16"):
        build(nn.Linear(3, 2).bfloat16(), "apex-sgd")


def build(model, name, momentum=0.9):
    return build_optimizer(
        model,
        name=name,
        lr=0.1,
        momentum=momentum,
        weight_decay=1e-2,
        decay="kernels",
        lalr_min=0.0,
        lalr_max=10.0,
        lalr_exempt=False,
    )


def set_gradients(model, seed):
    """The first step reaches all parameters but the last."""
    random = torch.Generator().manual_seed(seed)
    parameters = list(model.parameters())
    for parameter in parameters[:-1] if seed == 0 else parameters:
        parameter.grad = torch.randn(parameter.shape, generator=random)


def assert_equal(ours, theirs):
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("name", ["sgd-foreach", "apex-sgd"])
def test_all_take_the_same_steps(small_network, apex, name, momentum):
    """To the last bit on a CPU, with weight decay and a falling rate."""
    ours, theirs = small_network(), small_network()
    for network, optimizer in (
        (ours, build(ours, name, momentum)),
        (theirs, build(theirs, "sgd", momentum)),
    ):
        for step in range(6):
            set_gradients(network, step)
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (step + 1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            assert all(p.grad is None for p in network.parameters())
    assert not torch.equal(ours[0].weight, small_network()[0].weight)
    assert_equal(ours, theirs)


@pytest.mark.parametrize("name", SGD_NAMES)
def test_an_overflow_skips_the_update(small_network, apex, name):
    """fp16's scaler works with each: the first step overflows, the second is the first good one."""
    ours, theirs = small_network(), small_network()
    optimizer, reference = build(ours, name), build(theirs, "sgd")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in (1, 2, 3):
        set_gradients(ours, step)
        if step == 1:
            ours[0].weight.grad[0, 0, 0, 0] = torch.inf
            scaler.scale(torch.ones(()))  # makes the scaler's tensors
        else:
            set_gradients(theirs, step)
            reference.step()
            torch._foreach_mul_([p.grad for p in ours.parameters()], scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        assert_equal(ours, theirs)
    assert scaler.get_scale() == 2.0**9


class HostReads(TorchDispatchMode):
    """Counts the tensors whose value becomes a Python number."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_capturable_step_reads_nothing_on_the_host(small_network, apex):
    """The learning rate is a tensor, as the recorder of a graph needs it."""
    networks = [small_network() for _ in range(3)]
    fused = torch.optim.SGD(networks[0].parameters(), lr=0.1, momentum=0.9, fused=True)
    optimizers = [fused, build(networks[1], "sgd-foreach"), build(networks[2], "apex-sgd")]
    reads = []
    for network, optimizer in zip(networks, optimizers, strict=True):
        set_gradients(network, 1)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.1)
        with HostReads() as counter:
            optimizer.step()
        reads.append(counter.count)
    assert reads[0] == 0 < min(reads[1:])
    assert [is_capturable(optimizer) for optimizer in optimizers] == [True, False, False]
    assert not is_capturable(build(small_network(), "sgd"))  # on a CPU not the fused one


@pytest.mark.parametrize("name", [*SGD_NAMES, "lalr"])
def test_a_resumed_learner_goes_on_bit_for_bit(small_network, world, apex, tmp_path, name):
    """Weights and moments after three updates, a file, and three more are those of six."""
    config = dataclasses.replace(RECIPES["digits-natural"], optimizer=name)
    images, labels = torch.rand(6, 4, 3, 8, 8), torch.randint(5, (6, 4))

    def start():
        network = small_network()
        return network, build_learner(network, config, world, Budget.of(config, [3]))

    def advance(network, learner, steps):
        def descend(images, labels):
            learner.backward(F.cross_entropy(network(images), labels))
            learner.apply_gradients()

        for step in steps:
            learner.update(descend, images[step], labels[step])

    straight, its_learner = start()
    optimizer = its_learner.optimizer
    assert isinstance(optimizer, torch.optim.SGD) == (name in ("sgd", "sgd-foreach"))
    assert bool(optimizer.defaults.get("foreach")) == (name == "sgd-foreach")
    advance(straight, its_learner, range(6))
    before, its_own = start()
    advance(before, its_own, range(3))
    torch.save({"net": before.state_dict(), "learner": its_own.state_dict()}, tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    resumed, learner = start()
    resumed.load_state_dict(state["net"])
    learner.load_state_dict(state["learner"])
    advance(resumed, learner, range(3, 6))
    assert_equal(resumed, straight)
    ours, theirs = (a.optimizer.state_dict()["state"] for a in (learner, its_learner))
    assert len(ours) == len(list(straight.parameters()))
    for index, entry in theirs.items():
        assert entry.keys() == (
            {"exp_avg", "exp_avg_sq"} if name == "lalr" else {"momentum_buffer"}
        )
        for key, moment in entry.items():
            assert torch.equal(ours[index][key], moment)
            assert moment.any()


def test_the_choice_is_saved_and_a_run_keeps_it(world, tmp_path):
    """config.yaml replays it; a run is not resumed with another."""
    config = dataclasses.replace(RECIPES["digits-free"], optimizer="sgd-foreach")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    folder = RunFolder(tmp_path / "run")
    state = dict.fromkeys(("learner", "progress", "guard", "good"), 0) | {"ranks": [0]}
    checkpoint.save_checkpoint(state | {"config": config_to_dict(config)}, folder.checkpoints)
    assert find_checkpoint(config, world, folder) is not None
    with pytest.raises(UserError, match="--optimizer sgd: the run in .* --optimizer sgd-foreach"):
        find_checkpoint(dataclasses.replace(config, optimizer="sgd"), world, folder)


def test_an_unknown_name_is_refused():
    """As a config.yaml may hold it, which no parser of flags has read."""
    with pytest.raises(UserError, match="--optimizer adam: choose one of .*apex-sgd, lalr$"):
        build(nn.Linear(3, 2), "adam")
