"""What bench_step times of detectors: random images with boxes, and torchvision's own step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection.retinanet import RetinaNet

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.coco.canvas import build_canvases, smallest_canvases
from freeadv_fast.models.retinanet import build_detector
from freeadv_fast.session.network import PRECISIONS, resolve_precision
from freeadv_fast.step.objects import NO_OBJECT, Objects

# COCO's classes; its images have 7.3 objects on average, and room is kept for the fullest one.
NUM_CLASSES, NUM_OBJECTS, CAPACITY = 80, 7, 100
# What a config needs to say of a detector.
FIELDS = {"data": "shapes", "augment": "flip"}


def random_minibatch(config: TrainConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images of four by three on their canvas, (n, H, W, 3) uint8, and packed `step.objects`."""
    num, short = config.batch_size, config.image_size
    height, width = short, short * 4 // 3
    canvases = build_canvases(short, config.longest_side)
    (place,) = smallest_canvases(np.array([[height, width]]), canvases)
    images = torch.zeros(num, *canvases[place].tolist(), 3, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    shape = (num, height, width, 3)
    images[:, :height, :width] = torch.randint(0, 256, shape, generator=generator)
    sides = short * (0.05 + 0.45 * torch.rand(num, NUM_OBJECTS, 2, generator=generator))
    room = torch.tensor([width, height]) - sides
    corners = room * torch.rand(num, NUM_OBJECTS, 2, generator=generator)
    boxes = torch.zeros(num, CAPACITY, 4)
    boxes[:, :NUM_OBJECTS] = torch.cat([corners, corners + sides], dim=2)
    classes = torch.full((num, CAPACITY), NO_OBJECT)
    classes[:, :NUM_OBJECTS] = torch.randint(
        0, NUM_CLASSES, (num, NUM_OBJECTS), generator=generator
    )
    sizes = torch.tensor([[height, width]]).expand(num, 2)
    return images.to(device), Objects(sizes, boxes, classes).packed().to(device)


class EagerDetector:
    """Natural training as torchvision's references do it: its forward pass, its losses, its SGD.

    The network is the trainer's, batch norms in training mode. Images are floats on the device
    already; the network normalises, resizes by 1 and pads them itself.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        """Builds the network with the config's seed."""
        torch.manual_seed(config.seed)
        net = build_detector(config.arch, NUM_CLASSES)
        net.transform.min_size, net.transform.max_size = (config.image_size,), config.longest_side
        self.net = net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(
            net.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.dtype = PRECISIONS[resolve_precision(config.precision, device)]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)

    def train_minibatch(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> None:
        """One update on (3, h, w) float32 images in [0, 1] and their ``boxes`` and ``labels``."""
        self.optimizer.zero_grad()
        is_half = self.dtype is not torch.float32
        with torch.autocast(images[0].device.type, self.dtype, enabled=is_half):
            losses = RetinaNet.forward(self.net, images, targets)
            loss = losses["classification"] + losses["bbox_regression"]
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


def as_torchvision(images: Tensor, targets: Tensor) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """A minibatch as torchvision's detectors take it.

    Args:
        images: (n, H, W, 3) uint8 with padding. targets: (n, 1 + K, 5), packed `step.objects`.
    """
    objects = Objects.of(targets)
    pixels = images.permute(0, 3, 1, 2).float().div(255)
    cut = [
        image[:, :height, :width].contiguous()
        for image, (height, width) in zip(pixels, objects.sizes.tolist(), strict=True)
    ]
    own = [
        {"boxes": boxes[is_object], "labels": classes[is_object]}
        for boxes, classes, is_object in zip(
            objects.boxes, objects.classes, objects.is_object, strict=True
        )
    ]
    return cut, own
