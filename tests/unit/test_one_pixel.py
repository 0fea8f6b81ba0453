"""Convolutions of one output pixel: the convolutions' values and gradients, their parameters."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from freeadv_fast.config.budget import Budget
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.models.one_pixel import OnePixelConv2d, use_products_for_one_pixel
from freeadv_fast.session.network import build_learner


def pair(layer):
    """The layer beside its stand-in, in a module that may replace it; both in channels_last."""
    layer.double().to(memory_format=torch.channels_last)
    twin = nn.Sequential(layer)
    use_products_for_one_pixel(twin)
    return layer, twin[0]


def num_convolutions(function, *inputs):
    """How many of the device's convolutions a call takes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*inputs)
    return sum(event.name == "aten::convolution" for event in profile.events())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((1, 1), {"kernel_size": 3, "padding": 1}),
        ((2, 2), {"kernel_size": 3, "padding": 1, "stride": 2}),
        ((1, 2), {"kernel_size": 3, "padding": 1, "stride": 2}),
        ((4, 5), {"kernel_size": (4, 5)}),
        ((3, 1), {"kernel_size": (3, 5), "padding": (0, 2), "stride": 7}),
    ],
)
def test_values_and_gradients_are_the_convolutions(size, options, bias):
    torch.manual_seed(0)
    plain, twin = pair(nn.Conv2d(6, 4, bias=bias, **options))
    assert type(twin) is OnePixelConv2d
    x = torch.randn(3, 6, *size, dtype=torch.float64, requires_grad=True)
    assert (num_convolutions(plain, x), num_convolutions(twin, x)) == (1, 0)
    assert twin(x).shape == (3, 4, 1, 1)
    wanted = [x, *plain.parameters()]
    both = []
    for layer in (plain, twin):
        y = layer(x).tanh()
        first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
        both.append([y, *first, *second])
    for ours, theirs in zip(both[1], both[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(2, 1), (1, 2), (4, 4)])
def test_more_pixels_are_convolved(size):
    plain, twin = pair(nn.Conv2d(6, 4, 3, padding=1))
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    assert num_convolutions(twin, x) == 1
    assert torch.equal(twin(x), plain(x))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding="same"),
        type("Own", (nn.Conv2d,), {})(4, 4, 3),
    ],
    ids=str,
)
def test_other_convolutions_are_left_alone(layer):
    plain, twin = pair(layer)
    assert twin is plain


def test_a_hooked_convolution_is_left_alone():
    layer = nn.Conv2d(4, 4, 3, padding=1)
    layer.register_forward_hook(lambda *_: None)
    assert pair(layer)[1] is layer


def test_a_run_on_a_cpu_takes_a_resnets_last_stage_so(world):
    """The three kernels of 512 channels and the one that leads to them; keys are the plain ones."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=10)
    keys = list(network.state_dict())
    plain = copy.deepcopy(network).eval()
    config = TrainConfig(arch="resnet18", image_size=32, normalization="none")
    learner = build_learner(network, config, world, Budget.of(config, [100]))
    assert list(learner.network.state_dict()) == keys
    x = torch.rand(2, 3, 32, 32)
    learner.network.eval()
    torch.testing.assert_close(learner.network(x), plain(x))
    assert num_convolutions(plain, x) - num_convolutions(learner.network, x) == 4
