"""The networks that are fused in tests, and what it means that fusing changes nothing."""

from __future__ import annotations

import timm
import torch
from torch import nn

from freeadv_fast.models.cifar_resnet import CifarBlock, CifarBottleneck, CifarResNet
from freeadv_fast.models.wide_resnet import MadryWideResNet, WideResNet
from freeadv_fast.models.zoo import build_model


def randomize(model):
    """Affines and statistics that show a missing layer, a missing ReLU or a wrong order."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    return model


def build(arch, **options):
    return randomize(build_model(arch, 10, image_size=32, **options))


def small_cifar():
    """Both kinds of block, with a convolved shortcut and without."""
    model = CifarResNet(10)
    model.layer1 = nn.Sequential(CifarBlock(64, 8, 1), CifarBlock(8, 8, 1))
    model.layer2 = nn.Sequential(CifarBottleneck(8, 4, 2), CifarBottleneck(16, 4, 1))
    model.layer3, model.layer4, model.linear = nn.Identity(), nn.Identity(), nn.Linear(16, 10)
    return randomize(model)


def small_wide():
    return randomize(WideResNet(10, depth=10, widen_factor=1))


def small_madry():
    return randomize(MadryWideResNet(10, num_blocks=2, widen_factor=2))


def timm_resnet(**options):
    """Four narrow stages of one block each."""
    options |= {"layers": (1, 1, 1, 1), "channels": (4, 4, 4, 4), "num_classes": 10}
    return randomize(timm.models.resnet.ResNet(timm.models.resnet.Bottleneck, **options))


def batch_norms(model):
    layers = (nn.BatchNorm2d, nn.SyncBatchNorm)
    return [name for name, layer in model.named_modules() if isinstance(layer, layers)]


def assert_equal_training(model, plain, x, *branch):
    """One training and one evaluating pass: outputs, all gradients, all buffers, bit for bit."""
    results = []
    for network in (model, plain):
        rows = x.clone().requires_grad_()
        output = network.train()(rows, *branch)
        network.zero_grad()
        (output * torch.arange(output.numel()).view_as(output)).sum().backward()
        with torch.no_grad():
            evaluated = network.eval()(x, *branch)
        results.append({"output": output, "x": rows.grad, "eval": evaluated})
        results[-1] |= network.state_dict()
        # A branch leaves the other's affines without a gradient.
        results[-1] |= {f"{name}.grad": p.grad for name, p in network.named_parameters()}
    got, wanted = ({k: v for k, v in result.items() if v is not None} for result in results)
    assert list(got) == list(wanted)
    for name in wanted:
        assert torch.equal(got[name], wanted[name]), name


FULLY_FUSED = {
    "resnet18": lambda: build("resnet18"),
    "resnet50": lambda: build("resnet50"),
    "timm/resnet18": lambda: build("timm/resnet18"),
    "timm-deep-stem": lambda: timm_resnet(stem_type="deep", avg_down=True, replace_stem_pool=True),
    "timm-blur": lambda: timm_resnet(aa_layer=timm.layers.BlurPool2d),
    "cifar": small_cifar,
    "preact-resnet18": lambda: build("preact-resnet18"),
    "preact-resnet18-gradalign": lambda: build("preact-resnet18-gradalign"),
    "wide": small_wide,
    "madry": small_madry,
    "standardized": lambda: build("resnet18", per_image_standardize=True),
}


class OwnBlock(type(build_model("resnet18", 2, image_size=32).layer1[0])):
    """Somebody's block: the same children, another computation."""

    def forward(self, x):
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x


def with_own_block():
    model = build("resnet18")
    own = OwnBlock(64, 64)
    own.load_state_dict(model.layer1[0].state_dict())
    model.layer1[0] = own
    return model


BLOCK = ["layer1.0.bn1", "layer1.0.bn2"]
