"""YOPO against a slow loop written from the paper's formula."""

import pytest
import timm
import torch
import torchvision
from torch import nn

import slow_steps as slow
from freeadv_fast.errors import UserError
from freeadv_fast.methods.yopo import Yopo, first_layer
from freeadv_fast.models.normalize import StandardizedNetwork
from freeadv_fast.models.preact_resnet import PreActResNet18
from freeadv_fast.models.wide_resnet import MadryWideResNet, WideResNet

EPS, STEP = 8, 2


def build(network, dtype=torch.float64, *, K=3, n=3):
    return Yopo(
        slow.build_learner(network, dtype), slow.threat(EPS, STEP), outer_steps=K, inner_steps=n
    )


def plain(small_network):
    return small_network(torch.float64)


def standardized(small_network):
    return StandardizedNetwork(small_network(torch.float64))


def vgg_like(small_network):
    """The activation overwrites the first layer's output."""
    torch.manual_seed(3)
    first = nn.Conv2d(3, 6, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(384, 5)).double()


def split(network):
    """f_0 and the rest, as two functions."""
    if isinstance(network, StandardizedNetwork):
        standardize, model = network
        return (lambda x: model[0](standardize(x))), model[1:]
    return network[0], network[1:]


def slow_yopo(network, *, K, n):
    """Every inner step with its own gradient of <p, f_0>, whether f_0 is linear or not."""
    trainer = slow.SlowTrainer(network)
    f_0, rest = split(network)
    for images, labels in slow.minibatches():
        delta, losses = slow.uniform(images, EPS), []
        for j in range(K):
            z = f_0(trainer.x(images, delta))
            loss = nn.functional.cross_entropy(rest(z.clone()), labels)
            (p,) = torch.autograd.grad(loss, z, retain_graph=True)
            losses.append(loss)
            for _ in range(n if j < K - 1 else 0):
                d = delta.clone().requires_grad_()
                (gradient,) = torch.autograd.grad((p * f_0(trainer.x(images, d))).sum(), d)
                delta = (delta + STEP * gradient.sign()).clamp(-EPS, EPS)
                delta = slow.in_pixel_range(delta, images)
        trainer.step(*losses)


@pytest.mark.parametrize(("K", "n"), [(2, 1), (3, 3)])
@pytest.mark.parametrize("kind", [plain, standardized, vgg_like])
def test_equals_the_slow_loop(small_network, kind, K, n):
    """Weights and running statistics over two epochs with a smaller last minibatch."""
    ours, theirs = kind(small_network), kind(small_network)
    method = build(ours, K=K, n=n)
    torch.manual_seed(7)
    for images, labels in slow.minibatches():
        assert method.train_minibatch(images, labels, len(images)) == (K * len(images), 0)
    torch.manual_seed(7)
    slow_yopo(theirs, K=K, n=n)
    slow.assert_equal_networks(ours, theirs)
    assert slow.total_passes(method) == K * sum(slow.SIZES)


def test_the_inner_gradient_is_that_of_the_whole_loss_where_p_was_taken(small_network):
    """The chain rule: one inner step from there is one step of PGD."""
    network = small_network(torch.float64)
    method = build(network)
    ((images, labels),) = slow.minibatches([6])
    delta = method.threat.uniform_delta(images)
    p = method.full_pass(images, delta, labels, 6, "noise")
    x = method.learner.network_input(images, delta)
    expected = method.learner.input_gradient(x, labels)
    torch.testing.assert_close(method.pull_back(p, images, delta), expected)


def test_inner_steps_compute_no_weight_gradient(small_network):
    network = small_network(torch.float64)
    method = build(network)
    ((images, labels),) = slow.minibatches([6])
    delta = method.threat.uniform_delta(images)
    p = method.full_pass(images, delta, labels, 6, "noise")
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    seen = slow.watch_weight_gradients(network)
    method.pull_back(p, images, delta)
    assert not seen
    assert all(torch.equal(b, before[name]) for name, b in network.named_buffers())
    assert not network[0]._forward_hooks


@pytest.mark.parametrize(
    ("network", "name"),
    [
        (lambda: torchvision.models.resnet18(), "conv1"),
        (lambda: torchvision.models.vgg11(), "features.0"),
        (lambda: timm.create_model("resnet18d"), "conv1.0"),
        (lambda: timm.create_model("vit_tiny_patch16_224"), "patch_embed.proj"),
        (lambda: PreActResNet18(10), "conv1"),
        (lambda: WideResNet(10, depth=10, widen_factor=1), "conv1"),
        (lambda: MadryWideResNet(10, num_blocks=1, widen_factor=1), "conv1"),
    ],
)
def test_the_first_layer_is_found(network, name):
    with torch.device("meta"):
        network = network()
    (convolution,) = first_layer(network)
    assert convolution is network.get_submodule(name)
    standardized = StandardizedNetwork(network)
    assert list(first_layer(standardized)) == [standardized.standardize, convolution]


def test_a_network_without_a_first_convolution_is_refused():
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    with pytest.raises(UserError, match="--method yopo: Sequential .* use --method pgd"):
        first_layer(network)
    with pytest.raises(UserError, match="Sequential"):
        first_layer(nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 1)))


def test_never_waits_for_the_device(small_network):
    slow.assert_never_reads(build(small_network(), torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns(small_network, dtype):
    slow.assert_learns(build(small_network(), dtype))


def test_fp16_overflow_moves_no_weight(small_network):
    slow.assert_overflow_moves_no_weight(build(small_network(), torch.float16))
