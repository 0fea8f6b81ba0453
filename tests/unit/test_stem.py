"""The space-to-depth stem against torch's 7x7 convolution."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from freeadv_fast.models.fused.fuse import fuse_batch_norms
from freeadv_fast.models.stem import SpaceToDepthConv2d, use_space_to_depth
from freeadv_fast.models.zoo import build_model


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pack(x):
    """The packed layout, a pixel at a time."""
    num_images, _, height, width = x.shape
    packed = x.new_zeros(num_images, 16, (height + 1) // 2 + 3, (width + 1) // 2 + 3)
    for row in range(height):
        for column in range(width):
            first = row % 2 * 8 + column % 2 * 3
            packed[:, first : first + 3, row // 2 + 2, column // 2 + 2] = x[:, :, row, column]
    return packed.contiguous(memory_format=torch.channels_last)


def unpack(packed, height, width):
    """The three colours of packed images or of their gradient, by torch's own shuffle."""
    rows = packed[:, :, 2:-1, 2:-1].unflatten(1, (2, 8))[:, :, :6]
    blocks = rows.flatten(1, 2).unflatten(1, (4, 3)).transpose(1, 2).flatten(1, 2)
    return F.pixel_shuffle(blocks, 2)[:, :, :height, :width]


def make_stem(channels=8, **options):
    plain = nn.Conv2d(3, channels, 7, stride=2, padding=3, **options)
    stem = SpaceToDepthConv2d(channels, **options)
    stem.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(stem.state_dict(), strict=True)
    return stem, plain


SIZES = [(8, 8), (7, 7), (12, 5), (5, 12), (9, 16), (1, 1), (2, 3)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_outputs_and_gradients_are_the_convolutions(height, width, bias, dtype):
    stem, plain = make_stem(bias=bias, dtype=dtype)
    # The trainer's layout; the expansion must not depend on it.
    stem = stem.to(memory_format=torch.channels_last)
    x = torch.randn(3, 3, height, width, dtype=dtype, requires_grad=True)
    packed = pack(x.detach()).requires_grad_()
    output, expected = stem(packed), plain(x)
    assert output.is_contiguous(memory_format=torch.channels_last)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(output, expected, **close)
    weights = torch.randn_like(expected)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(unpack(packed.grad, height, width), x.grad, **close)
    for (name, got), (_, wanted) in zip(
        stem.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert got.grad.shape == wanted.grad.shape
        torch.testing.assert_close(got.grad, wanted.grad, **close, msg=name)


def test_the_kernels_zeros_never_train():
    """What stands in the border and in channels 6, 7, 14 and 15 reaches no weight through them."""
    stem, plain = make_stem(dtype=torch.float64)
    expanded = stem.packed_weight()
    assert expanded.is_contiguous(memory_format=torch.channels_last)
    assert int((expanded != 0).sum()) == plain.weight.numel()
    assert not expanded[:, [6, 7, 14, 15]].any()
    stem.packed_weight().backward(torch.ones_like(expanded))
    assert torch.equal(stem.weight.grad, torch.ones_like(plain.weight))


def test_autocast_rounds_the_weight_once():
    stem, _ = make_stem()
    packed = pack(torch.randn(2, 3, 8, 8)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert stem.packed_weight().dtype == torch.float32
        output = stem(packed)
    expected = F.conv2d(packed, stem.packed_weight().bfloat16(), stem.bias.bfloat16())
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_on_a_cpu_it_is_torchs_convolution_bit_for_bit(bias, dtype):
    stem, _ = make_stem(16, bias=bias)
    packed = pack(torch.randn(2, 3, 9, 8)).to(dtype).requires_grad_()
    results = []
    for convolve in (stem, lambda x: F.conv2d(x, stem.packed_weight(), stem.bias)):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            output = convolve(packed)
        gradients = torch.autograd.grad(output.square().sum(), [packed, *stem.parameters()])
        results.append([output, *gradients])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    assert output.grad_fn.name() == "ConvolutionBackward0"


def test_images_that_are_not_packed_still_work():
    stem, plain = make_stem()
    x = torch.randn(2, 3, 9, 8)
    assert torch.equal(stem(x), plain(x))
    with pytest.raises(RuntimeError, match="channels"):
        stem(torch.randn(2, 12, 9, 8))


def test_second_derivatives():
    stem, _ = make_stem(1, dtype=torch.float64)
    packed = pack(torch.randn(1, 3, 2, 1, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, _: stem(x), (packed, stem.weight))


def timm_resnet():
    """Four narrow stages of one block each."""
    block = timm.models.resnet.BasicBlock
    return timm.models.resnet.ResNet(block, (1, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=10)


@pytest.mark.parametrize(
    ("make", "fuse"),
    [(torchvision.models.resnet18, True), (timm_resnet, False), (timm_resnet, True)],
)
def test_a_resnet_through_packed_images(make, fuse):
    model = make().double()
    plain = copy.deepcopy(model)
    weight, keys = model.conv1.weight, list(model.state_dict())
    if fuse:
        model, left = fuse_batch_norms(model)
        assert left == []
    assert use_space_to_depth(model)
    assert type(model.conv1) is SpaceToDepthConv2d
    assert model.conv1.weight is weight
    assert list(model.state_dict()) == keys
    model.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(4, 3, 33, 32, dtype=torch.float64, requires_grad=True)
    packed = pack(x.detach()).requires_grad_()
    close = {"rtol": 1e-9, "atol": 1e-9}
    model = copy.deepcopy(model)
    logits, expected = model(packed), plain(x)
    torch.testing.assert_close(logits, expected, **close)
    got = torch.autograd.grad(logits.square().sum(), [packed, *model.parameters()])
    wanted = torch.autograd.grad(expected.square().sum(), [x, *plain.parameters()])
    torch.testing.assert_close(unpack(got[0], 33, 32), wanted[0], **close)
    for a, b in zip(got[1:], wanted[1:], strict=True):
        torch.testing.assert_close(a, b, **close)
    expected = plain.eval()(x)
    torch.testing.assert_close(model.eval()(x), expected, **close)
    torch.testing.assert_close(model(packed), expected, **close)


def test_a_second_call_changes_nothing():
    model = build_model("resnet18", 10, image_size=32)
    assert use_space_to_depth(model)
    stem = model.conv1
    assert use_space_to_depth(model)
    assert model.conv1.weight is stem.weight


class Backwards(nn.Module):
    """A network whose `conv1` is not what it applies first."""

    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(3, 3, 1)
        self.conv1 = nn.Conv2d(3, 8, 7, stride=2, padding=3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: build_model("preact-resnet18", 10, image_size=32),
        lambda: build_model("timm/resnet26d", 10, image_size=32),
        lambda: build_model("resnet18", 10, image_size=32, per_image_standardize=True),
        Backwards,
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 2)),
    ],
    ids=["preact", "deep-stem", "standardized", "unknown", "no-convolution"],
)
def test_other_networks_are_left_alone(make):
    model = make()
    before = list(model.modules())
    assert not use_space_to_depth(model)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 5},
        {"stride": 1},
        {"padding": 2},
        {"dilation": 2},
        {"padding_mode": "reflect"},
        {"in_channels": 1},
        {"in_channels": 3, "out_channels": 63, "groups": 3},
    ],
)
def test_other_convolutions_are_left_alone(options):
    model = build_model("resnet18", 10, image_size=32)
    defaults = {"in_channels": 3, "out_channels": 64, "kernel_size": 7}
    defaults |= {"stride": 2, "padding": 3}
    model.conv1 = nn.Conv2d(**(defaults | options))
    assert not use_space_to_depth(model)
    assert type(model.conv1) is nn.Conv2d
