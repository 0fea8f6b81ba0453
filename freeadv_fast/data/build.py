"""The loaders of a run: `open_data` finds what --data names, `deal_images` gives it to loaders.

Between the two, ranks compare what they found and a resumed run compares it with its checkpoint;
`build_phase_loaders` does without.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from freeadv_fast.config.presets import CPU_EVAL_IMAGES
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.cifar import CIFAR, load_cifar
from freeadv_fast.data.cifar import IMAGE_SIZE as CIFAR_SIZE
from freeadv_fast.data.coco.loader import DetectionLoader
from freeadv_fast.data.coco.split import KINDS as WITH_BOXES
from freeadv_fast.data.coco.split import DetectionSplit
from freeadv_fast.data.digits import digits_folder
from freeadv_fast.data.folder import (
    NO_DALI,
    Backend,
    FolderLoader,
    available_backend,
    build_decoder,
    first_decoder,
    refuse_other_classes,
    roll_of_files,
    split_folder,
)
from freeadv_fast.data.index import ImageIndex, index_images, shortened
from freeadv_fast.data.loader import Loader, TrainingLoader
from freeadv_fast.data.resident import ResidentImages, ResidentLoader
from freeadv_fast.data.roll import Changes, Roll
from freeadv_fast.data.split import balanced_rows, evenly_spaced_rows
from freeadv_fast.data.stream import Ints, Keys, Stream
from freeadv_fast.data.svhn import load_svhn
from freeadv_fast.data.synthetic import build_synthetic
from freeadv_fast.data.unlabelled import SemiSupervisedLoader, UnlabelledImages, open_unlabelled
from freeadv_fast.data.view import (
    AS_CONFIGURED,
    View,
    listed_rows,
    refuse_files_only,
    refuse_other_sizes,
)
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
        train: Training images without the held-out ones, unlabelled ones among them.
        holdout: Training images that choose the best checkpoint, read with the evaluation's
            preprocessing; None where none are held out.
        guard: Held-out images of the guard's checks; None likewise.
        val: Validation images: those of --eval-images, evenly spaced over the set.
        lines: What the user should know about the data, a line each.
        roll: The training images of --data, with the held-out ones. held_out: Keys of the latter.
        num_labelled: Images of --data in `train`.
        unlabelled: What --unlabelled holds; None without.
    """

    train: TrainingLoader
    holdout: Loader | None
    guard: Loader | None
    val: Loader
    lines: tuple[str, ...]
    roll: Roll
    held_out: Keys
    num_labelled: int
    unlabelled: Roll | None

    @functools.cached_property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the training images: the same in every phase."""
        return {
            "roll": self.roll.state_dict(),
            "held_out": torch.from_numpy(self.held_out.view(np.int64).copy()),
            "unlabelled": self.unlabelled.state_dict() if self.unlabelled else None,
        }

    def describe(self) -> list[str]:
        """Lines for the user: how many images, read by what, and which files were left out."""
        held_out = f", {self.holdout.num_images:,} held out" if self.holdout else ""
        objects = ""
        if isinstance(self.train, DetectionLoader):
            objects = f" with {self.train.annotations.num_objects:,} objects"
        counts = (
            f"data: {self.num_labelled:,} training images{objects}{held_out}, "
            f"{self.val.num_images:,} validation images, {len(self.train.classes):,} classes"
        )
        return [counts, *self.lines]


@dataclasses.dataclass(frozen=True)
class OpenedData:
    """What --data, --phase-data and --unlabelled name, as one rank found it.

    Attributes:
        trains: The training images of each phase.
        rows: Those of each phase that every phase has.
        val: The validation images, which all phases share.
        lines: What the user should know about the phases' folders, a line each.
        unlabelled: The images of --unlabelled; None without.
    """

    trains: tuple[_Split, ...]
    rows: tuple[Ints, ...]
    val: _Split
    lines: tuple[str, ...]
    unlabelled: UnlabelledImages | None

    @functools.cached_property
    def roll(self) -> Roll:
        """The images that are trained on or held out, as the last phase reads them."""
        return self.trains[-1].roll.of(self.rows[-1])

    def rolls(self, config: TrainConfig) -> dict[str, Roll]:
        """What every split and file holds, by the flag that names it and the split's folder."""
        flags = [f"--phase-data {folder}" for folder in config.phase_data]
        flags = flags or [f"--data {config.data}"] * len(self.trains)
        rolls = {f"--data {config.data}: val": self.val.roll}
        for flag, train in zip(flags, self.trains, strict=True):
            rolls[f"{flag}: train"] = train.roll
        if self.unlabelled is not None:
            rolls[f"--unlabelled {config.unlabelled}"] = self.unlabelled.roll
        return rolls


def open_data(config: TrainConfig, world: World) -> OpenedData:
    """Opens what a run reads; no rank waits for another one here.

    Args:
        config: The run; `data`, `phase_data` and `unlabelled` say what to read.
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
    rows, lines = _common_rows(trains)
    unlabelled = None
    if config.unlabelled is not None:
        unlabelled = open_unlabelled(config, trains[-1].classes, world.device)
    return OpenedData(tuple(trains), rows, val, lines, unlabelled)


def deal_images(
    config: TrainConfig, world: World, opened: OpenedData, held_out: Keys | None = None
) -> tuple[Loaders, ...]:
    """Builds the loaders of each phase of a run; one for a run without phases.

    Every phase holds the same images out, and all share the validation images of `data`, read at
    the last phase's size.

    Args:
        config: The run.
        world: This process among the others, and its device.
        opened: The data.
        held_out: Keys of the images to hold out, some of which may be gone: those of a run that is
            resumed, which were never trained on. None to draw them.

    Raises:
        UserError: a size or a number that the data are too small for, in one line.
    """
    phases = []
    for number, phase in enumerate(config.phase_configs):
        with blaming(f"--phases {config.phases[number]}" if config.phases else None):
            phases.append(_phase_loaders(phase, world, opened, number, config, held_out))
    return tuple(phases)


def build_phase_loaders(config: TrainConfig, world: World) -> tuple[Loaders, ...]:
    """The loaders of each phase of a new run, without a comparison of ranks.

    Arguments and errors are those of `open_data` and `deal_images`.
    """
    return deal_images(config, world, open_data(config, world))


def build_loaders(config: TrainConfig, world: World) -> Loaders:
    """The training, held-out and validation loaders of a run without phases.

    Arguments and errors are those of `build_phase_loaders`.
    """
    (loaders,) = build_phase_loaders(config, world)
    return loaders


def _refuse_other_images(config: TrainConfig, trains: list[_Split]) -> None:
    """Raises UserError where a phase's training images are not those of the last phase.

    A few may be missing, as a file that could not be copied: no more than may be bad.
    """
    last = trains[-1]
    for folder, train in zip(config.phase_data, trains, strict=False):
        if train.classes != last.classes:
            raise UserError(
                f"--phase-data {folder}: its {len(train.classes)} classes are not the "
                f"{len(last.classes)} of {config.phase_data[-1]}"
            )
        if np.array_equal(train.keys, last.keys):
            continue
        changes = Changes.between(last.roll, train.roll)
        others = changes.left + changes.came
        if len(others) > config.max_bad_fraction * len(last.labels):
            raise UserError(
                f"--phase-data {folder}: its {len(train.labels):,} training images are not the "
                f"{len(last.labels):,} of {config.phase_data[-1]}: {len(others):,} are in one of "
                f"them only ({shortened(others)}); make the copy anew (python -m "
                "freeadv_fast.data.resize) or raise --max-bad-fraction"
            )


def _common_rows(trains: list[_Split]) -> tuple[tuple[Ints, ...], tuple[str, ...]]:
    """Rows of each phase's images that every phase has, and a line where others are left out.

    The images that one phase holds out would otherwise be trained on in another.
    """
    keys = [train.keys for train in trains]
    if all(np.array_equal(each, keys[0]) for each in keys):
        return (np.arange(len(keys[0])),) * len(keys), ()
    common = functools.reduce(np.intersect1d, keys)
    rows = tuple(np.flatnonzero(np.isin(each, common)) for each in keys)
    num_lacking = len(functools.reduce(np.union1d, keys)) - len(common)
    line = f"{num_lacking:,} training images left out, for not every phase's folder has them"
    return rows, (line,) if num_lacking else ()


def _phase_loaders(
    config: TrainConfig,
    world: World,
    opened: OpenedData,
    phase: int,
    final: TrainConfig,
    held_out: Keys | None,
) -> Loaders:
    """The loaders of one phase.

    Args:
        config: The phase as a run of its own. final: The run.
        world: This process among the others.
        opened: The data. phase: Which of its training images, from 0.
        held_out: Keys of the images to hold out; None to draw them.
    """
    train, rows, val = opened.trains[phase], opened.rows[phase], opened.val
    labels, keys = train.labels[rows], train.keys[rows]
    drawn = _draw_held_out(config, labels, keys) if held_out is None else held_out
    is_held = np.isin(keys, drawn)

    def some_held(count: int) -> Ints:
        return rows[is_held][balanced_rows(labels[is_held], count, keys[is_held])]

    num_held = int(is_held.sum())
    is_short = config.holdout_images is None and world.device.type != "cuda"
    evaluated = some_held(CPU_EVAL_IMAGES if is_short else num_held)
    guarded = some_held(min(config.guard_images or DEFAULT_GUARD, len(evaluated)))
    is_new = held_out is None  # a resumed run makes do with those that are left
    if is_new and num_held and len(guarded) < (config.guard_images or 0):
        raise UserError(
            f"--guard-images {config.guard_images}: only {len(evaluated)} images are held out; use "
            f"--guard-images {len(evaluated)} or a larger --holdout-images"
        )
    labelled = train.loader(_training_stream(config, world, rows[~is_held], keys[~is_held]))
    mixed, unlabelled = None, opened.unlabelled
    if unlabelled is not None:
        mixed = SemiSupervisedLoader(labelled, unlabelled, config, world)
    lines = train.lines + val.lines + opened.lines + ((mixed.describe(),) if mixed else ())
    if isinstance(labelled, FolderLoader) and labelled.later is not None:
        lines += ("training images are decoded on the CPU instead, as long as its threads keep up",)
    return Loaders(
        train=mixed or labelled,
        holdout=train.loader(_stream(config, world, evaluated)) if num_held else None,
        guard=train.loader(_stream(config, world, guarded)) if num_held else None,
        val=val.loader(_stream(final, world, _val_rows(val, config.eval_images))),
        lines=tuple(dict.fromkeys(lines)),
        roll=opened.roll,
        held_out=drawn,
        num_labelled=labelled.num_images,
        unlabelled=unlabelled.roll if unlabelled else None,
    )


def _draw_held_out(config: TrainConfig, labels: Ints, keys: Keys) -> Keys:
    """Keys of the images that a new run holds out: equally many of each class; none by default of
    a detector.

    Args:
        config: The phase. labels, keys: Of its training images.

    Raises:
        UserError: half of the images or more.
    """
    count = config.holdout_images
    if count is None:
        # A detector's images have no class by which few of them could stand for all.
        count = 0 if config.task == "detection" else min(DEFAULT_HOLDOUT, len(labels) // 10)
    if count and 2 * count >= len(labels):
        raise UserError(
            f"--holdout-images {count}: half of the {len(labels)} training "
            "images or more; hold out fewer, or none with 0"
        )
    return keys[balanced_rows(labels, count, keys)]


def build_val_loader(
    config: TrainConfig, world: World, num_images: int | None, view: View = AS_CONFIGURED
) -> Loader:
    """The validation loader of an evaluation: exact shards, no image twice, none padded.

    Args:
        config: The run; `data` says what to read.
        world: This process among the others. Rank r reads rows r, r + W, ... of the subset.
        num_images: Images to read over all ranks, evenly spaced over the set, or over those that
            the view lists; None for all.
        view: Which images of the set, and how they are made the network's size.

    Raises:
        UserError: anything wrong with the data, in one line.
    """
    val = _open_split(config, world, "val", _image_lister(config, world), view)
    rows = val.rows_of(view)
    chosen = rows[evenly_spaced_rows(len(rows), num_images)]
    return val.loader(_stream(config, world, chosen))


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
    folder = os.path.expanduser(folder)
    index = index_images(folder, config.max_bad_fraction, announce)
    split = _FolderSplit(config, world, index)
    return split.loader(_stream(config, world, _val_rows(split, num_images)))


def _stream(config: TrainConfig, world: World, rows: Ints) -> Stream:
    """An evaluation's stream of some rows over this run's ranks."""
    return Stream(rows, config.batch_size, world.rank, world.size)


def _training_stream(config: TrainConfig, world: World, rows: Ints, keys: Keys) -> Stream:
    """The training stream; methods with shares and branches train on whole minibatches only."""
    smallest = config.batch_size if config.has_branches else 2
    return Stream(
        rows,
        config.batch_size,
        world.rank,
        world.size,
        config.seed,
        smallest,
        keys,
        config.accumulate,
        config.num_unlabelled,
    )


class _Split(Protocol):
    """An opened half of a dataset."""

    classes: list[str]
    labels: Ints
    lines: tuple[str, ...]

    @property
    def keys(self) -> Keys:
        """What stands for each row's image in every draw."""
        ...

    @property
    def roll(self) -> Roll:
        """Which images these are."""
        ...

    def rows_of(self, view: View) -> Ints:
        """Rows of the images that a view takes."""
        ...

    def loader(self, stream: Stream) -> TrainingLoader:
        """A loader for some of its rows."""
        ...


class _FolderSplit:
    """A split of image files; its loaders share one decoder.

    The training loader begins with another one where there is a choice. Evaluations do not take
    part in it: nothing is trained meanwhile, and what they see depends on no clock.
    """

    def __init__(
        self, config: TrainConfig, world: World, index: ImageIndex, view: View = AS_CONFIGURED
    ) -> None:
        """Chooses the decoder: PIL where a preprocessing is named, which is defined by it."""
        self.config, self.world, self.index, self.way = config, world, index, view.way
        self.classes, self.labels = index.classes, index.labels
        backend: Backend = available_backend() if self.way is None else "torchvision"
        self.decoder = build_decoder(backend, index, config, world.device, self.way)
        self.first = first_decoder(backend, index, config, world.device)
        self.lines: tuple[str, ...] = (f"images are decoded by {self.decoder}",)
        if backend == "torchvision" and self.way is None and world.is_main:
            _announce_once(NO_DALI)
        if index.bad:
            self.lines += (
                f"{len(index.bad):,} bad files of {index.folder} left out, listed in "
                f"{index.bad_list or 'no file: the cache cannot be written'}",
            )
        if index.foreign:
            self.lines += (
                f"left out of {index.folder}, by name no part of the data: "
                f"{shortened(index.foreign)}",
            )

    @property
    def keys(self) -> Keys:
        """What stands for each row's image in every draw."""
        return self.index.keys

    @functools.cached_property
    def roll(self) -> Roll:
        """Which images these are."""
        return roll_of_files(self.index)

    def rows_of(self, view: View) -> Ints:
        """Rows of the images that a view takes."""
        rows = np.arange(len(self.labels))
        if view.image_list is not None:
            rows = listed_rows(view.image_list, self.index)
        if self.way is not None and self.way.image_size is None:
            refuse_other_sizes(self.config.image_size, self.index, rows)
        return rows

    def loader(self, stream: Stream) -> FolderLoader:
        """A loader for some of its rows."""
        decoder, later = self.decoder, None
        if stream.seed is not None and self.first is not None:
            decoder, later = self.first, self.decoder
        return FolderLoader(
            self.index, stream, decoder, self.config, self.world.device, self.way, later
        )


class _ResidentSplit:
    """A split that lives on the device."""

    def __init__(self, config: TrainConfig, images: ResidentImages) -> None:
        """Keeps the images."""
        self.config, self.images = config, images
        self.classes, self.labels = images.classes, images.labels
        self.lines: tuple[str, ...] = ("images are resident on the device",)

    @property
    def keys(self) -> Keys:
        """What stands for each row's image in every draw: the row."""
        return np.arange(len(self.labels), dtype=np.uint64)

    @functools.cached_property
    def roll(self) -> Roll:
        """Which images these are."""
        return self.images.roll

    def rows_of(self, view: View) -> Ints:
        """Rows of the images that a view takes: all."""
        refuse_files_only(view, self.config.data)
        return np.arange(len(self.labels))

    def loader(self, stream: Stream) -> ResidentLoader:
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
    config: TrainConfig,
    world: World,
    split: SplitName,
    list_images: Callable[[str], ImageIndex],
    view: View = AS_CONFIGURED,
) -> _Split:
    """Opens what --data names.

    Raises:
        UserError: it cannot be opened, in one line.
    """
    announce = _announce_once if world.is_main else _keep_quiet
    kind, _, rest = config.data.partition(":")
    if kind in CIFAR or kind == "svhn":
        _refuse_resident_options(config, kind, rest)
        rest = os.path.expanduser(rest)  # a shell does not, behind a colon or an equals sign
    if kind == "svhn":
        return _ResidentSplit(config, load_svhn(rest, split, world.device))
    if kind in CIFAR:
        return _ResidentSplit(config, load_cifar(kind, rest, split, world.device, announce))
    if kind == "synthetic":
        images = build_synthetic(rest, config.image_size, split, world.device)
        return _ResidentSplit(config, images)
    data = digits_folder() if config.data == "digits" else os.path.expanduser(config.data)
    try:
        if kind in WITH_BOXES:
            return DetectionSplit(config, world, split)
        return _FolderSplit(config, world, list_images(split_folder(data, split)), view)
    except OSError as error:
        raise UserError(
            f"--data {data}: {error.filename} cannot be read ({error.strerror}); let this user "
            "read it"
        ) from None


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
