"""The objects of a minibatch as one tensor with a row an image: what labels are to a classifier.

Methods cut minibatches into shares and parts by rows and record them as tensors of fixed shapes.
As one tensor, objects go through all of that as labels do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NO_OBJECT = -1
# Of a row: x1, y1, x2, y2 and class; an image's height and width stand in the first one.
NUM_NUMBERS = 5


class Objects(NamedTuple):
    """The objects of a minibatch whose images are padded, right and below, to one shape.

    Attributes:
        sizes: (n, 2) int64, height and width of each image without its padding.
        boxes: (n, K, 4) float32, x1, y1, x2, y2 in pixels of the padded image.
        classes: (n, K) int64; `NO_OBJECT` where an image has fewer than K.
    """

    sizes: Tensor
    boxes: Tensor
    classes: Tensor

    @classmethod
    def of(cls, targets: Tensor) -> Objects:
        """From the tensor that `packed` made, on its device."""
        return cls(targets[:, 0, :2].long(), targets[:, 1:, :4], targets[:, 1:, 4].long())

    def packed(self) -> Tensor:
        """(n, 1 + K, 5) float32: exact for sizes and classes, which are below 2^24."""
        n, k = self.classes.shape
        targets = self.boxes.new_zeros((n, 1 + k, NUM_NUMBERS), dtype=torch.float32)
        targets[:, 0, :2] = self.sizes
        targets[:, 1:, :4] = self.boxes
        targets[:, 1:, 4] = self.classes
        return targets

    @property
    def is_object(self) -> Tensor:
        """(n, K) bool, whether there is an object."""
        return self.classes != NO_OBJECT

    def is_image(self, height: int, width: int) -> Tensor:
        """(n, 1, height, width) bool, whether a pixel of the padded images is one of the image."""
        device = self.sizes.device
        rows = torch.arange(height, device=device) < self.sizes[:, :1]
        columns = torch.arange(width, device=device) < self.sizes[:, 1:]
        return (rows[:, :, None] & columns[:, None, :])[:, None]
