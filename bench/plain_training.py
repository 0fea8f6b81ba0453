"""FGSM-RS and free training on CIFAR-10 in plain PyTorch: the yardstick of `reproduce.py`.

It shares no code with the package, so that a mistake there is not repeated here: own network, own
data, own augmentation, one eager operation after the other.

Sources: Wong et al. 2020, algorithm 3 (FGSM with a random start, step 1.25 eps); Shafahi et al.
2019, algorithm 1; He et al. 2016 for the network, in the two forms of the papers' codes.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PADDING = 4


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a run does, in the words of the papers.

    Attributes:
        method: ``fgsm-rs`` or ``free``.
        epochs: Passes over the data, replays counted.
        replays: m of free training.
        lr: Peak of the learning rate, which rises linearly from 0 and falls back to it.
        peak: Share of the updates at which it stands there.
        is_gradalign: The network of GradAlign's code instead of "Fast is better than free".
        eps: Radius in pixels of [0, 1].
    """

    method: str
    epochs: float
    replays: int
    lr: float
    peak: float
    is_gradalign: bool
    eps: float = 8 / 255
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4


class Block(nn.Module):
    """Batch norm and ReLU before each of two 3x3 convolutions."""

    def __init__(self, before: int, width: int, stride: int, is_gradalign: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        is_same = before == width and stride == 1
        self.project = None if is_same else nn.Conv2d(before, width, 1, stride, bias=False)
        self.projects_raw = is_gradalign

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        shortcut = x
        if self.project is not None:
            shortcut = self.project(x if self.projects_raw else active)
        return shortcut + self.conv2(F.relu(self.norm2(self.conv1(active))))


class Network(nn.Module):
    """PreActResNet-18 of (n, 3, 32, 32) pixels in [0, 1]."""

    def __init__(self, is_gradalign: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        blocks, before = [], 64
        for stage, width in enumerate((64, 128, 256, 512)):
            for first in (True, False):
                stride = 2 if first and stage else 1
                blocks.append(Block(before, width, stride, is_gradalign))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Identity() if is_gradalign else nn.BatchNorm2d(before)
        self.linear = nn.Linear(before, 10)
        self.is_gradalign = is_gradalign
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))
        if is_gradalign:
            for layer in self.modules():
                if isinstance(layer, nn.Conv2d):
                    fan_out = layer.kernel_size[0] ** 2 * layer.out_channels
                    nn.init.normal_(layer.weight, 0, math.sqrt(2 / fan_out))
            nn.init.normal_(self.linear.weight, 0, math.sqrt(2 / before))
            nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_gradalign:
            x = (x - self.mean) / self.std
        x = self.norm(self.blocks(self.conv(x.contiguous(memory_format=torch.channels_last))))
        if not self.is_gradalign:
            x = F.relu(x)
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def read_cifar10(folder: Path, files: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """(n, 3, 32, 32) uint8 images and their labels, from CIFAR-10's python files."""
    parts = [pickle.loads((folder / name).read_bytes(), encoding="bytes") for name in files]
    images = torch.cat([torch.from_numpy(part[b"data"]) for part in parts])
    labels = torch.tensor([label for part in parts for label in part[b"labels"]])
    return images.view(-1, 3, 32, 32).to(device), labels.to(device)


def cropped_and_flipped(images: Tensor) -> Tensor:
    """Each image from a random place of its padded self, every second one mirrored."""
    padded, n, device = F.pad(images, (PADDING,) * 4), len(images), images.device
    places = torch.arange(32, device=device)
    rows, columns = (
        places + torch.randint(2 * PADDING + 1, (n, 1), device=device) for _ in range(2)
    )
    columns = torch.where(torch.rand(n, 1, device=device) < 0.5, columns, columns.flip(1))
    crops = padded[
        torch.arange(n, device=device).view(n, 1, 1), :, rows[:, :, None], columns[:, None]
    ]
    return crops.permute(0, 3, 1, 2)


def train(recipe: Recipe, images: Tensor, labels: Tensor, seed: int, dtype: torch.dtype) -> Network:
    """Trains a network on uint8 images; prints a line an epoch.

    Args:
        recipe: What to do.
        images: (n, 3, 32, 32) uint8. labels: (n,) int64.
        seed: Of everything that is drawn.
        dtype: bfloat16 trains under autocast, float32 without.
    """
    torch.manual_seed(seed)
    device, eps, size = images.device, recipe.eps, recipe.batch_size
    net = Network(recipe.is_gradalign).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        net.parameters(), 0.0, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    num_epochs = math.ceil(recipe.epochs / recipe.replays)
    num_updates = num_epochs * math.ceil(len(images) / size) * recipe.replays
    delta = torch.zeros(size, 3, 32, 32, device=device)
    update = 0

    def loss_at(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = net(x)
        return F.cross_entropy(logits.float(), y)

    for epoch in range(num_epochs):
        began, total = time.monotonic(), torch.zeros((), device=device)
        for rows in torch.randperm(len(images), device=device).split(size):
            x, y = cropped_and_flipped(images[rows]).float() / 255, labels[rows]
            for _ in range(recipe.replays):
                share = update / num_updates
                factor = min(share / recipe.peak, (1 - share) / (1 - recipe.peak))
                for group in optimizer.param_groups:
                    group["lr"] = recipe.lr * factor
                update += 1
                if recipe.method == "free":
                    noise = delta[: len(x)].clone().requires_grad_()
                else:
                    start = torch.empty_like(x).uniform_(-eps, eps)
                    noise = ((x + start).clamp(0, 1) - x).requires_grad_()
                    (gradient,) = torch.autograd.grad(loss_at(x + noise, y), noise)
                    noise = (noise.detach() + 1.25 * eps * gradient.sign()).clamp(-eps, eps)
                loss = loss_at((x + noise).clamp(0, 1), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach()
                if recipe.method == "free":
                    assert noise.grad is not None
                    moved = delta[: len(x)] + eps * noise.grad.sign()
                    delta[: len(x)] = moved.clamp(-eps, eps)
        mean = total.item() / (num_updates / num_epochs)
        print(f"epoch {epoch}: loss {mean:.3f}, {time.monotonic() - began:.1f} s", flush=True)
    return net


def accuracies(
    net: nn.Module, images: Tensor, labels: Tensor, steps: int, eps: float = 8 / 255
) -> tuple[float, float]:
    """Clean accuracy and accuracy under PGD with a random start and steps of 2/255, in fp32.

    Args:
        net: Of pixels in [0, 1]; left in eval mode.
        images: (n, 3, 32, 32) uint8. labels: (n,) int64.
        steps: Of the attack. eps: Its radius.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    net.eval().requires_grad_(False)
    clean = robust = 0
    for some, y in zip(images.split(1000), labels.split(1000), strict=True):
        x = some.float() / 255
        noise = torch.empty_like(x).uniform_(-eps, eps)
        for _ in range(steps):
            noise = ((x + noise).clamp(0, 1) - x).requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(net(x + noise), y), noise)
            noise = (noise.detach() + 2 / 255 * gradient.sign()).clamp(-eps, eps)
        with torch.no_grad():
            is_right = net(x).argmax(1) == y
            stays_right = net((x + noise).clamp(0, 1)).argmax(1) == y
        clean += int(is_right.sum())
        robust += int((is_right & stays_right).sum())
    return clean / len(images), robust / len(images)
