"""An ImageFolder split as a loader: plans from the stream, pixels from one of two decoders."""

from __future__ import annotations

import collections
import contextlib
import glob
import importlib.util
import itertools
import os
import shlex
import time
from collections.abc import Generator, Iterator
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.crop import pad_images, random_crop_flip
from freeadv_fast.data.decoding import QUEUE_DEPTH, Place
from freeadv_fast.data.index import ImageIndex, image_name, is_image_name, shortened
from freeadv_fast.data.loader import Batch
from freeadv_fast.data.names import class_folders
from freeadv_fast.data.plan import Plan, plan_evaluation, plan_random_resized_crop
from freeadv_fast.data.prefetch import DEPTH, prefetched
from freeadv_fast.data.preprocessing import BILINEAR, Preprocessing
from freeadv_fast.data.roll import Roll, Stamps
from freeadv_fast.data.stream import Share, Stream, shares_of_epochs
from freeadv_fast.errors import UserError

Backend = Literal["dali", "torchvision"]

NO_DALI = (
    "NVIDIA DALI is not installed: images are decoded by torchvision, more slowly "
    "(pip install nvidia-dali-cuda130)"
)

# Minibatches behind those in training whose plans may be drawn already: ready ones, those that DALI
# decodes, the one that the thread is about to hand over, the one that it asks for.
AHEAD = DEPTH + QUEUE_DEPTH + 2

# Minibatches after which a decoder is timed, its buffers grown and its queue full; and those timed.
UNTIMED, TIMED = QUEUE_DEPTH + 1, 4


# Tiny-ImageNet's val/ has all images in one folder, and this beside it: file, class, box.
TINY_IMAGENET_LABELS = "val_annotations.txt"


class Decoder(Protocol):
    """Executes plans."""

    def decode(self, plans: Iterator[Plan]) -> Generator[Tensor, None, None]:
        """Yields one (n, size, size, 3) uint8 tensor on the device a plan, in order."""
        ...


def available_backend() -> Backend:
    """DALI where it is installed, else torchvision."""
    found = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    return "dali" if found else "torchvision"


def build_decoder(
    backend: Backend,
    index: ImageIndex,
    config: TrainConfig,
    device: torch.device,
    preprocessing: Preprocessing | None = None,
    place: Place = "GPU",
) -> Decoder:
    """The decoder of a split.

    Args:
        backend: Which library decodes.
        index: The split.
        config: Gives image size, batch size and workers.
        device: Where the minibatches live.
        preprocessing: Whose filter resizes, where it is torchvision that decodes.
        place: What decodes, where it is DALI with minibatches on a GPU.
    """
    if backend == "dali":
        from freeadv_fast.data.folder_dali import DaliDecoder

        return DaliDecoder(
            index,
            image_size=config.image_size,
            batch_size=config.batch_size,
            num_workers=config.workers,
            device=device,
            place=place,
        )
    from freeadv_fast.data.folder_torchvision import TorchvisionDecoder

    return TorchvisionDecoder(
        index,
        image_size=config.image_size,
        batch_size=config.batch_size,
        num_workers=config.workers,
        device=device,
        resampling=BILINEAR if preprocessing is None else preprocessing.resampling,
    )


def first_decoder(
    backend: Backend, index: ImageIndex, config: TrainConfig, device: torch.device
) -> Decoder | None:
    """What decodes training images until it is known whether it is fast enough: the CPU.

    Args:
        backend: Which library decodes.
        index: The split.
        config: Gives image size, batch size and workers.
        device: Where the minibatches live.

    Returns:
        None where there is nothing to choose from, the split's decoder decoding on the CPU itself.
    """
    if backend != "dali" or device.type != "cuda":
        return None
    return build_decoder(backend, index, config, device, place="CPU")


class FolderLoader:
    """A split of an ImageFolder, see `loader.Loader`.

    Attributes:
        moves_at: Epoch and minibatch from which on `later` executes the plans; None for never.
    """

    def __init__(
        self,
        index: ImageIndex,
        stream: Stream,
        decoder: Decoder,
        config: TrainConfig,
        device: torch.device,
        preprocessing: Preprocessing | None = None,
        later: Decoder | None = None,
    ) -> None:
        """Reads the rows of `stream`.

        Args:
            index: The split's files.
            stream: Which of them, when. Without a seed: evaluation preprocessing.
            decoder: Executes the plans.
            config: Gives augmentation, sizes and seed.
            device: Where the minibatches live.
            preprocessing: Of an evaluation, in place of the config's resize and central crop.
            later: A decoder that may take over, see `move`.
        """
        self.index = index
        self.stream = stream
        self.decoder = decoder
        self.later = later
        self.moves_at: tuple[int, int] | None = None
        self.config = config
        self.device = device
        self.preprocessing = preprocessing
        self.augment = config.augment if stream.seed is not None else "none"
        self.classes = index.classes
        self.num_images = stream.num_images
        self.num_batches = stream.num_batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields the minibatches of `epoch` from position `start` on, decoded ahead."""
        return self.epochs(epoch, start, epoch)

    def epochs(self, epoch: int, start: int, last: int) -> Generator[Batch, None, None]:
        """As `epoch`, and then the epochs after it up to `last`, with the same queue."""
        return prefetched(self._batches(epoch, start, last), self.device)

    def move(self, epoch: int, minibatch: int) -> None:
        """Has `later` execute the plans from a position on.

        Where no plan from there on has been drawn, a minibatch's pixels depend on this position
        and its own alone.

        Args:
            epoch: Data epoch. minibatch: Position in it; behind its end it is the next one's start.
        """
        self.moves_at = epoch, minibatch

    def decoding_rate(self, epoch: int) -> float:
        """Images a second that `decoder` decodes with nothing else to do, from an epoch on.

        Raises:
            UserError: a file that cannot be decoded.
        """
        drawn: list[int] = []  # images in each plan

        def plans() -> Iterator[Plan]:
            for number in itertools.count(epoch):
                for share in self.stream.shares(number):
                    for part in share.parts(self.stream.batch_size):
                        drawn.append(len(part.rows))
                        yield self._plan(part, number)

        with contextlib.closing(self.decoder.decode(plans())) as decoded:
            for _ in range(UNTIMED):
                next(decoded)
            started = time.perf_counter()
            for _ in range(TIMED):
                next(decoded)
            seconds = time.perf_counter() - started
        return sum(drawn[UNTIMED : UNTIMED + TIMED]) / seconds

    def _batches(self, epoch: int, start: int, last: int) -> Generator[Batch, None, None]:
        """The minibatches on the current stream, from one decoder after the other."""
        drawn = shares_of_epochs(self.stream, epoch, start, last)
        for decoder, own in itertools.groupby(drawn, lambda place: self.decoder_at(*place[:2])):
            with contextlib.closing(self._decoded(decoder, own)) as batches:
                yield from batches

    def decoder_at(self, epoch: int, position: int) -> Decoder:
        """What executes the plans of a minibatch."""
        if self.later is None or self.moves_at is None or (epoch, position) < self.moves_at:
            return self.decoder
        return self.later

    def _decoded(
        self, decoder: Decoder, drawn: Iterator[tuple[int, int, Share]]
    ) -> Generator[Batch, None, None]:
        """The minibatches of some shares, given with their epochs and positions."""
        dealt: collections.deque[Share] = collections.deque()
        decoding: collections.deque[tuple[Share, int]] = collections.deque()

        def plans() -> Iterator[Plan]:
            for epoch, _, share in drawn:
                dealt.append(share)
                for part in share.parts(self.stream.batch_size):
                    decoding.append((part, epoch))
                    yield self._plan(part, epoch)

        with contextlib.closing(decoder.decode(plans())) as decoded:
            parts = (self._augmented(images, *decoding.popleft()) for images in decoded)
            for first in parts:
                share = dealt.popleft()
                rows = torch.from_numpy(share.rows.copy())
                labels = torch.from_numpy(self.index.labels[share.rows])
                yield Batch(
                    _joined(first, parts, len(rows)),
                    labels.to(self.device, non_blocking=True),
                    share.global_size,
                    rows,
                )

    def _plan(self, share: Share, epoch: int) -> Plan:
        """What the decoder does with a share."""
        config, sizes = self.config, self.index.sizes[share.rows]
        if self.augment == "random-resized-crop":
            return plan_random_resized_crop(share, sizes, config.image_size, config.seed, epoch)
        if self.preprocessing is not None:
            return self.preprocessing.plan(share.rows, sizes, config.image_size)
        return plan_evaluation(share.rows, sizes, config.image_size, config.evaluation_resize)

    def _augmented(self, images: Tensor, share: Share, epoch: int) -> Tensor:
        """What happens after decoding, on the device."""
        if self.augment not in ("pad-crop-flip", "pad-crop"):
            return images
        padding = self.config.crop_padding
        slots = torch.arange(len(images)).numpy()
        padded = pad_images(images, padding)
        flip = self.augment == "pad-crop-flip"
        seed = self.config.seed
        return random_crop_flip(padded, slots, share.keys, padding, seed, epoch, flip=flip)


def _joined(first: Tensor, parts: Iterator[Tensor], num_images: int) -> Tensor:
    """A share's images from as many parts as they come in, which are let go of one by one."""
    if len(first) == num_images:
        return first
    images = first.new_empty((num_images, *first.shape[1:]))
    images[: len(first)] = first
    filled = len(first)
    while filled < num_images:
        part = next(parts)
        images[filled : filled + len(part)] = part
        filled += len(part)
    return images


def roll_of_files(index: ImageIndex) -> Roll:
    """Which images a split of files holds."""
    stamps: Stamps = index.num_bytes.astype(np.uint32)
    bad = {image_name(file): reason for file, reason in index.bad.items()}
    return Roll(index.classes, index.names, stamps, "bytes", bad)


def split_folder(data: str, split: Literal["train", "val"]) -> str:
    """The folder of a split, after a look at how the data lie.

    Args:
        data: What the user gave as --data.
        split: Which half.

    Raises:
        UserError: missing or empty folder, no train/ or val/, or images that are not sorted into
            two folders or more, one a class.
    """
    if not os.path.isdir(data):
        raise UserError(f"--data {data}: no such folder")
    if not os.listdir(data):
        raise UserError(f"--data {data}: the folder is empty; it must hold train/ and val/")
    if glob.glob(os.path.join(glob.escape(data), "annotations", "instances_*.json")):
        raise UserError(
            f"--data {data}: holds COCO's files, boxes and no classes of images; use --data "
            f"coco:{data} with a detector, such as --arch retinanet_resnet50_fpn"
        )
    folder = os.path.join(data, split)
    if not os.path.isdir(folder):
        raise UserError(
            f"--data {data}: no {split}/ folder in it; an ImageFolder holds train/ and val/ with "
            f"one folder a class in each{_splits_below(data, split)}"
        )
    classes, _ = class_folders(folder)
    if len(classes) == 1:
        raise UserError(
            f"--data {data}: {split}/ holds one folder only, {classes[0]}/, and there would be one "
            f"class; {_classes_elsewhere(folder, classes[0])}"
        )
    if classes:
        return folder
    if any(map(is_image_name, os.listdir(folder))):
        raise UserError(
            f"--data {data}: {split}/ holds images but no class folders; move each image to "
            f"{split}/CLASS/, with the class names of train/ (for ImageNet, the script valprep.sh "
            "of github.com/soumith/imagenetloader.torch does it)"
        )
    raise UserError(f"--data {data}: {split}/ is empty; it must hold one folder a class")


def _splits_below(data: str, split: str) -> str:
    """Advice for a folder one level too high; empty where nothing in it holds the split."""
    below = [name for name in class_folders(data)[0] if os.path.isdir(f"{data}/{name}/{split}")]
    return f" (did you mean --data {os.path.join(data, below[0])}?)" if below else ""


def _classes_elsewhere(folder: str, name: str) -> str:
    """Where the classes of a split seem to be that holds one folder.

    Args:
        folder: The split. name: The one folder in it.
    """
    inner, _ = class_folders(os.path.join(folder, name))
    if len(inner) > 1:
        deeper = shlex.quote(os.path.join(folder, name))
        return (
            f"the {len(inner):,} folders in {name}/ seem to be the classes ({shortened(inner)}), "
            f"move them up: mv {deeper}/* {shlex.quote(folder)} && rmdir {deeper}"
        )
    if os.path.isfile(os.path.join(folder, TINY_IMAGENET_LABELS)):
        images = shlex.quote(name)
        return (
            f"{TINY_IMAGENET_LABELS} says which class each image is of, sort them by it: "
            f"cd {shlex.quote(folder)} && while read -r file class _; do "
            f'mkdir -p "$class" && mv {images}/"$file" "$class"; done < {TINY_IMAGENET_LABELS} '
            f"&& rmdir {images}"
        )
    return "an ImageFolder holds one folder a class, two or more"


def refuse_other_classes(data: str, train: list[str], val: list[str]) -> None:
    """Raises UserError where train and val do not hold the same classes."""
    for names, others, where in ((train, val, "val"), (val, train, "train")):
        missing = sorted(set(names) - set(others))
        if missing:
            raise UserError(
                f"--data {data}: {where}/ lacks {len(missing)} of the {len(names)} classes: "
                f"{shortened(missing)}; both splits need the same classes"
            )
    if train != val:
        raise UserError(
            f"--data {data}: train and val list the classes in different orders, and a label would "
            "mean another class in each; give both the same ids"
        )
