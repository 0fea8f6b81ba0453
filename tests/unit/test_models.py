"""Networks against hand-counted parameters and independent re-implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

from freeadv_fast.errors import UserError
from freeadv_fast.models.cifar_resnet import CifarResNet
from freeadv_fast.models.normalize import (
    PerImageStandardizer,
    StandardizedNetwork,
    plain_network,
    unit_images,
    with_normalizer,
)
from freeadv_fast.models.preact_resnet import PreActResNet18
from freeadv_fast.models.wide_resnet import MadryWideResNet, WideResNet
from freeadv_fast.models.zoo import build_model, library_options


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randomize_batch_norms(model: torch.nn.Module) -> None:
    """Makes every batch norm do something, so that a missing one shows."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)


def madry_parameters(num_classes: int) -> int:
    """WRN-32-10, counted by hand: convolutions, two batch norms a block, the last one, linear."""
    total = 3 * 16 * 9
    widths = (16, 160, 320, 640)
    for before, width in zip(widths, widths[1:], strict=False):
        total += before * width * 9 + width * width * 9 + 2 * before + 2 * width
        total += 4 * (2 * width * width * 9 + 4 * width)
    return total + 2 * 640 + 640 * num_classes + num_classes


@pytest.mark.parametrize(
    ("arch", "image_size", "num_classes", "num_parameters"),
    [
        ("wrn-32-10", 32, 10, madry_parameters(10)),
        ("wrn-34-10", 32, 10, 46_160_474),  # as published with TRADES's weights
        ("cifar-resnet18", 32, 10, 11_173_962),  # as pytorch-cifar's has
        ("preact-resnet18", 32, 10, 11_171_146 + 2 * 512),
        ("preact-resnet18-gradalign", 32, 10, 11_171_146),
        ("resnet18", 32, 10, 11_689_512 - 990 * 513),
        ("timm/resnet18", 32, 1000, 11_689_512),
        ("timm/vit_tiny_patch16_224", 32, 10, 5_717_416 - 990 * 193 - (196 - 4) * 192),
    ],
)
def test_number_of_parameters(arch, image_size, num_classes, num_parameters):
    model = build_model(arch, num_classes, image_size=image_size)
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    assert model.training


def reference_batch_norm(x, state, name, eps):
    mean, var, weight, bias = (
        state[f"{name}.{key}"][None, :, None, None]
        for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(var + eps) * weight + bias


def tensorflow_conv(x, kernel, stride):
    """A 3x3 convolution with SAME padding as TensorFlow documents it."""
    padding = []
    for size in (x.shape[3], x.shape[2]):
        total = max((math.ceil(size / stride) - 1) * stride + 3 - size, 0)
        padding += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, padding), kernel, stride=stride)


def madry_reference(x, state, num_blocks):
    """WRN-32-10 from peers.md 1.1b: tensors and a dictionary, no modules."""

    def activate(x, name):
        x = reference_batch_norm(x, state, name, 1e-3)
        return torch.where(x < 0, 0.1 * x, x)

    x = tensorflow_conv(x, state["conv1.weight"], 1)
    for stage in (1, 2, 3):
        for block in range(num_blocks):
            name = f"block{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            shortcut, x = x, activate(x, f"{name}.bn1")
            if stage == 1 and block == 0:
                shortcut = x
            x = tensorflow_conv(x, state[f"{name}.conv1.weight"], stride)
            x = tensorflow_conv(activate(x, f"{name}.bn2"), state[f"{name}.conv2.weight"], 1)
            if stride == 2:
                shortcut = sum(shortcut[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
            missing = (x.shape[1] - shortcut.shape[1]) // 2
            zeros = torch.zeros_like(shortcut[:, :1]).repeat(1, missing, 1, 1)
            x = x + torch.cat([zeros, shortcut, zeros], dim=1)
    x = activate(x, "bn").sum(dim=(2, 3)) / (x.shape[2] * x.shape[3])
    return x @ state["fc.weight"].T + state["fc.bias"]


def test_madry_network_against_a_functional_one():
    model = MadryWideResNet(7, widen_factor=2).double().eval()
    randomize_batch_norms(model)
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    expected = madry_reference(x.clone(), model.state_dict(), num_blocks=5)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    channels_last = model.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(channels_last(x), expected, rtol=1e-10, atol=1e-10)


def test_full_madry_network_against_a_functional_one():
    model = build_model("wrn-32-10", 10, image_size=32).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = madry_reference(x, model.state_dict(), num_blocks=5)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_madry_initialisation():
    model = MadryWideResNet(10)
    kernel = model.block3[1].conv1.weight
    assert kernel.std().item() == pytest.approx(math.sqrt(2 / (9 * 640)), rel=0.01)
    bound = math.sqrt(3 / 640)
    assert 0.99 * bound < model.fc.weight.abs().max().item() <= bound
    assert model.fc.bias.abs().max().item() == 0
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-3}


def preactivation_reference(x, state, first_keys, *, raw_shortcut, has_final, last):
    """Pre-activation blocks in order; `first_keys` are those that change width or size."""
    x = F.conv2d(x, state["conv1.weight"], padding=1)
    blocks = dict.fromkeys(key.rsplit(".bn1", 1)[0] for key in state if ".bn1.weight" in key)
    for block in blocks:
        stride = first_keys.get(block, (1, None))[0]
        activated = reference_batch_norm(x, state, f"{block}.bn1", 1e-5).clamp_min(0)
        shortcut = x
        kernel = next(
            (state[k] for k in state if k.startswith(f"{block}.") and "hortcut" in k), None
        )
        if kernel is not None:
            shortcut = F.conv2d(x if raw_shortcut else activated, kernel, stride=stride)
        x = F.conv2d(activated, state[f"{block}.conv1.weight"], stride=stride, padding=1)
        x = reference_batch_norm(x, state, f"{block}.bn2", 1e-5).clamp_min(0)
        x = F.conv2d(x, state[f"{block}.conv2.weight"], padding=1) + shortcut
    if has_final:
        x = reference_batch_norm(x, state, has_final, 1e-5).clamp_min(0)
    return x.mean((2, 3)) @ state[f"{last}.weight"].T + state[f"{last}.bias"]


@pytest.mark.parametrize("variant", ["fast", "gradalign"])
def test_preact_resnet_against_a_functional_one(variant):
    model = PreActResNet18(5, variant=variant).double().eval()
    randomize_batch_norms(model)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = preactivation_reference(
        x,
        model.state_dict(),
        {f"layer{i}.0": (2, None) for i in (2, 3, 4)},
        raw_shortcut=variant == "gradalign",
        has_final="bn" if variant == "fast" else "",
        last="linear",
    )
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def cifar_reference(x, state, strides):
    """pytorch-cifar's ResNets, tensors and a dictionary; `strides` of the blocks that have any."""

    def convolved(x, conv, norm, **options):
        x = F.conv2d(x, state[f"{conv}.weight"], **options)
        return reference_batch_norm(x, state, norm, 1e-5)

    x = convolved(x, "conv1", "bn1", padding=1).clamp_min(0)
    for block in dict.fromkeys(key.rsplit(".conv1", 1)[0] for key in state if ".conv1." in key):
        stride, shortcut = strides.get(block, 1), x
        if f"{block}.shortcut.0.weight" in state:
            names = f"{block}.shortcut.0", f"{block}.shortcut.1"
            shortcut = convolved(x, *names, stride=stride)
        is_deep = f"{block}.conv3.weight" in state
        for number in range(1, 4 if is_deep else 3):
            kernel = state[f"{block}.conv{number}.weight"].shape[-1]
            strided = number == (2 if is_deep else 1)
            options = {"padding": kernel // 2, "stride": stride if strided else 1}
            last = f"{block}.bn{number}"
            x = convolved(x, f"{block}.conv{number}", last, **options)
            if number < (3 if is_deep else 2):
                x = x.clamp_min(0)
        x = (x + shortcut).clamp_min(0)
    return x.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]


@pytest.mark.parametrize("depth", [18, 50])
def test_cifar_resnet_against_a_functional_one(depth):
    model = CifarResNet(5, depth=depth).double().eval()
    randomize_batch_norms(model)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    strides = {f"layer{stage}.0": 2 for stage in (2, 3, 4)}
    expected = cifar_reference(x, model.state_dict(), strides)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_zagoruyko_network_against_a_functional_one():
    model = WideResNet(5, depth=16, widen_factor=2).double().eval()
    randomize_batch_norms(model)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = preactivation_reference(
        x,
        model.state_dict(),
        {f"block{i}.layer.0": (2, None) for i in (2, 3)},
        raw_shortcut=False,
        has_final="bn1",
        last="fc",
    )
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_torchvision_keys_are_plain():
    model = build_model("resnet18", 10, image_size=32, bn_group=2)
    torchvision.models.resnet18(num_classes=10).load_state_dict(model.state_dict())
    standardized = build_model("resnet18", 10, image_size=32, per_image_standardize=True)
    assert isinstance(standardized, StandardizedNetwork)
    assert plain_network(standardized).state_dict().keys() == model.state_dict().keys()
    assert plain_network(model) is model


def test_transformers_are_built_for_their_size():
    assert library_options("vit_b_32", 10, 64) == {"num_classes": 10, "image_size": 64}
    assert library_options("timm/vit_tiny_patch16_224", 10, 64)["img_size"] == 64
    assert library_options("timm/resnet18", 10, 64) == {"num_classes": 10}


def test_building_is_a_function_of_the_seed():
    first, second = (
        (torch.manual_seed(3), build_model("resnet18", 10, image_size=32))[1] for _ in range(2)
    )
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("arch", "image_size", "message"),
    [
        ("resnt50", 32, "--arch resnt50: no such network; did you mean resnet50 or "),
        ("wrn3210", 32, "--arch wrn3210: no such network; did you mean wrn-32-10 or "),
        ("ResNet50", 32, "--arch ResNet50: no such network; did you mean resnet50 or "),
        ("??", 32, "--arch ??: no such network; torchvision's and timm's names are known"),
        ("maskrcnn_resnet50_fpn", 32, "--arch maskrcnn_resnet50_fpn: no such network; "),
        ("alexnet", 32, "--image-size 32: alexnet cannot take it ("),
        ("vit_b_16", 40, "--image-size 40: vit_b_16 cannot take it ("),
    ],
)
def test_errors_are_one_line_and_name_the_flag(arch, image_size, message):
    with pytest.raises(UserError) as caught:
        build_model(arch, 10, image_size=image_size)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_per_image_standardisation_is_tensorflows():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    pixels[1] = 77  # constant: its deviation is below the floor
    pixels[2] = 10
    pixels[2, 0, 0, 0] = 11  # below the floor too, and not zero
    raw = pixels.astype(np.float64)
    deviation = raw.std(axis=(1, 2, 3), keepdims=True)
    adjusted = np.maximum(deviation, 1 / np.sqrt(8 * 8 * 3))
    expected = (raw - raw.mean(axis=(1, 2, 3), keepdims=True)) / adjusted
    images = unit_images(torch.from_numpy(pixels))
    output = PerImageStandardizer()(images).permute(0, 2, 3, 1).double().numpy()
    np.testing.assert_allclose(output, expected, atol=2e-5)


def test_per_image_standardisation_is_differentiated():
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(PerImageStandardizer(), images)
    constant = torch.full((1, 3, 4, 4), 0.3, requires_grad=True)
    (PerImageStandardizer()(constant) * torch.randn(1, 3, 4, 4)).sum().backward()
    assert constant.grad.isfinite().all()


def test_normalizer_matches_torchvision_and_robustbench_keys():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    network = with_normalizer(torch.nn.Conv2d(3, 4, 1), mean, std)
    assert [name for name, _ in network.named_children()] == ["normalize", "model"]
    assert set(network.state_dict()) == {
        "normalize.mean", "normalize.std", "model.weight", "model.bias",
    }  # fmt: skip
    assert network.normalize.mean.shape == (1, 3, 1, 1)
    images = unit_images(torch.randint(0, 256, (2, 5, 5, 3), dtype=torch.uint8))
    assert images.is_contiguous(memory_format=torch.channels_last)
    expected = torchvision.transforms.functional.normalize(images, mean, std)
    torch.testing.assert_close(network.normalize(images), expected)
