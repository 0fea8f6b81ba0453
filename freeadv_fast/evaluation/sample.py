"""A few validation images in memory, for what one process looks at: pictures, audits."""

from __future__ import annotations

import dataclasses
import os

import torch
from torch import Tensor

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.distributed.world import World
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.images import open_val, other_classes
from freeadv_fast.models.normalize import unit_images

# Images that go through a network together without a GPU: more of them gain nothing there.
CPU_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class Sample:
    """Validation images, evenly spaced over their set: always the same ones.

    Attributes:
        images: (n, 3, H, W) float32 pixels in [0, 1] on the evaluation's device.
        labels: (n,) int64, likewise.
        classes: Class names; a label is an index into this list.
        at_once: Images that go through a network together.
    """

    images: Tensor
    labels: Tensor
    classes: list[str]
    at_once: int

    def rows(self, chosen: Tensor) -> Sample:
        """Some of the images.

        Args:
            chosen: (k,) int64, or (n,) bool.
        """
        return dataclasses.replace(self, images=self.images[chosen], labels=self.labels[chosen])


def lone_world() -> World:
    """This process by itself, whichever rank it is: no group is joined, nobody is waited for."""
    if not torch.cuda.is_available():
        return World(0, 1, torch.device("cpu"))
    return World(0, 1, torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))


def load_sample(config: TrainConfig, world: World, num_images: int, classes: list[str]) -> Sample:
    """Reads validation images of `config`.

    A minibatch of training fits into a GPU's memory, and so does one of an attack.

    Args:
        config: Says which data, and how large an image is.
        world: This process alone.
        num_images: How many; all where there are fewer.
        classes: Those of the network.

    Raises:
        UserError: anything wrong with the data, or data of other classes.
    """
    loader = open_val(config, world, num_images)
    if loader.classes != classes:
        raise UserError(other_classes(config.data, loader, len(classes)))
    batches = list(loader.epoch(0))
    on_gpu = world.device.type == "cuda"
    return Sample(
        unit_images(torch.cat([batch.images for batch in batches])),
        torch.cat([batch.labels for batch in batches]),
        loader.classes,
        config.batch_size if on_gpu else min(config.batch_size, CPU_AT_ONCE),
    )
