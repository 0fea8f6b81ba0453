"""What a detector finds in all images, over all ranks, in pixels of the stored images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from freeadv_fast.data.coco.annotations import Annotations
from freeadv_fast.data.coco.canvas import smallest_canvases
from freeadv_fast.data.loader import Batch
from freeadv_fast.data.stream import Ints
from freeadv_fast.distributed.world import World
from freeadv_fast.evaluation.detection.average_precision import Detections
from freeadv_fast.models.normalize import InputNormalizer, unit_images
from freeadv_fast.models.retinanet import Detector, HeadOutputs
from freeadv_fast.step.detection import Detection
from freeadv_fast.step.objects import Objects

# Takes (n, 3, H, W) pixels in [0, 1] and the minibatch that they are of; returns others.
Change = Callable[[Tensor, Batch], Tensor]


class PixelDetector:
    """A detector of pixels in [0, 1]; as in training it sees 0 for what is padding.

    Args:
        detector: Of normalised images.
        mean: Per-channel mean that they are normalised with, in [0, 1]. std: Likewise.
        device: Where the images are.
    """

    def __init__(
        self,
        detector: Detector,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
    ) -> None:
        """Shares the detector."""
        self.detector = detector
        self.normalize = InputNormalizer(mean, std).to(device)
        self.task = Detection(detector)

    def outputs(self, images: Tensor, targets: Tensor) -> HeadOutputs:
        """What the detector says of (n, 3, H, W) float32 pixels with these targets."""
        outputs: HeadOutputs = self.detector(self.task.seen(self.normalize(images), targets))
        return outputs

    def loss_sum(self, images: Tensor, targets: Tensor) -> Tensor:
        """Class and box loss, summed over the images: what an attack ascends."""
        outputs = self.outputs(images, targets)
        (loss,) = self.task.attack_losses(outputs, targets, smoothed=False)
        return loss

    @torch.no_grad()
    def predictions(self, images: Tensor, targets: Tensor) -> list[dict[str, Tensor]]:
        """Boxes, scores and labels of each image, see `Detector.predictions`."""
        return self.detector.predictions(self.outputs(images, targets), Objects.of(targets).sizes)


def on_own_canvases(batches: Iterable[Batch], canvases: Ints) -> Iterator[Batch]:
    """Minibatches in parts, each cut to the smallest canvas that holds each of its images.

    What a detector says of an image hangs on how far its padding reaches. So it does not hang on
    the images that came along, which are others on other numbers of ranks.

    Args:
        batches: Of images on any canvas.
        canvases: (G, 2) int64 height and width, `DetectionLoader.canvases`.
    """
    for batch in batches:
        own = smallest_canvases(Objects.of(batch.labels).sizes.cpu().numpy(), canvases)
        for place in np.unique(own):
            (height, width), rows = canvases[place], torch.from_numpy(own == place)
            here = rows.to(batch.images.device)
            images = batch.images[here, :height, :width]
            yield Batch(images, batch.labels[here], batch.global_size, batch.indices[rows])


def detect(
    network: PixelDetector,
    batches: Iterable[Batch],
    annotations: Annotations,
    world: World,
    change: Change | None = None,
) -> dict[int, Detections]:
    """Looks for objects in every rank's images; every rank calls it.

    Args:
        network: In eval mode.
        batches: This rank's share; none without an image.
        annotations: Of the split that they are from.
        world: The ranks.
        change: What is done to the images before. Default: nothing.

    Returns:
        On rank 0 the detections of all ranks by image id, an image that two ranks had once; on the
        others nothing.
    """

    def detect_in(batch: Batch) -> dict[int, Detections]:
        images = unit_images(batch.images)
        images = images if change is None else change(images, batch)
        return in_stored_pixels(network.predictions(images, batch.labels), batch, annotations)

    def detect_own() -> dict[int, Detections]:
        found: dict[int, Detections] = {}
        for batch in batches:
            found |= in_halves(batch, detect_in)
        return found

    found: dict[int, Detections] = {}
    for own in world.gather_on_host(world.together(detect_own)):
        found = own | found  # type: ignore[operator]
    return found


def in_halves(
    batch: Batch, detect_in: Callable[[Batch], dict[int, Detections]]
) -> dict[int, Detections]:
    """What is found in a minibatch; in its halves, and theirs, where memory is short.

    An evaluation in float32, with an attack's backward pass, takes more than training did. (An
    attack's start hangs on a part's first image.)
    """
    try:
        return detect_in(batch)
    except torch.OutOfMemoryError:
        if len(batch.labels) == 1:
            raise
    half = len(batch.labels) // 2
    found: dict[int, Detections] = {}
    for rows in (slice(half), slice(half, None)):
        images, labels, indices = batch.images[rows], batch.labels[rows], batch.indices[rows]
        part = Batch(images, labels, batch.global_size, indices)
        found |= in_halves(part, detect_in)
    return found


def in_stored_pixels(
    predictions: Sequence[dict[str, Tensor]], batch: Batch, annotations: Annotations
) -> dict[int, Detections]:
    """Predictions on a minibatch as detections by image id.

    Args:
        predictions: Of each image, boxes in pixels of the padded minibatch.
        batch: The minibatch: which images it is of, and the size at which they are seen.
        annotations: Of the split: the size at which they are stored.
    """
    rows = batch.indices.numpy()
    seen = Objects.of(batch.labels).sizes.cpu().numpy()
    ratios = (np.asarray(annotations.sizes)[rows] / seen)[:, [1, 0, 1, 0]]
    category_ids = np.asarray(annotations.category_ids, dtype=np.int64)
    found = {}
    for row, ratio, own in zip(rows.tolist(), ratios, predictions, strict=True):
        boxes, scores, labels = (own[key].cpu().numpy() for key in ("boxes", "scores", "labels"))
        found[int(annotations.image_ids[row])] = Detections(
            (boxes * ratio).astype(np.float32), scores, category_ids[labels]
        )
    return found
