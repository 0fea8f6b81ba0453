"""The fast second derivatives against PyTorch's own, and against numerical derivatives."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from freeadv_fast.models.batch_norm import apply_bn_groups
from freeadv_fast.models.double_backward import FastDoubleBackward, batch_norm, conv2d, relu
from freeadv_fast.models.preact_resnet import PreActBlock

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def input_gradient_of(layer):
    """As a function of the input, the output's gradient and the weights: what is differentiated."""

    def gradient(x, g, *weights):
        return torch.autograd.grad(layer(x, *weights), x, g, create_graph=True)[0]

    return gradient


def leaves(*shapes, dtype=torch.float64):
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"stride": (1, 2), "padding": (0, 2), "dilation": (2, 1)},
        {"padding": 1, "groups": 2},
    ],
)
def test_convolution_has_both_derivatives(options):
    inputs, channels = 4, 4 // options.get("groups", 1)
    x, weight, bias = leaves((2, inputs, 5, 6), (6, channels, 3, 3), (6,))

    def layer(x, weight, bias):
        return conv2d(x, weight, bias, **options)

    torch.testing.assert_close(layer(x, weight, bias), F.conv2d(x, weight, bias, **options))
    assert torch.autograd.gradcheck(layer, (x, weight, bias))
    (g,) = leaves(layer(x, weight, bias).shape)
    assert torch.autograd.gradcheck(input_gradient_of(layer), (x, g, weight, bias))


@pytest.mark.parametrize("is_affine", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_norm_has_both_derivatives(is_affine, layout):
    x, g, weight, bias = leaves((3, 2, 3, 2), (3, 2, 3, 2), (2,), (2,))
    weights = (weight, bias) if is_affine else ()

    def layer(x, *weights):
        return batch_norm(
            x.contiguous(memory_format=layout), None, None, *weights, training=True, eps=1e-3
        )

    assert torch.autograd.gradcheck(layer, (x, *weights))
    assert torch.autograd.gradcheck(input_gradient_of(layer), (x, g, *weights))


def test_batch_norm_with_a_weight_of_zero():
    x, g, bias = leaves((4, 2, 3, 3), (4, 2, 3, 3), (2,))
    weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def layer(x, weight, bias):
        return batch_norm(x, None, None, weight, bias, training=True)

    assert torch.autograd.gradcheck(input_gradient_of(layer), (x, g, weight, bias))


def test_relu_has_both_derivatives_away_from_its_kink():
    x, g = leaves((4, 6), (4, 6))
    assert x.abs().min() > 1e-2
    assert torch.autograd.gradcheck(relu, x)
    assert torch.autograd.gradcheck(input_gradient_of(relu), (x, g))


def test_relu_in_place_gives_its_input_away():
    (leaf,) = leaves((5, 7))
    x = leaf * 2
    y = relu(x, inplace=True)
    assert y.data_ptr() == x.data_ptr()
    y.square().sum().backward()
    torch.testing.assert_close(leaf.grad, 8 * leaf.detach().clamp(min=0))


@pytest.mark.parametrize("bad", [conv2d, batch_norm])
def test_weights_have_no_gradient_in_the_first_pass(bad):
    x, weight = leaves((2, 3, 4, 4), (3, 3, 1, 1) if bad is conv2d else (3,))
    if bad is conv2d:
        y = conv2d(x, weight)
    else:
        y = batch_norm(x, None, None, weight, torch.zeros_like(weight), training=True)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(y.sum(), weight, create_graph=True)


def small_network():
    """Strided, raw and plain shortcuts, an average pool and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        PreActBlock(8, 8, 1, raw_shortcut=False),
        PreActBlock(8, 16, 2, raw_shortcut=True),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 12, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


def second_derivative(net, x, labels, context):
    """The input's gradient, and of its dot product with a fixed tensor those of the weights."""
    net, x = copy.deepcopy(net), x.clone().requires_grad_()
    with context:
        loss = F.cross_entropy(net(x), labels)
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    generator = torch.Generator().manual_seed(1)
    (torch.randn(g.shape, generator=generator).to(g) * g).sum().backward()
    gradients = [None if p.grad is None else p.grad.flatten() for p in net.parameters()]
    return g.detach(), gradients, list(net.buffers())


def flat(gradients):
    return torch.cat([gradient for gradient in gradients if gradient is not None]).double()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group", [None, 3])
@pytest.mark.parametrize("is_training", [True, False])
def test_network_equals_eager(layout, group, is_training):
    net = small_network().to(memory_format=layout)
    if group is not None:
        apply_bn_groups(net, group)
    net.train(is_training)
    x, labels = torch.randn(7, 3, 12, 12).to(memory_format=layout), torch.randint(5, (7,))
    fast = second_derivative(net, x, labels, FastDoubleBackward())
    eager = second_derivative(net, x, labels, contextlib.nullcontext())
    exact = second_derivative(
        copy.deepcopy(net).double(), x.double(), labels, contextlib.nullcontext()
    )
    assert [g is None for g in fast[1]] == [g is None for g in eager[1]]
    scale = flat(exact[1]).norm()
    error, eager_error = ((flat(run[1]) - flat(exact[1])).norm() / scale for run in (fast, eager))
    assert error <= 2 * eager_error + 1e-6
    torch.testing.assert_close(fast[0], eager[0], rtol=1e-5, atol=1e-6)
    for buffer, expected in zip(fast[2], eager[2], strict=True):
        assert torch.equal(buffer, expected)


def test_network_equals_eager_in_float64():
    net, x = small_network().double(), torch.randn(6, 3, 12, 12, dtype=torch.float64)
    labels = torch.randint(5, (6,))
    fast = second_derivative(net, x, labels, FastDoubleBackward())
    eager = second_derivative(net, x, labels, contextlib.nullcontext())
    torch.testing.assert_close(flat(fast[1]), flat(eager[1]), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_order_training_is_the_same(layout):
    net = small_network().to(memory_format=layout)
    x, labels = torch.randn(6, 3, 12, 12), torch.randint(5, (6,))
    gradients = []
    for context in (FastDoubleBackward(), contextlib.nullcontext()):
        twin = copy.deepcopy(net)
        with context:
            loss = F.cross_entropy(twin(x), labels)
        loss.backward()
        gradients.append(flat([p.grad.flatten() for p in twin.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_keys_and_classes_stay():
    net = small_network()
    before = [(name, type(module)) for name, module in net.named_modules()], list(net.state_dict())
    with FastDoubleBackward():
        net(torch.randn(2, 3, 12, 12))
    after = [(name, type(module)) for name, module in net.named_modules()], list(net.state_dict())
    assert before == after


def test_half_precision_stays_near_float32():
    net, labels = small_network(), torch.randint(5, (8,))
    x = torch.randn(8, 3, 12, 12)
    context = contextlib.ExitStack()
    context.enter_context(FastDoubleBackward())
    context.enter_context(torch.autocast("cpu", torch.bfloat16))
    half = flat(second_derivative(net, x, labels, context)[1])
    full = flat(second_derivative(net, x, labels, contextlib.nullcontext())[1])
    assert torch.isfinite(half).all()
    assert F.cosine_similarity(half, full, 0) > 0.9


def test_batch_norm_normalises_half_precision_in_float32():
    x, weight, bias = torch.randn(4, 3, 5, 5, dtype=torch.bfloat16), torch.rand(3), torch.rand(3)
    y = batch_norm(x, None, None, weight, bias, training=True)
    expected = F.batch_norm(x.float(), None, None, weight, bias, training=True)
    assert torch.equal(y, expected.bfloat16())


def test_one_value_a_channel_raises_as_before():
    with FastDoubleBackward(), pytest.raises(ValueError, match="more than 1 value"):
        nn.BatchNorm2d(3)(torch.randn(1, 3, 1, 1))


def test_what_is_not_taken_over_still_runs():
    weight = torch.randn(2, 3, 3, 3)
    with FastDoubleBackward():
        same = F.conv2d(torch.ones(1, 3, 5, 5), weight, padding="same")
        unbatched = F.conv2d(torch.ones(3, 5, 5), weight, padding=1)
    torch.testing.assert_close(same[0], unbatched)
