"""What fusing must leave as it is: other people's layers, blocks, hooks and forwards."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from freeadv_fast.models.batch_norm import add_auxiliary_bn
from freeadv_fast.models.fused.fuse import fuse_batch_norms
from fused_networks import BLOCK, batch_norms, build, timm_resnet, with_own_block


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


def test_a_shortcut_of_no_layers_is_a_shortcut():
    block = BasicBlock(8, 8, downsample=nn.Sequential()).eval()
    x = torch.randn(2, 8, 5, 5)
    expected = block(x)
    fused, left = fuse_batch_norms(block)
    assert not left
    torch.testing.assert_close(fused(x), expected)
