"""Fused batch norms: on a CPU the network computes what it did before, to the last bit."""

from __future__ import annotations

import copy
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

from freeadv_fast import ops
from freeadv_fast.errors import UserError
from freeadv_fast.learner import evaluating_tree
from freeadv_fast.models.batch_norm import (
    DualNetwork,
    GhostBatchNorm2d,
    GhostBatchNormAct2d,
    add_auxiliary_bn,
    apply_bn_groups,
)
from freeadv_fast.models.double_backward import FastDoubleBackward
from freeadv_fast.models.fused import FusedBatchNorm2d, fuse_batch_norms
from freeadv_fast.models.wide_resnet import MadryWideResNet, WideResNet
from freeadv_fast.models.zoo import build_model


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randomize(model):
    """Affines and statistics that show a missing layer, a missing ReLU or a wrong order."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    return model


def build(arch, **options):
    return randomize(build_model(arch, 10, image_size=32, **options))


def small_wide():
    return randomize(WideResNet(10, depth=10, widen_factor=1))


def small_madry():
    return randomize(MadryWideResNet(10, num_blocks=2, widen_factor=2))


def timm_resnet(**options):
    """Four narrow stages of one block each."""
    options |= {"layers": (1, 1, 1, 1), "channels": (4, 4, 4, 4), "num_classes": 10}
    return randomize(timm.models.resnet.ResNet(timm.models.resnet.Bottleneck, **options))


def batch_norms(model):
    layers = (nn.BatchNorm2d, nn.SyncBatchNorm)
    return [name for name, layer in model.named_modules() if isinstance(layer, layers)]


def assert_equal_training(model, plain, x, *branch):
    """One training and one evaluating pass: outputs, all gradients, all buffers, bit for bit."""
    results = []
    for network in (model, plain):
        rows = x.clone().requires_grad_()
        output = network.train()(rows, *branch)
        network.zero_grad()
        (output * torch.arange(output.numel()).view_as(output)).sum().backward()
        with torch.no_grad():
            evaluated = network.eval()(x, *branch)
        results.append({"output": output, "x": rows.grad, "eval": evaluated})
        results[-1] |= network.state_dict()
        # A branch leaves the other's affines without a gradient.
        results[-1] |= {f"{name}.grad": p.grad for name, p in network.named_parameters()}
    got, wanted = ({k: v for k, v in result.items() if v is not None} for result in results)
    assert list(got) == list(wanted)
    for name in wanted:
        assert torch.equal(got[name], wanted[name]), name


FULLY_FUSED = {
    "resnet18": lambda: build("resnet18"),
    "resnet50": lambda: build("resnet50"),
    "timm/resnet18": lambda: build("timm/resnet18"),
    "timm-deep-stem": lambda: timm_resnet(stem_type="deep", avg_down=True, replace_stem_pool=True),
    "timm-blur": lambda: timm_resnet(aa_layer=timm.layers.BlurPool2d),
    "preact-resnet18": lambda: build("preact-resnet18"),
    "preact-resnet18-gradalign": lambda: build("preact-resnet18-gradalign"),
    "wide": small_wide,
    "madry": small_madry,
    "standardized": lambda: build("resnet18", per_image_standardize=True),
}


@pytest.mark.parametrize("make", FULLY_FUSED.values(), ids=FULLY_FUSED)
def test_fused_networks_compute_the_same(make):
    plain = make()
    original = copy.deepcopy(plain)
    keys, parameters = list(original.state_dict()), dict(original.named_parameters())
    places = {key: value.data_ptr() for key, value in original.state_dict().items()}
    model, left = fuse_batch_norms(original)
    assert left == []
    assert batch_norms(model) == batch_norms(plain)
    assert isinstance(model, type(plain))
    assert list(model.state_dict()) == keys
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == places
    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert_equal_training(model, plain, torch.randn(4, 3, 32, 32))
    assert all(p.grad is not None for p in model.parameters())  # data parallelism waits for each


@pytest.mark.parametrize("group", [None, 2])
def test_fused_networks_in_float64_in_groups_and_after_deepcopy(group):
    plain = build("resnet18", bn_group=group).double()
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    x = torch.randn(5, 3, 32, 32, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    for network in (copy.deepcopy(model), model):
        assert_equal_training(network, copy.deepcopy(plain), x)
    groups = {layer.group for layer in model.modules() if isinstance(layer, FusedBatchNorm2d)}
    assert groups == {group}


def test_state_dicts_load_both_ways():
    plain, other = build("resnet18", bn_group=2), build("resnet18", bn_group=2)
    model, _ = fuse_batch_norms(other)
    x = torch.randn(4, 3, 32, 32)
    assert not torch.equal(model.eval()(x), plain.eval()(x))
    model.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(model(x), plain(x))
    randomize(model)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(x), plain(x))


def test_every_layer_runs_fused(monkeypatch):
    """The calls of `ops.batch_norm_act`: all norms of a ResNet, with what follows each."""
    calls, fused = [], ops.batch_norm_act

    def watch(x, *tensors, **options):
        calls.append((options["relu"], options["residual"] is not None, options["num_groups"]))
        return fused(x, *tensors, **options)

    monkeypatch.setattr(ops, "batch_norm_act", watch)
    model, _ = fuse_batch_norms(build("resnet18", bn_group=2))
    model(torch.randn(5, 3, 32, 32))
    plain, last, downsample = (True, False, 2), (True, True, 2), (False, False, 2)
    stages = [[plain, last, plain, last], *[[plain, downsample, last, plain, last]] * 3]
    assert calls == [plain, *[call for stage in stages for call in stage]]
    calls.clear()
    model.eval()(torch.randn(5, 3, 32, 32))
    assert {num_groups for *_, num_groups in calls} == {1}


@pytest.mark.parametrize(
    "make",
    [lambda: build("resnet18"), small_wide, small_madry],
    ids=["resnet18", "wide", "madry"],
)
@pytest.mark.parametrize("bn_group", [None, 4])
def test_both_branches_are_fused(make, bn_group):
    plain = make() if bn_group is None else apply_bn_groups(make(), bn_group)
    plain = randomize(add_auxiliary_bn(plain, 2))
    model, left = fuse_batch_norms(copy.deepcopy(plain))
    assert left == []
    assert list(model.state_dict()) == list(plain.state_dict())
    duals = DualNetwork(model), DualNetwork(plain)
    x = torch.randn(6, 3, 32, 32)
    for branch in ("main", "auxiliary", "attack"):
        tree, _ = (dual._branches[branch] for dual in duals)
        norms = [m for m in tree.modules() if isinstance(m, nn.BatchNorm2d)]
        assert {type(layer) for layer in norms} == {FusedBatchNorm2d}
        if branch != "main":
            assert {layer.group for layer in norms} == {2}
        assert_equal_training(*duals, x, branch)


def test_evaluating_tree():
    plain = build("resnet18")
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    tree = evaluating_tree(model)
    x = torch.randn(4, 3, 32, 32)
    model(x), plain.train()(x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert torch.equal(tree(x), plain.eval()(x))
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_moving_the_network_moves_what_twins_share():
    """A batch norm that stands at two places stays one, and so does a whole block."""
    norm, block = nn.BatchNorm2d(3), build("resnet18").layer1[0]
    model = nn.Sequential(
        nn.Sequential(norm, nn.ReLU()), norm, nn.Conv2d(3, 64, 1), block, nn.ReLU(), block
    )
    plain = copy.deepcopy(model)
    model, left = fuse_batch_norms(model)
    assert left == ["1"]
    model, plain = model.double(), plain.double()
    assert model[0][0].running_mean is model[1].running_mean
    assert model[3] is model[5]
    assert_equal_training(model, plain, torch.randn(4, 3, 5, 5, dtype=torch.float64))


def test_pairs_in_any_sequential():
    make = [
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU()),
        nn.BatchNorm2d(4),
        nn.ReLU6(),
        nn.BatchNorm2d(4),
    ]
    plain = randomize(nn.Sequential(*make))
    original = copy.deepcopy(plain)
    model, left = fuse_batch_norms(original)
    assert model is original
    assert left == ["3.1", "4", "6"]
    assert type(model[1]) is FusedBatchNorm2d
    assert type(model[2]) is nn.Identity
    assert_equal_training(model, plain, torch.randn(4, 3, 8, 8))


@pytest.mark.parametrize("group", [None, 2])
@pytest.mark.parametrize("apply_act", [True, False])
def test_timms_norm_with_its_own_activation(group, apply_act):
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), timm.layers.BatchNormAct2d(4, apply_act=apply_act))
    if group is not None:
        apply_bn_groups(plain, group)
        assert type(plain[1]) is GhostBatchNormAct2d
    randomize(add_auxiliary_bn(plain, 3))
    model, left = fuse_batch_norms(copy.deepcopy(plain))
    assert left == []
    assert type(model[1]) is type(model[1].aux_bn) is FusedBatchNorm2d
    assert model[1].relu is model[1].aux_bn.relu is apply_act
    assert_equal_training(model, plain, torch.randn(4, 3, 5, 5))


def test_a_second_call_changes_nothing():
    for make in (lambda: build("resnet18"), small_wide, small_madry):
        model, _ = fuse_batch_norms(make())
        modules = list(model.modules())
        again, left = fuse_batch_norms(model)
        assert left == []
        assert all(a is b for a, b in zip(modules, again.modules(), strict=True))


def hooked(choose, branches=False):
    def make():
        model = build("resnet18")
        model = add_auxiliary_bn(model, 2) if branches else model
        choose(model).register_forward_hook(lambda layer, inputs, output: None)
        return model

    return make


def patched(choose):
    def make():
        model = build("resnet18")
        module = choose(model)
        module.forward = lambda x: type(module).forward(module, x) + 1
        return model

    return make


class OwnNorm(nn.BatchNorm2d):
    """Somebody's batch norm."""

    def forward(self, x):
        return super().forward(x) + 1


class Doubled(nn.Sequential):
    """Somebody's sequence, which does more than run its layers."""

    def forward(self, x):
        return super().forward(x) + self[0](x)


def patched_sequence():
    sequence = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    sequence.forward = lambda x: sequence[0](x)
    return sequence


class OwnBlock(type(build_model("resnet18", 2, image_size=32).layer1[0])):
    """Somebody's block: the same children, another computation."""

    def forward(self, x):
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x


def with_own_block():
    model = build("resnet18")
    own = OwnBlock(64, 64)
    own.load_state_dict(model.layer1[0].state_dict())
    model.layer1[0] = own
    return model


BLOCK = ["layer1.0.bn1", "layer1.0.bn2"]


def bottlenecks(*stages):
    """Names of the batch norms in the only block of each stage."""
    layers = ("bn1", "bn2", "bn3", "downsample.1")
    return [f"layer{stage}.0.{layer}" for stage in stages for layer in layers]


LEFT_ALONE = {
    "timm-leaky": (lambda: timm_resnet(act_layer=nn.LeakyReLU), None),
    "timm-se": (lambda: timm_resnet(block_args={"attn_layer": "se"}), bottlenecks(1, 2, 3, 4)),
    # The first block is never dropped, and the first two stages drop no blocks of pixels.
    "timm-drop-path": (lambda: timm_resnet(drop_path_rate=0.5), bottlenecks(2, 3, 4)),
    "timm-drop-block": (lambda: timm_resnet(drop_block_rate=0.5), bottlenecks(3, 4)),
    "hook-on-norm": (hooked(lambda model: model.layer1[0].bn2), BLOCK),
    "hook-on-relu": (hooked(lambda model: model.layer1[0].relu), BLOCK),
    "hook-on-stem": (hooked(lambda model: model.bn1), ["bn1"]),
    "hook-on-branch": (hooked(lambda model: model.bn1.aux_bn, branches=True), ["bn1"]),
    "branches": (lambda: add_auxiliary_bn(nn.Sequential(nn.BatchNorm2d(3)), 2), ["0"]),
    "patched": (patched(lambda model: model.layer1[0]), BLOCK),
    "patched-norm": (patched(lambda model: model.layer1[0].bn2), BLOCK),
    "patched-sequence": (patched_sequence, ["0"]),
    "own-norm": (lambda: nn.Sequential(OwnNorm(3), nn.ReLU()), ["0"]),
    "own-sequence": (lambda: Doubled(nn.BatchNorm2d(3), nn.ReLU()), ["0"]),
    "subclass": (with_own_block, BLOCK),
    "nothing": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()), []),
}


@pytest.mark.parametrize(("make", "names"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_what_is_left_alone_is_named(make, names):
    torch.manual_seed(1)
    original = make()
    torch.manual_seed(1)
    plain = make()
    plain.load_state_dict(original.state_dict())
    model, left = fuse_batch_norms(original)
    assert model is original
    assert left == (batch_norms(plain) if names is None else names)
    still = {name: type(layer) for name, layer in model.named_modules() if name in left}
    assert set(still.values()) <= {nn.BatchNorm2d, OwnNorm}
    x = torch.randn(4, 3, 32, 32)
    results = []
    for network in (model.train(), plain.train()):
        torch.manual_seed(2)  # drop path and drop block
        results.append(network(x))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_every_kind_of_hook_keeps_a_layer(register):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    getattr(model[0], register)(lambda *_: None)
    assert fuse_batch_norms(model)[1] == ["0"]


@pytest.mark.parametrize(
    "options", [{"act_layer": nn.ReLU6}, {"drop_layer": nn.Dropout}], ids=["act", "drop"]
)
def test_timms_norm_with_another_activation_is_left(options):
    model = nn.Sequential(timm.layers.BatchNormAct2d(4, **options))
    assert fuse_batch_norms(model)[1] == ["0"]
    assert type(model[0]) is timm.layers.BatchNormAct2d


def test_unknown_batch_norms_are_named():
    model = nn.Sequential(nn.SyncBatchNorm(3), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(12))
    assert fuse_batch_norms(model)[1] == ["0", "3"]


def test_hooks_of_a_block_go_on_working():
    model = build("resnet18")
    shapes = []
    model.layer2[0].register_forward_hook(lambda block, inputs, output: shapes.append(output.shape))
    model, left = fuse_batch_norms(model)
    model(torch.randn(2, 3, 32, 32))
    assert left == []
    assert shapes == [(2, 128, 4, 4)]


class Split(torch.autograd.Function):
    """A fork as the kernels make it: two outputs in one memory, and both gradients in backward."""

    @staticmethod
    def forward(ctx, y, given):
        ctx.set_materialize_grads(False)
        ctx.given = given
        y = y.clone()
        return y, y.detach()

    @staticmethod
    def backward(ctx, *gradients):
        ctx.given.append(tuple(gradient is not None for gradient in gradients))
        return sum(gradient for gradient in gradients if gradient is not None), None


@pytest.fixture
def given(monkeypatch):
    """Which of a fork's two gradients were given, block by block, the last block first."""
    log, reference = [], ops.batch_norm_act

    def forking(*tensors, fork, **options):
        y = reference(*tensors, **options)
        if fork:
            return Split.apply(y, log) if y.requires_grad else (y, y)
        return y

    monkeypatch.setattr(ops, "batch_norm_act", forking)
    return log


BOTH, OUTPUT = (True, True), (True, False)


@pytest.mark.parametrize(
    ("name", "num_blocks"),
    [("resnet18", 8), ("resnet50", 16), ("timm/resnet18", 8), ("timm-deep-stem", 4)],
)
def test_shortcuts_read_the_alias(name, num_blocks, given):
    plain = FULLY_FUSED[name]()
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    assert_equal_training(model, plain, torch.randn(4, 3, 32, 32))
    assert given == [OUTPUT] + [BOTH] * (num_blocks - 1)


def test_shortcuts_of_both_branches_read_the_alias(given):
    plain = randomize(add_auxiliary_bn(build("resnet18"), 2))
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    duals = DualNetwork(copy.deepcopy(model)), DualNetwork(plain)
    for branch in ("main", "auxiliary"):
        given.clear()
        assert_equal_training(*duals, torch.randn(4, 3, 32, 32), branch)
        assert given == [OUTPUT] + [BOTH] * 7


def test_other_blocks_read_the_output(given):
    plain = with_own_block()
    plain.layer1[1], plain.layer1[0] = plain.layer1
    model, left = fuse_batch_norms(copy.deepcopy(plain))
    assert left == [name.replace("0", "1", 1) for name in BLOCK]
    assert_equal_training(model, plain, torch.randn(4, 3, 32, 32))
    assert given == [OUTPUT] + [BOTH] * 5 + [OUTPUT]


def two_blocks(between):
    first, second = build("resnet18").layer1
    return nn.Sequential(nn.Conv2d(3, 64, 1), first, between, second)


def doubling(block, inputs, output):
    if output.requires_grad:
        output.register_hook(lambda gradient: 2 * gradient)


def retaining(block, inputs, output):
    if output.requires_grad:
        output.retain_grad()
        block.kept = output


def detaching(block, inputs, output):
    return output.detach_()


@pytest.mark.parametrize("hook", [doubling, retaining, detaching])
def test_who_takes_the_gradient_of_an_output_gets_all_of_it(hook, given):
    plain = two_blocks(nn.Identity())
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    for network in (model, plain):
        network[1].register_forward_hook(hook)
    assert_equal_training(model, plain, torch.randn(4, 3, 8, 8))
    assert set(given) == {OUTPUT}
    if hook is retaining:
        assert torch.equal(model[1].kept.grad, plain[1].kept.grad)


@pytest.mark.parametrize("position", [1, 3])
def test_full_backward_hooks_see_all_of_a_gradient(position, given):
    plain = two_blocks(nn.Identity())
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    seen = []
    for network in (model, plain):
        network[position].register_full_backward_hook(lambda *gradients: seen.append(gradients[1:]))
    assert_equal_training(model, plain, torch.randn(4, 3, 8, 8))
    ours, theirs = seen
    for got, wanted in zip(ours, theirs, strict=True):
        assert torch.equal(got[0], wanted[0])


def test_an_in_place_layer_between_blocks_is_in_both_gradients(given):
    plain = two_blocks(nn.Threshold(0.5, 0.1))
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    model[2].inplace = True
    assert_equal_training(model, plain, torch.randn(4, 3, 8, 8))
    assert given == [OUTPUT, OUTPUT]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_blocks(use_reentrant, given):
    plain = two_blocks(nn.Identity())
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    x, gradients = torch.randn(4, 3, 8, 8), []
    for network in (model, plain):
        rows = x.clone().requires_grad_()
        output = checkpoint_sequential(network, 2, rows, use_reentrant=use_reentrant)
        output.square().sum().backward()
        gradients.append([rows.grad, *(p.grad for p in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_shortcuts_under_autocast(given):
    plain = two_blocks(nn.Identity())
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal_training(model, plain, torch.randn(4, 3, 8, 8))
    assert given == [OUTPUT, BOTH]


def test_blocks_write_into_no_others_output(given):
    model, _ = fuse_batch_norms(build("resnet18"))
    blocks = [block for stage in range(1, 5) for block in model.get_submodule(f"layer{stage}")]
    outputs = []
    for block in blocks:
        block.register_forward_hook(lambda _, inputs, y: outputs.append((y, y._version)))
    model(torch.randn(4, 3, 32, 32))
    assert len(outputs) == 8
    assert all(y._version == version for y, version in outputs)


def test_outputs_are_freed_without_the_garbage_collector(given):
    layer, x = FusedBatchNorm2d(3), torch.randn(4, 3, 5, 5)
    for training in (True, False):
        y = layer.requires_grad_(training)(x, x)
        ref = weakref.ref(y)
        del y
        assert ref() is None


def test_the_network_that_was_handed_over_keeps_its_class():
    for make, name in ((lambda: build("preact-resnet18"), "bn"), (small_wide, "bn1")):
        original = add_auxiliary_bn(make(), 2)
        classes = {type(layer) for layer in original.get_submodule(name).modules()}
        before, plain = type(original), copy.deepcopy(original)
        model, _ = fuse_batch_norms(original)
        assert type(original) is before is not type(model)
        assert {type(layer) for layer in original.get_submodule(name).modules()} == classes
        assert_equal_training(original, plain, torch.randn(4, 3, 32, 32))


def test_order_of_conversions():
    """Groups and branches come first; afterwards they are refused, not silently lost."""
    model, _ = fuse_batch_norms(build("resnet18"))
    with pytest.raises(UserError, match="no groups for a layer of type FusedBatchNorm2d"):
        apply_bn_groups(model, 2)
    with pytest.raises(UserError, match="no groups for a layer of type FusedBatchNorm2d"):
        add_auxiliary_bn(model, 2)


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("group", [None, 1, 2, 7])
@pytest.mark.parametrize(("relu", "slope"), [(True, 0.0), (True, 0.1), (False, 0.1)])
def test_layer_options(options, group, relu, slope):
    """Also those that the kernels do not have; two passes, so that statistics move on."""
    fused = FusedBatchNorm2d(3, group=group, relu=relu, negative_slope=slope, **options).double()
    plain = nn.BatchNorm2d(3, **options) if group is None else GhostBatchNorm2d(
        3, group=group, **options
    )  # fmt: skip
    plain = plain.double()
    plain.load_state_dict(fused.state_dict(), strict=True)
    for training in (True, True, False):
        x, residual = torch.randn(2, 5, 3, 2, 2, dtype=torch.float64).requires_grad_()
        for addend in (None, residual):
            output = fused.train(training)(x, addend)
            expected = plain.train(training)(x)
            expected = expected if addend is None else expected + addend
            expected = F.leaky_relu(expected, slope) if relu else expected
            assert torch.equal(output, expected)
    for (key, got), (_, wanted) in zip(
        fused.state_dict().items(), plain.state_dict().items(), strict=True
    ):
        assert torch.equal(got, wanted), key


def test_a_layer_that_stops_tracking():
    """Fine-tuning's way to keep the statistics of another data set."""
    fused = FusedBatchNorm2d(3, relu=False)
    fused.track_running_stats = False
    before = {key: value.clone() for key, value in fused.state_dict().items()}
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(fused(x), F.batch_norm(x, None, None, fused.weight, fused.bias, True))
    assert all(torch.equal(value, before[key]) for key, value in fused.state_dict().items())


def test_a_layer_says_what_it_is():
    assert repr(FusedBatchNorm2d(3, group=4, relu=False)).endswith("group=4, relu=False)")
    assert "relu=True, negative_slope=0.1" in repr(FusedBatchNorm2d(3, negative_slope=0.1))


def test_wrong_inputs_are_refused():
    layer = FusedBatchNorm2d(3)
    with pytest.raises(ValueError, match="expected 4D input"):
        layer(torch.randn(4, 3))
    with pytest.raises((RuntimeError, ValueError), match="value"):
        layer(torch.randn(1, 3, 1, 1))


def test_a_residual_in_another_dtype_is_added_as_torch_does():
    layer = FusedBatchNorm2d(3)
    x, residual = torch.randn(2, 4, 3, 5, 5).unbind()
    expected = F.batch_norm(x.bfloat16(), None, None, layer.weight, layer.bias, training=True)
    expected += residual
    output = layer(x.bfloat16(), residual)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected.relu())


@pytest.mark.parametrize("group", [None, 2])
def test_second_derivatives(group):
    """GradAlign's, through torch's own layers and through the fast ones."""
    plain = small_wide().double()
    if group is not None:
        apply_bn_groups(plain, group)
    model, _ = fuse_batch_norms(copy.deepcopy(plain))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    gradients = []
    for network, context in ((model, FastDoubleBackward()), (model, None), (plain, None)):
        rows = x.clone().requires_grad_()
        network.zero_grad()
        if context is None:
            loss = network(rows).square().sum()
        else:
            with context:
                loss = network(rows).square().sum()
        (gradient,) = torch.autograd.grad(loss, rows, create_graph=True)
        gradient.square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    fast, ours, wanted = gradients
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))
    for a, b in zip(fast, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * float(b.abs().max()))
