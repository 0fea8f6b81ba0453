"""Free training through the fused batch norm's kernels beside eager training.

Run as compiled_kernels.py is. Interpreted, a tiny ResNet on scikit-learn's 8x8 digits; on a GPU,
ResNet-18 on digits and on CIFAR-10 images at 32 px, with every kernel of the fast step, and
recorded. How runs are compared that no two eager ones agree on: `chaos`.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import os
from pathlib import Path

import chaos
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock, ResNet

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.kernels import batch_norm, block_sum
from freeadv_fast.kernels import batch_norm_statistics as statistics
from freeadv_fast.models.fused.fuse import fuse_batch_norms
from freeadv_fast.models.preact_resnet import PreActBlock
from freeadv_fast.models.wide_resnet import MadryBlock
from freeadv_fast.ops import dispatch
from interpreted import DEVICE, IS_INTERPRETED

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
CIFAR = Path(os.environ.get("FREEADV_TEST_DATA", SHARED)) / "cifar10" / "cifar10_jpeg_train.npz"
if IS_INTERPRETED:  # loads far ahead of the few tiles here are loads of nothing
    statistics.STATISTICS = block_sum.SUM = statistics.STATISTICS._replace(depth=1, turn=1)
    statistics.MERGE_LOADS = 1


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


def minibatches(images, labels, number, size, seed=0):
    """Drawn from the images."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        rows = torch.randint(len(images), (size,), generator=generator)
        yield images[rows], labels[rows]


@pytest.mark.skipif(not IS_INTERPRETED, reason="the GPU's networks are below")
def test_interpreted_kernels_train_as_eager_networks_do(monkeypatch):
    """Basic blocks with and without a downsample branch, two replays."""
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

    torch.manual_seed(0)
    network = ResNet(BasicBlock, [1, 1, 1, 1])
    # A quarter of a ResNet's channels, which the merges' programs are counted by.
    network.conv1 = nn.Conv2d(3, 16, 7, 2, padding=3, bias=False)
    network.bn1 = nn.BatchNorm2d(16)
    downsample = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    network.layer1, network.layer2 = BasicBlock(16, 16), BasicBlock(16, 32, 2, downsample)
    network.layer3, network.layer4 = nn.Identity(), nn.Identity()
    network.fc = nn.Linear(32, 10)
    rows = list(minibatches(images, labels, 4, config.batch_size))
    exact = chaos.train(config, network, rows, is_exact=True)
    eager = [chaos.train(config, chaos.nudged(network, seed), rows) for seed in range(3)]
    monkeypatch.setattr(dispatch, "backend", lambda device: "triton")
    fused = chaos.train(config, network, rows)
    assert calls  # the kernels ran
    assert chaos.excess(fused, eager, exact) < 3


class Additions(TorchDispatchMode):
    """Counts sums of 4-D tensors, as autograd makes where a tensor has two readers."""

    def __init__(self):
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_sum = func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_)
        self.num += is_sum and args[0].dim() == 4
        return func(*args, **(kwargs or {}))


def stem_and_blocks():
    """A stem that pools, identities and a downsample shortcut."""
    downsample = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    stem = nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    return *stem, BasicBlock(8, 8), BasicBlock(8, 8), BasicBlock(8, 16, 2, downsample)


def blocks_that_normalise_first():
    """Shortcuts from the input, from the activation, and from the input through a convolution."""
    projected = PreActBlock(8, 16, 2, raw_shortcut=False)
    return MadryBlock(8, 8, 1), projected, PreActBlock(16, 16, 2, raw_shortcut=True)


@pytest.mark.parametrize("blocks", [stem_and_blocks, blocks_that_normalise_first])
def test_all_that_blocks_sum_is_summed_by_the_kernels(blocks, monkeypatch):
    """Three sums forward, three backward; all values are about as exact as eager ones."""
    monkeypatch.setattr(dispatch, "backend", lambda device: "triton")
    torch.manual_seed(0)
    plain = nn.Sequential(*blocks()).to(DEVICE, memory_format=torch.channels_last)
    x = torch.randn(3, 8, 12, 12, device=DEVICE).to(memory_format=torch.channels_last)
    dy = torch.randn(3, 16, 3, 3, device=DEVICE)
    exact, (fused, _) = copy.deepcopy(plain).double(), fuse_batch_norms(copy.deepcopy(plain))
    results = []
    for network in (exact, plain, fused):
        dtype = next(network.parameters()).dtype
        rows = x.to(dtype, copy=True).requires_grad_()
        with Additions() as additions:
            output = network(rows)
            output.backward(dy.to(dtype))
        found = [output, rows.grad, *(p.grad for p in network.parameters()), *network.buffers()]
        results.append((additions.num, [tensor.detach().double() for tensor in found]))
    (_, exact), (num_eager, theirs), (num_fused, ours) = results
    assert (num_eager, num_fused) == (6, 0)
    for value, their, our in zip(exact, theirs, ours, strict=True):
        error, allowed = ((g - value).abs().max() for g in (our, their))
        assert error <= 4 * allowed + 2**-20 * value.abs().max()


def resnet18(seed):
    """ResNet-18 for ten classes."""
    torch.manual_seed(seed)
    return ResNet(BasicBlock, [2, 2, 2, 2], num_classes=10)


def free_at(precision):
    """Free training at 32 px, with every kernel and recorded; and the same, eager."""
    config = TrainConfig(
        arch="resnet18", m=4, image_size=32, batch_size=64, bn_group=None, lr=0.05, epochs=400,
        eps=Perturbation.parse("8/255"), normalization="cifar10", precision=precision,
    )  # fmt: skip
    return config, dataclasses.replace(config, fuse="off", graphs="off")


@pytest.mark.skipif(IS_INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("data", ["digits", "cifar"])
def test_a_few_updates_end_as_near_the_exact_ones_as_eager_updates_do(data, precision):
    """Three minibatches replayed four times; the last nine updates are recorded."""
    images, labels = digits(32) if data == "digits" else cifar(500)
    rows, network = list(minibatches(images, labels, 3, 64)), resnet18(0)
    config, plain = free_at(precision)
    exact = chaos.train(plain, network, rows, is_exact=True)
    eager = [chaos.train(plain, chaos.nudged(network, seed), rows, DEVICE) for seed in range(3)]
    assert chaos.excess(chaos.train(config, network, rows, DEVICE), eager, exact) < 3


@pytest.mark.skipif(IS_INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_losses_of_short_runs_are_on_no_side_of_eager_ones(precision):
    """Twelve runs of six minibatches, replayed four times."""
    images, labels = digits(32)
    config, plain = free_at(precision)
    fused, eager, nudged = losses = [], [], []
    for seed in range(12):
        rows, network = list(minibatches(images, labels, 6, 64, seed)), resnet18(seed)
        other = chaos.nudged(network, seed, chaos.NUDGES[precision])
        starts = (config, network), (plain, network), (plain, other)
        for kind, start in zip(losses, starts, strict=True):
            kind.append(chaos.train(*start, rows, DEVICE).loss)
    assert chaos.bias(fused, eager, nudged) < 4
