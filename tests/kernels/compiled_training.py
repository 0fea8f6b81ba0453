"""Free training through the fused batch norm's kernels beside eager training: the curves track.

Run as compiled_kernels.py is. Interpreted, a tiny ResNet on scikit-learn's 8x8 digits; on a GPU,
ResNet-18 on digits and on CIFAR-10 images at 32 px, with every kernel of the fast step, and
recorded.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock, ResNet

from freeadv_fast import ops
from freeadv_fast.config.budget import Budget
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.distributed.world import World
from freeadv_fast.kernels import batch_norm
from freeadv_fast.methods.build import build_method
from freeadv_fast.models.fused import fuse_batch_norms
from freeadv_fast.session.network import build_learner

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
CIFAR = Path(os.environ.get("FREEADV_TEST_DATA", SHARED)) / "cifar10" / "cifar10_jpeg_train.npz"


def digits(side):
    """Real digits: (n, side, side, 3) uint8, and their labels."""
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    found = load_digits()
    grey = torch.from_numpy(found.images * (255 / 16)).float()[:, None]
    grey = F.interpolate(grey, (side, side), mode="bilinear").round().to(torch.uint8)
    images = grey.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()
    return images, torch.from_numpy(found.target).long()


def cifar(count):
    """The first CIFAR-10 training images: (count, 32, 32, 3) uint8, and their labels."""
    if not CIFAR.is_file():
        pytest.skip("real images are not here; set FREEADV_TEST_DATA")
    with np.load(CIFAR) as file:
        header, blob = file["header"].tobytes(), file["blob"].tobytes()
        ends, labels = file["offsets"], file["labels"][:count]
    pictures = [
        np.asarray(Image.open(io.BytesIO(header + blob[a:b])))
        for a, b in zip(ends[:count], ends[1 : count + 1], strict=True)
    ]
    return torch.from_numpy(np.stack(pictures)), torch.from_numpy(labels.astype(np.int64))


def losses(config, network, images, labels, num_minibatches):
    """The mean training loss of each minibatch, over its replays."""
    world = World(0, 1, DEVICE)
    learner = build_learner(network, config, world, Budget.of(config, [num_minibatches]))
    method = build_method(config, learner, DEVICE, 10)
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(num_minibatches):
        rows = torch.randint(len(images), (config.batch_size,), generator=generator)
        minibatch = images[rows].to(DEVICE), labels[rows].to(DEVICE)
        method.train_minibatch(*minibatch, config.batch_size)
        found.append(learner.meters.read(world).loss)
    return torch.tensor(found)


def both_curves(config, make_network, images, labels, num_minibatches):
    """Losses without and with everything fused."""
    curves = []
    for switch in ("off", "auto"):
        torch.manual_seed(0)
        run = dataclasses.replace(config, fuse=switch, graphs=switch)
        curves.append(losses(run, make_network(), images, labels, num_minibatches))
    return curves


@pytest.mark.skipif(not IS_INTERPRETED, reason="the GPU's networks are below")
def test_curves_track_in_the_interpreter(monkeypatch):
    """Basic blocks with and without a downsample branch, ghost groups, four replays."""
    monkeypatch.setattr(ops, "backend", lambda device: "triton")
    calls = []
    launch = batch_norm.batch_norm_act
    monkeypatch.setattr(
        batch_norm, "batch_norm_act", lambda *a, **k: (calls.append(1), launch(*a, **k))[1]
    )
    images, labels = digits(16)
    config = TrainConfig(
        arch="mine", m=2, image_size=16, batch_size=8, bn_group=None, lr=0.05, epochs=100,
        eps=Perturbation.parse("16/255"), normalization="none", precision="fp32",
    )  # fmt: skip

    def make_network():
        """A quarter of a ResNet's channels, which the merges' programs are counted by."""
        network = ResNet(BasicBlock, [1, 1, 1, 1])
        network.conv1 = nn.Conv2d(3, 16, 7, 2, padding=3, bias=False)
        network.bn1 = nn.BatchNorm2d(16)
        downsample = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
        network.layer1, network.layer2 = BasicBlock(16, 16), BasicBlock(16, 32, 2, downsample)
        network.layer3, network.layer4 = nn.Identity(), nn.Identity()
        network.fc = nn.Linear(32, 10)
        return network

    eager, fused = both_curves(config, make_network, images, labels, 4)
    assert calls  # the kernels ran
    torch.testing.assert_close(fused, eager, rtol=2e-3, atol=2e-3)
    assert eager[-1] < eager[0]


class Additions(TorchDispatchMode):
    """Counts sums of 4-D tensors, as autograd makes where a tensor has two readers."""

    def __init__(self):
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_sum = func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_)
        self.num += is_sum and args[0].dim() == 4
        return func(*args, **(kwargs or {}))


def test_gradients_of_blocks_are_summed_by_the_kernels(monkeypatch):
    """An identity and a downsample shortcut; nothing but the first block's input is read twice."""
    monkeypatch.setattr(ops, "backend", lambda device: "triton")
    torch.manual_seed(0)
    downsample = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    blocks = BasicBlock(8, 8), BasicBlock(8, 8), BasicBlock(8, 16, 2, downsample)
    plain = nn.Sequential(*blocks).to(DEVICE, memory_format=torch.channels_last)
    x = torch.randn(3, 8, 6, 6, device=DEVICE).to(memory_format=torch.channels_last)
    dy = torch.randn(3, 16, 3, 3, device=DEVICE)
    exact, (fused, _) = copy.deepcopy(plain).double(), fuse_batch_norms(copy.deepcopy(plain))
    results = []
    for network in (exact, plain, fused):
        dtype = next(network.parameters()).dtype
        rows = x.to(dtype, copy=True).requires_grad_()
        output = network(rows)
        with Additions() as additions:
            output.backward(dy.to(dtype))
        gradients = [rows.grad, *(p.grad for p in network.parameters())]
        results.append((additions.num, [g.double() for g in gradients]))
    (_, exact), (num_eager, theirs), (num_fused, ours) = results
    assert (num_eager, num_fused) == (3, 1)
    for value, their, our in zip(exact, theirs, ours, strict=True):
        error, allowed = ((g - value).abs().max() for g in (our, their))
        assert error <= 4 * allowed + 2**-20 * value.abs().max()


@pytest.mark.skipif(IS_INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("data", ["digits", "cifar"])
def test_curves_track_on_the_device(data, precision):
    """200 minibatches replayed four times; the means of 20 losses may differ by a tenth."""
    images, labels = digits(32) if data == "digits" else cifar(5000)
    config = TrainConfig(
        arch="resnet18", m=4, image_size=32, batch_size=64, bn_group=None, lr=0.05, epochs=400,
        eps=Perturbation.parse("8/255"), normalization="cifar10", precision=precision,
    )  # fmt: skip
    curves = both_curves(
        config, lambda: ResNet(BasicBlock, [2, 2, 2, 2], num_classes=10), images, labels, 200
    )
    eager, fused = (curve.view(10, 20).mean(1) for curve in curves)
    torch.testing.assert_close(fused, eager, rtol=0.1, atol=0.05)
    assert eager[-1] < 0.8 * eager[0]
