"""FusedBatchNorm2d by itself, against torch's batch norm, addition and ReLU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from freeadv_fast.models.batch_norm import GhostBatchNorm2d
from freeadv_fast.models.fused.norm import FusedBatchNorm2d


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
