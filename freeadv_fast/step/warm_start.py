"""A perturbation that carries over from one minibatch to the next, whatever their shapes."""

from __future__ import annotations

import torch
from torch import Tensor


class WarmStart:
    """Free training's perturbation, which is never reset.

    Minibatches of one shape share one tensor, for ever the same: a recorded update writes to it.
    For a minibatch of another shape the perturbation is resampled to it from the last one's, each
    pixel from the nearest, as the published code of Free AT for detectors does between padded
    images (Li et al. 2023, github.com/thu-ml/oddefense, mmdet/apis/adv_epoch_based_runner.py).
    Nearest keeps every value, so that eps and whole units hold.

    Attributes:
        delta: (N, H, W, 3) of the present shape; row i belongs to batch slot i.
    """

    def __init__(self, delta: Tensor) -> None:
        """Begins with a perturbation."""
        self.delta = delta
        self._of_shape = {delta.shape: delta}

    def carry_to(self, images: Tensor) -> None:
        """Gives `delta` the height and width of (n, H, W, 3) images."""
        n, height, width, channels = self.delta.shape
        shape = torch.Size((n, images.shape[1], images.shape[2], channels))
        if shape == self.delta.shape:
            return
        rows, columns = (
            torch.arange(new, device=self.delta.device) * old // new
            for new, old in zip(images.shape[1:3], (height, width), strict=True)
        )
        self._take(shape).copy_(self.delta[:, rows[:, None], columns])
        self.delta = self._take(shape)

    def load(self, delta: Tensor) -> None:
        """Goes on with a saved perturbation, of whatever shape."""
        own = self._take(delta.shape)
        self.delta = own.copy_(delta)

    def _take(self, shape: torch.Size) -> Tensor:
        """The tensor of a shape."""
        if shape not in self._of_shape:
            self._of_shape[shape] = self.delta.new_empty(shape)
        return self._of_shape[shape]
