"""The loaders of a run: opens what --data names; `build_phase_loaders` is the way in."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from freeadv_fast.config.presets import CPU_EVAL_IMAGES
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.cifar import CIFAR, load_cifar
from freeadv_fast.data.cifar import IMAGE_SIZE as CIFAR_SIZE
from freeadv_fast.data.digits import digits_folder
from freeadv_fast.data.folder import (
    NO_DALI,
    FolderLoader,
    available_backend,
    build_decoder,
    refuse_other_classes,
    split_folder,
)
from freeadv_fast.data.index import ImageIndex, index_images
from freeadv_fast.data.loader import Loader
from freeadv_fast.data.resident import ResidentImages, ResidentLoader
from freeadv_fast.data.split import balanced_rows, evenly_spaced_rows
from freeadv_fast.data.stream import Ints, Stream
from freeadv_fast.data.svhn import load_svhn
from freeadv_fast.data.synthetic import build_synthetic
from freeadv_fast.distributed.world import World
from freeadv_fast.errors import UserError, blaming

# Enough for a standard error of 1.6 points at 50 % accuracy.
DEFAULT_HOLDOUT = 1000

# A fall from 45 % to 5 % of so many is far beyond their noise (guard.py).
DEFAULT_GUARD = 64

SplitName = Literal["train", "val"]


@dataclasses.dataclass(frozen=True)
class Loaders:
    """The splits of a run, as one rank sees them.

    Attributes:
        train: Training images without the held-out ones.
        holdout: Training images that choose the best checkpoint, read with the evaluation's
            preprocessing; None where none are held out.
        guard: Held-out images of the guard's checks, evenly spaced over them; None likewise.
        val: Validation images: those of --eval-images, evenly spaced over the set.
        lines: What the user should know about the data, a line each.
    """

    train: Loader
    holdout: Loader | None
    guard: Loader | None
    val: Loader
    lines: tuple[str, ...]

    def describe(self) -> list[str]:
        """Lines for the user: how many images, read by what, and which files were left out."""
        held_out = f", {self.holdout.num_images:,} held out" if self.holdout else ""
        counts = (
            f"data: {self.train.num_images:,} training images{held_out}, "
            f"{self.val.num_images:,} validation images, {len(self.train.classes):,} classes"
        )
        return [counts, *self.lines]


def build_phase_loaders(config: TrainConfig, world: World) -> tuple[Loaders, ...]:
    """Builds the loaders of each phase of a run; one for a run without phases.

    Every phase holds the same images out, and all share the validation images of `data`, read at
    the last phase's size.

    Args:
        config: The run; `data` and `phase_data` say what to read.
        world: This process among the others, and its device.

    Raises:
        UserError: anything wrong with the data, in one line.
    """
    list_images = _image_lister(config, world)
    val = _open_split(config, world, "val", list_images)
    trains: list[_Split] = []
    for phase in config.phase_configs:
        with blaming("--phase-data" if config.phase_data else None):
            trains.append(_open_split(phase, world, "train", list_images))
    refuse_other_classes(config.phase_configs[-1].data, trains[-1].classes, val.classes)
    _refuse_other_images(config, trains)
    phases = []
    for number, phase in enumerate(config.phase_configs):
        with blaming(f"--phases {config.phases[number]}" if config.phases else None):
            phases.append(_phase_loaders(phase, world, trains[number], val, config))
    return tuple(phases)


def build_loaders(config: TrainConfig, world: World) -> Loaders:
    """The training, held-out and validation loaders of a run without phases.

    Arguments and errors are those of `build_phase_loaders`.
    """
    (loaders,) = build_phase_loaders(config, world)
    return loaders


def _refuse_other_images(config: TrainConfig, trains: list[_Split]) -> None:
    """Raises UserError where a phase's training images are not those of the last phase.

    The images that one phase holds out would otherwise be trained on in another.
    """
    last = trains[-1]
    for folder, train in zip(config.phase_data, trains, strict=False):
        if train.classes != last.classes:
            raise UserError(
                f"--phase-data {folder}: its {len(train.classes)} classes are not the "
                f"{len(last.classes)} of {config.phase_data[-1]}"
            )
        if not np.array_equal(train.labels, last.labels):
            raise UserError(
                f"--phase-data {folder}: its {len(train.labels):,} training images are not the "
                f"{len(last.labels):,} of {config.phase_data[-1]}; each class needs the same "
                "number in every phase (python -m freeadv_fast.data.resize makes a copy anew)"
            )


def _phase_loaders(
    config: TrainConfig, world: World, train: _Split, val: _Split, final: TrainConfig
) -> Loaders:
    """The loaders of one phase.

    Args:
        config: The phase as a run of its own. final: The run.
        world: This process among the others.
        train: The phase's training images. val: The run's validation images.
    """
    count = config.holdout_images
    if count is None:
        count = min(DEFAULT_HOLDOUT, len(train.labels) // 10)
    held_out = balanced_rows(train.labels, count)
    if count and 2 * count >= len(train.labels):
        raise UserError(
            f"--holdout-images {count}: half of the {len(train.labels)} training "
            "images or more; hold out fewer, or none with 0"
        )
    kept = np.setdiff1d(np.arange(len(train.labels)), held_out)
    if config.holdout_images is None and world.device.type != "cuda":
        held_out = held_out[evenly_spaced_rows(len(held_out), CPU_EVAL_IMAGES)]
    guarded = held_out[evenly_spaced_rows(len(held_out), config.guard_images or DEFAULT_GUARD)]
    if len(held_out) and config.guard_images is not None and config.guard_images > len(held_out):
        raise UserError(
            f"--guard-images {config.guard_images}: only {len(held_out)} images are held out; use "
            f"--guard-images {len(held_out)} or a larger --holdout-images"
        )
    return Loaders(
        train=train.loader(_training_stream(config, world, kept)),
        holdout=train.loader(_stream(config, world, held_out)) if len(held_out) else None,
        guard=train.loader(_stream(config, world, guarded)) if len(held_out) else None,
        val=val.loader(_stream(final, world, _val_rows(val, config.eval_images))),
        lines=train.lines + tuple(line for line in val.lines if line not in train.lines),
    )


def build_val_loader(config: TrainConfig, world: World, num_images: int | None) -> Loader:
    """The validation loader of an evaluation: exact shards, no image twice, none padded.

    Args:
        config: The run; `data` says what to read.
        world: This process among the others. Rank r reads rows r, r + W, ... of the subset.
        num_images: Images to read over all ranks, evenly spaced over the set; None for all.

    Raises:
        UserError: anything wrong with the data, in one line.
    """
    val = _open_split(config, world, "val", _image_lister(config, world))
    return val.loader(_stream(config, world, _val_rows(val, num_images)))


def build_folder_loader(
    folder: str | Path, config: TrainConfig, world: World, num_images: int | None
) -> FolderLoader:
    """The loader of an evaluation on any folder that holds one folder a class.

    Args:
        folder: The folder; its own class names, sorted, are the labels' meaning.
        config: Gives image size, resize, batch size and workers.
        world: This process among the others, as for `build_val_loader`.
        num_images: Images to read over all ranks, evenly spaced over the set; None for all.

    Raises:
        UserError: class folders without images, or too many bad files, in one line.
    """
    announce = _announce_once if world.is_main else _keep_quiet
    index = index_images(str(folder), config.max_bad_fraction, announce)
    split = _FolderSplit(config, world, index)
    return split.loader(_stream(config, world, _val_rows(split, num_images)))


def _stream(config: TrainConfig, world: World, rows: Ints) -> Stream:
    """An evaluation's stream of some rows over this run's ranks."""
    return Stream(rows, config.batch_size, world.rank, world.size)


def _training_stream(config: TrainConfig, world: World, rows: Ints) -> Stream:
    """The training stream; methods with shares and branches train on whole minibatches only."""
    smallest = config.batch_size if config.has_branches else 2
    return Stream(rows, config.batch_size, world.rank, world.size, config.seed, smallest)


class _Split(Protocol):
    """An opened half of a dataset."""

    classes: list[str]
    labels: Ints
    lines: tuple[str, ...]

    def loader(self, stream: Stream) -> Loader:
        """A loader for some of its rows."""
        ...


class _FolderSplit:
    """A split of image files; its loaders share one decoder."""

    def __init__(self, config: TrainConfig, world: World, index: ImageIndex) -> None:
        """Chooses the decoder."""
        self.config, self.world, self.index = config, world, index
        self.classes, self.labels = index.classes, index.labels
        backend = available_backend()
        self.decoder = build_decoder(backend, index, config, world.device)
        self.lines: tuple[str, ...] = (f"images are decoded by {self.decoder}",)
        if backend == "torchvision" and world.is_main:
            _announce_once(NO_DALI)
        if index.num_bad:
            self.lines += (
                f"{index.num_bad:,} bad files of {index.folder} left out, listed in "
                f"{index.bad_list or 'no file: the cache cannot be written'}",
            )

    def loader(self, stream: Stream) -> FolderLoader:
        """A loader for some of its rows."""
        return FolderLoader(self.index, stream, self.decoder, self.config, self.world.device)


class _ResidentSplit:
    """A split that lives on the device."""

    def __init__(self, config: TrainConfig, images: ResidentImages) -> None:
        """Keeps the images."""
        self.config, self.images = config, images
        self.classes, self.labels = images.classes, images.labels
        self.lines: tuple[str, ...] = ("images are resident on the device",)

    def loader(self, stream: Stream) -> Loader:
        """A loader for some of its rows."""
        return ResidentLoader(self.images, stream, self.config)


def _val_rows(val: _Split, num_images: int | None) -> Ints:
    """Rows of an evaluation over `num_images` images; all of them for None."""
    return evenly_spaced_rows(len(val.labels), num_images)


def _image_lister(config: TrainConfig, world: World) -> Callable[[str], ImageIndex]:
    """A function that lists a folder's images; phases that share a folder share the list."""
    announce = _announce_once if world.is_main else _keep_quiet
    return functools.cache(lambda folder: index_images(folder, config.max_bad_fraction, announce))


def _open_split(
    config: TrainConfig, world: World, split: SplitName, list_images: Callable[[str], ImageIndex]
) -> _Split:
    """Opens what --data names.

    Raises:
        UserError: it cannot be opened, in one line.
    """
    announce = _announce_once if world.is_main else _keep_quiet
    kind, colon, rest = config.data.partition(":")
    if kind in CIFAR or kind == "svhn":
        _refuse_resident_options(config, kind, rest)
    if kind == "svhn":
        return _ResidentSplit(config, load_svhn(rest, split, world.device))
    if kind in CIFAR:
        return _ResidentSplit(config, load_cifar(kind, rest, split, world.device, announce))
    if kind == "synthetic":
        images = build_synthetic(rest, config.image_size, split, world.device)
        return _ResidentSplit(config, images)
    data = digits_folder() if config.data == "digits" else config.data
    folder = split_folder(data, split)
    return _FolderSplit(config, world, list_images(folder))


@functools.cache
def _announce_once(line: str) -> None:
    """Prints a line for the user, the first time in this process."""
    print(line, flush=True)


def _keep_quiet(line: str) -> None:
    """What the other ranks do with a line."""


def _refuse_resident_options(config: TrainConfig, kind: str, folder: str) -> None:
    """Raises UserError where the set cannot be read the way the flags ask."""
    if not folder:
        raise UserError(f"--data {config.data}: name the folder of the files, {kind}:FOLDER")
    if config.image_size != CIFAR_SIZE:
        raise UserError(
            f"--image-size {config.image_size}: {kind} has {CIFAR_SIZE} pixels a side and is not "
            f"resized; use --image-size {CIFAR_SIZE}"
        )
    if config.augment == "random-resized-crop":
        raise UserError(
            f"--augment random-resized-crop: {kind} is cropped on the device; use "
            "--augment pad-crop-flip, pad-crop or none"
        )
