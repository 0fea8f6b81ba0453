"""Every method with fused batch norm and the space-to-depth stem trains as without them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from freeadv_fast.config.budget import Budget
from freeadv_fast.config.method_names import DUAL, METHODS, SECOND_ORDER
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.errors import UserError
from freeadv_fast.methods.build import build_method
from freeadv_fast.models.fused.norm import FusedBatchNorm2d
from freeadv_fast.models.stem import SpaceToDepthConv2d
from freeadv_fast.models.zoo import build_model
from freeadv_fast.session.network import build_learner

FIRST_ORDER = [method for method in METHODS if method not in SECOND_ORDER]


def config_of(method, **changes):
    num_replays = 2 if method in ("free", "free-trades") else 1
    return TrainConfig(
        method=method, m=num_replays, arch="test_resnet", image_size=24, batch_size=8, bn_group=4,
        p_adv=0.5, aux_bn_group=4, attack_steps=2 if method in ("pgd", "trades", "yopo") else 1,
        eps=Perturbation.parse("8/255"), lr=0.02, epochs=10, **changes,
    )  # fmt: skip


def train(config, world, network, dtype=torch.float64):
    """Two minibatches; float64, so that no sign of a gradient hangs on the last bit."""
    torch.manual_seed(0)
    learner = build_learner(network.to(dtype), config, world, Budget.of(config, [10]))
    learner.pixels = dataclasses.replace(learner.pixels, dtype=dtype)

    def shuffle(images, labels, step):
        return world.shuffle(images, labels, seed=0, step=step)

    method = build_method(config, learner, world.device, 4, shuffle)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        images = torch.randint(0, 256, (8, 24, 24, 3), generator=generator).to(torch.uint8)
        labels = torch.randint(0, 4, (8,), generator=generator)
        method.train_minibatch(images.to(world.device), labels.to(world.device), 8)
    return learner


def network_of(method):
    """torchvision's ResNet-18, whose stem is 7x7, with few channels."""
    torch.manual_seed(5)
    from torchvision.models.resnet import BasicBlock, ResNet

    from freeadv_fast.models.batch_norm import apply_bn_groups

    return apply_bn_groups(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4), 4)


@pytest.mark.parametrize("method", FIRST_ORDER)
def test_fused_training_is_the_same_training(method, world):
    plain = train(config_of(method, fuse="off"), world, network_of(method))
    fused = train(config_of(method, fuse="on"), world, network_of(method))
    layers = list(fused.network.modules())
    assert sum(isinstance(layer, FusedBatchNorm2d) for layer in layers) == 12 * (
        2 if method in DUAL else 1
    )
    is_packed = isinstance(fused.network.conv1, SpaceToDepthConv2d)
    assert is_packed == fused.pixels.space_to_depth == (method != "yopo")
    assert fused.updates == plain.updates > 1
    for (name, a), b in zip(
        fused.network.state_dict().items(), plain.network.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("method", SECOND_ORDER)
def test_second_order_methods_stay_unfused(method, world):
    with pytest.raises(UserError, match="--fuse on: GradAlign differentiates twice"):
        config_of(method, fuse="on")
    with pytest.raises(UserError, match="--fuse on"):
        config_of("free", fuse="on", on_collapse="gradalign")


@pytest.mark.parametrize(
    "changes",
    [{"normalization": "per-image"}, {"method": "natural", "mix": "cutmix"}, {"norm": "l2"}],
    ids=str,
)
def test_what_reads_the_input_as_an_image_gets_one(changes, world):
    """The stem stays as it is, batch norm is fused all the same."""
    config = config_of(changes.pop("method", "pgd"), fuse="on", **changes)
    network = build_model("resnet18", 4, image_size=32, per_image_standardize=False)
    learner = build_learner(network, config, world, Budget.of(config, [10]))
    assert not learner.pixels.space_to_depth
    assert isinstance(learner.network.bn1, FusedBatchNorm2d)


@pytest.mark.parametrize(
    ("changes", "is_packed"),
    [
        ({"method": "free"}, True),
        ({"method": "free", "on_collapse": "gradalign"}, False),
        ({"method": "free", "normalization": "per-image"}, False),
        ({"method": "natural"}, False),
        ({"method": "pgd"}, False),
    ],
    ids=str,
)
def test_a_cpu_packs_the_input_of_free_training_only(changes, is_packed, world):
    """There the stem's input gradient is in every pass; batch norm stays torch's own."""
    config = config_of(**changes)
    learner = build_learner(network_of(config.method), config, world, Budget.of(config, [10]))
    assert learner.pixels.space_to_depth is is_packed
    assert isinstance(learner.network.conv1, SpaceToDepthConv2d) is is_packed
    assert not any(isinstance(layer, FusedBatchNorm2d) for layer in learner.network.modules())


def test_graphs_need_a_gpu_and_updates_that_can_be_recorded(world):
    config = config_of("free", graphs="on")
    network = build_model("resnet18", 4, image_size=32)
    with pytest.raises(UserError, match="--graphs on: there is no GPU; use --graphs auto"):
        build_learner(network, config, world, Budget.of(config, [10]))
    with pytest.raises(UserError, match="--graphs on: --mix cannot be recorded"):
        config_of("natural", graphs="on", mix="mixup")
