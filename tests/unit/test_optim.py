"""Which parameters are under weight decay."""

import pytest
from torch import nn

from freeadv_fast.optim import parameter_groups


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
