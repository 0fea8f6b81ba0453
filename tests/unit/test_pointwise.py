"""1x1 convolutions as matrix products: the same results, and which way is chosen when."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import types

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from freeadv_fast import ops
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.distributed.world import World
from freeadv_fast.models import pointwise
from freeadv_fast.models.batch_norm import DualNetwork, add_auxiliary_bn
from freeadv_fast.models.fused import fuse_batch_norms
from freeadv_fast.models.pointwise import (
    WAYS,
    Layer,
    PointwiseConv2d,
    pointwise_conv2d,
    use_products,
)
from freeadv_fast.runs.log import RunFolder
from freeadv_fast.session.network import wants_products
from freeadv_fast.session.prepare import note_products

DIRECTIONS = ("output", "input_gradient", "weight_gradient")
TIME_WAYS, IS_CAPTURING = pointwise.time_ways, torch.cuda.is_current_stream_capturing
PRODUCT = {"convolution": 10.0, "product": 5.0}
CONVOLUTION = {"convolution": 10.0, "product": 20.0}


class Clock:
    """Stands for `time_ways`: what each trial takes is told beforehand."""

    def __init__(self):
        self.trials = 0
        self.microseconds = dict(PRODUCT)

    def __call__(self, ways):
        self.trials += 1
        for run in ways.values():
            run()
        return self.microseconds


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """No choice is made yet, nothing is recorded, and products are faster."""
    torch.manual_seed(0)
    monkeypatch.setattr(pointwise, "CHOICES", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    clock = Clock()
    monkeypatch.setattr(pointwise, "time_ways", clock)
    return clock


def drawn(num_images=3, channels=4, height=5, width=6, out_channels=7, **options):
    """Activations and a weight, channels_last."""
    options = {"dtype": torch.float64} | options
    x = torch.randn(num_images, channels, height, width, **options)
    weight = torch.randn(out_channels, channels, 1, 1, **options)
    return tuple(t.to(memory_format=torch.channels_last).requires_grad_() for t in (x, weight))


def chosen_ways():
    """The way of each direction of the only layer that was met."""
    (choices,) = pointwise.CHOICES.values()
    return [choices[direction].way for direction in DIRECTIONS]


def gradients(y, x, weight):
    torch.manual_seed(1)
    return torch.autograd.grad(y, (x, weight), torch.randn_like(y))


SHAPES = [(3, 4, 5, 6), (1, 4, 7, 7), (2, 1, 4, 3), (2, 5, 1, 1), (4, 3, 2, 1)]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_the_convolution(shape, stride):
    x, weight = drawn(*shape)
    y, expected = pointwise_conv2d(x, weight, stride), F.conv2d(x, weight, stride=stride)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected)
    for got, wanted in zip(gradients(y, x, weight), gradients(expected, x, weight), strict=True):
        assert got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got, wanted)
    assert chosen_ways() == ["product"] * 3


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_each_direction_goes_its_own_way(direction):
    x, weight = drawn()
    layer = Layer(tuple(x.shape), len(weight), 2, x.dtype)
    pointwise.CHOICES[layer] = {
        name: pointwise.chosen(PRODUCT if name == direction else CONVOLUTION) for name in DIRECTIONS
    }
    y, expected = pointwise_conv2d(x, weight, 2), F.conv2d(x, weight, stride=2)
    torch.testing.assert_close(y, expected)
    for got, wanted in zip(gradients(y, x, weight), gradients(expected, x, weight), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("microseconds", [PRODUCT, CONVOLUTION], ids=["product", "convolution"])
def test_second_derivatives(microseconds, clock):
    x, weight = drawn(1, 2, 3, 2, 2)
    clock.microseconds = microseconds
    assert torch.autograd.gradgradcheck(lambda *given: pointwise_conv2d(*given, 2), (x, weight))


def test_a_gradient_of_another_order_of_memory():
    x, weight = drawn()
    y = pointwise_conv2d(x, weight, 1)
    got = torch.autograd.grad(y.mean((2, 3)).square().sum(), (x, weight))
    y = F.conv2d(x, weight)
    wanted = torch.autograd.grad(y.mean((2, 3)).square().sum(), (x, weight))
    torch.testing.assert_close(got, wanted)


def test_the_output_may_be_changed_in_place():
    x, weight = drawn()
    y = pointwise_conv2d(x, weight, 1).relu_()
    expected = F.conv2d(x, weight).relu()
    torch.testing.assert_close(gradients(y, x, weight), gradients(expected, x, weight))


def test_only_what_is_asked_for_is_computed():
    """An attack's pass needs no weight's gradient, a first layer none of its input's."""
    x, weight = drawn()
    torch.autograd.grad(pointwise_conv2d(x, weight, 1).sum(), x)
    (choices,) = pointwise.CHOICES.values()
    assert set(choices) == {"output", "input_gradient"}
    pointwise.CHOICES.clear()
    pointwise_conv2d(x.detach(), weight, 1).sum().backward()
    (choices,) = pointwise.CHOICES.values()
    assert set(choices) == {"output", "weight_gradient"}
    pointwise.CHOICES.clear()
    with torch.no_grad():
        assert not pointwise_conv2d(x, weight, 1).requires_grad
    (choices,) = pointwise.CHOICES.values()
    assert set(choices) == {"output"}


class FakeEvent:
    """A CUDA event of a device whose work takes as long as it says."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = FakeEvent.now

    def elapsed_time(self, end):
        return end.time - self.time


def test_times_are_medians_without_the_warm_up(monkeypatch):
    """In turn, in microseconds, behind a filled cache that is not in them."""
    done = []

    class Filled:
        def zero_(self):
            done.append("fill")
            FakeEvent.now += 99

    def run(way, times):
        done.append(way)
        FakeEvent.now += next(times)

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda: types.SimpleNamespace(synchronize=int)
    )
    cache = types.SimpleNamespace(L2_cache_size=1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: cache)
    monkeypatch.setattr(torch, "empty", lambda size, **options: Filled())
    milliseconds = {
        "convolution": iter([50, 50, 1, 2, 30, 4, 5]),
        "product": iter([60, 60, 0.1, 0.2, 0.1, 0.3, 20]),
    }
    found = TIME_WAYS(
        {way: functools.partial(run, way, times) for way, times in milliseconds.items()}
    )
    assert found == {"convolution": 4000.0, "product": 200.0}
    assert done == ["fill", "convolution", "fill", "product"] * 7


@pytest.mark.parametrize(
    ("product", "way"), [(9.0, "product"), (9.9, "convolution"), (10.0, "convolution")]
)
def test_a_product_has_to_save_something(product, way):
    assert pointwise.chosen({"convolution": 10.0, "product": product}).way == way


def test_a_shape_is_timed_once(clock):
    x, weight = drawn()
    for _ in range(3):
        gradients(pointwise_conv2d(x, weight, 1), x, weight)
    assert clock.trials == 3
    half = x[:2].detach().requires_grad_()
    gradients(pointwise_conv2d(half, weight, 1), half, weight)
    assert clock.trials == 6
    gradients(pointwise_conv2d(x, weight, 2), x, weight)
    assert clock.trials == 9
    pointwise_conv2d(x.float(), weight.float(), 1)
    assert clock.trials == 10


def test_a_layer_that_no_product_helps_is_torchs_own(clock):
    x, weight = drawn()
    clock.microseconds = CONVOLUTION
    first = pointwise_conv2d(x, weight, 1)
    wanted = gradients(first, x, weight)
    assert chosen_ways() == ["convolution"] * 3
    y = pointwise_conv2d(x, weight, 1)
    assert type(y.grad_fn).__name__ == "ConvolutionBackward0"
    assert torch.equal(y, first)
    assert all(map(torch.equal, gradients(y, x, weight), wanted))


def test_nothing_is_timed_in_a_recording(clock, monkeypatch):
    x, weight = drawn()
    gradients(pointwise_conv2d(x, weight, 1), x, weight)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    new = x[:1].detach().requires_grad_()
    y, expected = pointwise_conv2d(new, weight, 1), F.conv2d(new, weight)
    assert torch.equal(y, expected)
    got, wanted = gradients(y, new, weight), gradients(expected, new, weight)
    assert all(map(torch.equal, got, wanted))
    assert clock.trials == 3
    assert chosen_ways() == ["product"] * 3  # the shape from before; nothing was noted for this one


def test_without_memory_for_a_trial_convolutions_run(monkeypatch):
    def fail(ways):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(pointwise, "time_ways", fail)
    x, weight = drawn()
    assert torch.equal(pointwise_conv2d(x, weight, 1), F.conv2d(x, weight))
    assert not pointwise.CHOICES


def test_split_sums_are_in_float32_meanwhile(clock, monkeypatch):
    """And as the user left them afterwards, also where a product fails."""
    matmul, seen = torch.backends.cuda.matmul, []
    mm = torch.mm

    def watched(*tensors, **options):
        seen.append(matmul.allow_bf16_reduced_precision_reduction)
        return mm(*tensors, **options)

    monkeypatch.setattr(torch, "mm", watched)
    x, weight = drawn(dtype=torch.bfloat16)
    gradients(pointwise_conv2d(x, weight, 1), x, weight)
    assert seen == [False] * 6  # each way runs in the trial as well
    assert matmul.allow_bf16_reduced_precision_reduction
    layer = Layer(tuple(x.shape), 7, 1, x.dtype)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        WAYS["output"]["product"](layer, x.detach(), torch.zeros(7, 9, 1, 1, dtype=x.dtype))
    assert matmul.allow_bf16_reduced_precision_reduction


def bottlenecks(groups=1):
    """torchvision's ResNet of four narrow bottlenecks."""
    block = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(
        block, [1, 1, 1, 1], num_classes=5, groups=groups, width_per_group=4
    )


def products_in(model):
    return [name for name, layer in model.named_modules() if type(layer) is PointwiseConv2d]


def test_a_network_keeps_its_tensors_keys_and_hooks():
    model = bottlenecks()
    shapes = []
    model.layer2[0].downsample[0].register_forward_hook(
        lambda layer, inputs, output: shapes.append(tuple(output.shape))
    )
    keys, parameters = list(model.state_dict()), list(model.parameters())
    fused, _ = fuse_batch_norms(model)
    use_products(fused)
    assert products_in(fused) == [
        f"layer{stage}.0.{name}"
        for stage in range(1, 5)
        for name in ("conv1", "conv3", "downsample.0")
    ]
    assert fused.layer2[0].downsample[0].stride == (2, 2)
    assert list(fused.state_dict()) == keys
    assert all(a is b for a, b in zip(fused.parameters(), parameters, strict=True))
    before = list(fused.modules())
    use_products(fused)
    assert all(a is b for a, b in zip(fused.modules(), before, strict=True))
    fused(torch.randn(2, 3, 32, 32))
    assert shapes == [(2, 512, 4, 4)]


def test_a_network_through_products_trains_as_before(monkeypatch, clock):
    monkeypatch.setattr(pointwise, "_is_taken", lambda x, weight: True)
    model = bottlenecks().double().to(memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    use_products(model)
    x = torch.randn(2, 3, 33, 32, dtype=torch.float64).to(memory_format=torch.channels_last)
    logits, expected = model(x), plain(x)
    torch.testing.assert_close(logits, expected)
    assert clock.trials
    got = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
    wanted = torch.autograd.grad(expected.square().sum(), list(plain.parameters()))
    torch.testing.assert_close(got, wanted)


def test_both_branches_go_through_products(monkeypatch):
    seen = []
    monkeypatch.setattr(pointwise, "_is_taken", lambda x, weight: seen.append(weight))
    model = add_auxiliary_bn(bottlenecks(), 2)
    use_products(model)
    dual = DualNetwork(model)
    for branch in ("main", "auxiliary"):
        dual(torch.randn(4, 3, 32, 32), branch)
    assert len(seen) == 24
    assert len({id(weight) for weight in seen}) == 12


@pytest.mark.parametrize("is_cast", [False, True])
def test_on_a_cpu_it_is_the_convolution(is_cast, clock):
    plain = nn.Conv2d(4, 7, 1, stride=2, bias=False)
    layer = PointwiseConv2d(4, 7, 2)
    layer.load_state_dict(plain.state_dict(), strict=True)
    results = []
    for network in (layer, plain):
        x = torch.linspace(-1, 1, 3 * 4 * 5 * 5).view(3, 4, 5, 5).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            y = network(x)
        y.float().square().sum().backward()
        results.append((y, x.grad, network.weight.grad))
    assert all(map(torch.equal, *results))
    assert all(a.dtype == b.dtype for a, b in zip(*results, strict=True))
    assert clock.trials == 0


class OwnConvolution(nn.Conv2d):
    """Somebody's."""


def patched():
    layer = nn.Conv2d(4, 4, 1, bias=False)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(4, 4, 1),
        lambda: nn.Conv2d(4, 4, 3, padding=1, bias=False),
        lambda: nn.Conv2d(4, 4, (1, 3), bias=False),
        lambda: nn.Conv2d(4, 4, 1, stride=3, bias=False),
        lambda: nn.Conv2d(4, 4, 1, stride=(1, 2), bias=False),
        lambda: nn.Conv2d(4, 4, 1, padding=1, bias=False),
        lambda: nn.Conv2d(4, 4, 1, padding="same", bias=False),
        lambda: nn.Conv2d(4, 4, 1, groups=2, bias=False),
        lambda: nn.Conv1d(4, 4, 1, bias=False),
        lambda: OwnConvolution(4, 4, 1, bias=False),
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1, bias=False)),
        patched,
    ],
)
def test_other_layers_are_left_alone(make):
    model = nn.Sequential(make())
    layer = model[0]
    use_products(model)
    assert model[0] is layer


def test_a_layer_at_two_places_stays_one():
    layer = nn.Conv2d(4, 4, 1, bias=False)
    model = nn.Sequential(layer, nn.Sequential(layer))
    use_products(model)
    assert type(model[0]) is PointwiseConv2d
    assert model[0] is model[1][0]


def test_products_are_for_gpus_with_fused_norms(monkeypatch, world):
    """And for those who do not take them out to time the rest."""
    monkeypatch.setattr(ops, "backend", lambda device: "triton")
    gpu, config = World(0, 1, torch.device("cuda")), TrainConfig()
    assert wants_products(config, gpu)
    assert not wants_products(dataclasses.replace(config, fuse="off"), gpu)
    assert not wants_products(config, world)
    monkeypatch.setattr(ops, "FAST_PATHS", ops.FAST_PATHS - {"products"})
    assert not wants_products(config, gpu)


def test_a_runs_choices_are_in_its_env_json(tmp_path):
    folder = RunFolder(tmp_path)
    folder.environment.write_text(json.dumps({"ranks": 1}))
    note_products(folder)
    assert json.loads(folder.environment.read_text()) == {"ranks": 1}
    x, weight = drawn(dtype=torch.float32)
    pointwise_conv2d(x, weight, 2)
    note_products(folder)
    written = folder.environment.stat().st_mtime_ns
    record = json.loads(folder.environment.read_text())
    assert record["ranks"] == 1
    assert record["products"] == [
        {
            "input": [3, 4, 5, 6],
            "out_channels": 7,
            "stride": 2,
            "dtype": "float32",
            "output": {"way": "product", "microseconds": PRODUCT},
        }
    ]
    note_products(folder)
    assert folder.environment.stat().st_mtime_ns == written
    folder.environment.write_text("torn")
    note_products(folder)
    assert folder.environment.read_text() == "torn"


def gpu(test):
    """Marks a test that multiplies on a real GPU."""
    needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(needs_device(test))


@pytest.fixture
def real_clock(monkeypatch):
    """Times on the device, and records for real."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", IS_CAPTURING)
    monkeypatch.setattr(pointwise, "time_ways", TIME_WAYS)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        yield


@gpu
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_round_as_convolutions_do(dtype, stride, real_clock):
    """err(product) <= 2 err(cuDNN), both against fp64: sums over 200,000 rows as well."""
    x, weight = drawn(64, 64, 57, 55, 128, dtype=dtype, device="cuda")
    layer = Layer(tuple(x.shape), len(weight), stride, dtype)
    dy = torch.randn(layer.output, dtype=dtype, device="cuda")
    dy = dy.to(memory_format=torch.channels_last)
    x, weight = x.detach(), weight.detach()
    exact_x, exact_weight = (t.double().requires_grad_() for t in (x, weight))
    exact = F.conv2d(exact_x, exact_weight, stride=stride)
    references = (exact, *torch.autograd.grad(exact, (exact_x, exact_weight), dy.double()))
    tensors = {"output": (x, weight)}
    for direction, reference in zip(DIRECTIONS, references, strict=True):
        results = {
            way: run(layer, *tensors.get(direction, (dy, x, weight)))
            for way, run in WAYS[direction].items()
        }
        error = {way: (y.double() - reference).norm().item() for way, y in results.items()}
        assert error["product"] <= 2 * error["convolution"] + 1e-12


@gpu
def test_choices_are_made_before_a_recording_and_hold_in_it(real_clock):
    torch.manual_seed(0)
    layer = PointwiseConv2d(64, 256, 1, device="cuda")
    x = torch.randn(32, 64, 14, 14, device="cuda").to(memory_format=torch.channels_last)

    def step():
        layer.weight.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x.bfloat16())
        y.float().square().sum().backward()
        return y

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        step()
        expected = step(), layer.weight.grad.clone()
    (choices,) = pointwise.CHOICES.values()
    assert set(choices) == {"output", "weight_gradient"}
    assert all(0 < us < 1e5 for choice in choices.values() for us in choice.microseconds.values())
    made = copy.deepcopy(pointwise.CHOICES)
    with torch.cuda.graph(graph, stream=stream):
        y = step()
    graph.replay()
    torch.cuda.synchronize()
    assert made == pointwise.CHOICES
    torch.testing.assert_close(y, expected[0])
    torch.testing.assert_close(layer.weight.grad, expected[1])


@gpu
def test_float32_and_other_layouts_stay_convolutions(real_clock):
    layer = PointwiseConv2d(8, 8, device="cuda")
    x = torch.randn(4, 8, 6, 6, device="cuda")
    layer(x.to(memory_format=torch.channels_last))
    with torch.autocast("cuda", torch.bfloat16):
        layer(x)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False):
            layer(x.to(memory_format=torch.channels_last))
    assert not pointwise.CHOICES
