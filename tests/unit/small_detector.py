"""A narrow detector of 64-pixel images, and minibatches of padded images with objects."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from freeadv_fast.models.retinanet import Detector, anchor_generator, feature_pyramid
from freeadv_fast.step.objects import NO_OBJECT, Objects

SIDE, NUM_CLASSES, CAPACITY = 64, 3, 4
SIZES = [(64, 40), (33, 64), (64, 64), (50, 51), (48, 64), (64, 20)]


class NarrowResNet(ResNet):
    """A stem of 8 channels and four stages of one block, 8 to 64 channels wide."""

    def __init__(self):
        super().__init__(BasicBlock, [1, 1, 1, 1])
        self.conv1 = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        self.inplanes = min(self.inplanes, planes // 8)
        return super()._make_layer(block, planes // 8, blocks, stride, dilate)


def small_detector(dtype=torch.float32, box_loss="l1"):
    """A seeded detector whose outputs differ between anchors, with anchors of 8 pixels and more."""
    torch.manual_seed(3)
    backbone = feature_pyramid(NarrowResNet(), 8)
    detector = Detector(backbone, NUM_CLASSES, anchor_generator=anchor_generator(8))
    detector.head.regression_head._loss_type = box_loss
    for layer in detector.head.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.1)
    return detector.to(dtype)


def objects_of(sizes, generator):
    """Objects of images of these (height, width): none in the second, as many as fit in others."""
    n = len(sizes)
    boxes = torch.zeros(n, CAPACITY, 4)
    classes = torch.full((n, CAPACITY), NO_OBJECT)
    for image, (height, width) in enumerate(sizes):
        for place in range(0 if image == 1 else 1 + image % CAPACITY):
            corner = torch.rand(2, generator=generator) * torch.tensor([width, height]) * 0.6
            room = torch.tensor([width, height]) - corner
            end = corner + room * (0.3 + 0.7 * torch.rand(2, generator=generator))
            boxes[image, place] = torch.cat([corner, end])
            classes[image, place] = torch.randint(NUM_CLASSES, (), generator=generator)
    return Objects(torch.tensor(sizes), boxes, classes)


def minibatches(number, size=6, seed=0):
    """Padded (size, 64, 64, 3) uint8 images, 0 and 255 common in them, and their targets."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        objects = objects_of((SIZES * 4)[:size], generator)
        images = torch.randint(-60, 316, (size, SIDE, SIDE, 3), generator=generator).clamp(0, 255)
        images *= objects.is_image(SIDE, SIDE).permute(0, 2, 3, 1)
        yield images.to(torch.uint8), objects.packed()


def as_torchvision_has_them(targets):
    """A list of boxes and labels, an image each, without empty places."""
    objects = Objects.of(targets)
    return [
        {"boxes": boxes[there], "labels": classes[there]}
        for boxes, classes, there in zip(*objects[1:], objects.is_object, strict=True)
    ]
