"""A split with boxes among the kinds of data that `data.build` opens."""

from __future__ import annotations

import functools
import os
from typing import Literal

import numpy as np

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.coco.annotations import read_annotations
from freeadv_fast.data.coco.inspection import refuse_unusable
from freeadv_fast.data.coco.loader import DetectionLoader
from freeadv_fast.data.coco.shapes import shapes_folder
from freeadv_fast.data.roll import Roll
from freeadv_fast.data.stream import Ints, Keys, Stream
from freeadv_fast.data.view import AS_CONFIGURED, View
from freeadv_fast.distributed.world import World
from freeadv_fast.errors import UserError

KINDS = ("coco", "shapes")


class DetectionSplit:
    """A split of images with boxes: a `data.build` split."""

    def __init__(self, config: TrainConfig, world: World, split: Literal["train", "val"]) -> None:
        """Reads the annotations of what --data names, coco:FOLDER or shapes.

        Images without objects are validated on, not trained on.

        Raises:
            UserError: anything wrong with them, in one line.
        """
        self.config, self.world = config, world
        annotations = read_annotations(_folder(config.data), split)
        self.annotations = annotations.with_objects() if split == "train" else annotations
        if not self.annotations.files:
            raise UserError(
                f"--data {config.data}: no image of {split} holds an object to learn; crowds and "
                "boxes thinner than a pixel are none"
            )
        self.classes = self.annotations.classes
        # An image has no class of its own by which a subset could be balanced.
        self.labels: Ints = np.zeros(len(self.annotations.files), np.int64)
        decoded = f"images are decoded by PIL, {config.workers} processes"
        self.lines: tuple[str, ...] = (decoded, *self.annotations.left_out)

    @property
    def keys(self) -> Keys:
        """What stands for each row's image in every draw."""
        return self.annotations.keys

    @functools.cached_property
    def roll(self) -> Roll:
        """Which images these are."""
        return self.annotations.roll

    def rows_of(self, view: View) -> Ints:
        """Rows of the images that a view takes: all.

        Raises:
            UserError: the view is a classifier's.
        """
        if view != AS_CONFIGURED:
            flag = "--image-list" if view.image_list is not None else "--preprocessing"
            raise UserError(f"{flag}: images with boxes are evaluated as COCO does; leave it out")
        return np.arange(len(self.labels))

    def loader(self, stream: Stream) -> DetectionLoader:
        """A loader for some of its rows.

        Raises:
            UserError: it is an evaluation's, and images that this rank will read are damaged or
                not those that were annotated. (Training meets its own within an epoch.)
        """
        loader = DetectionLoader(self.annotations, stream, self.config, self.world.device)
        if stream.seed is None:
            own = [row for share in loader.stream.shares(0) for row in share.rows.tolist()]
            refuse_unusable(self.annotations, own)
        return loader


def _folder(data: str) -> str:
    """The folder in COCO's layout that --data names."""
    kind, _, folder = data.partition(":")
    if kind == "shapes":
        return shapes_folder()
    if not folder:
        raise UserError(f"--data {data}: name the folder of COCO's files, coco:FOLDER")
    return os.path.expanduser(folder)
