"""Images without labels that are trained on beside those of --data, with pseudo labels.

Carmon et al., "Unlabeled Data Improves Adversarial Robustness", NeurIPS 2019, hand theirs out as a
pickle (``data``, ``extrapolated_targets``); Wang et al., "Better Diffusion Models Further Improve
Adversarial Training", ICML 2023, images of a diffusion model as .npz (``image``, ``label``). A
pickle is read into memory by `cifar.ArrayUnpickler`, which runs none of it. What an .npz stores
uncompressed is mapped where it lies; what it compresses is unpacked into the user's cache once, and
mapped there.

Each minibatch has a fixed share of them. An epoch stays one pass over --data; which unlabelled
images it meets follows from the position, a walk through one permutation of them after the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import shutil
import struct
import zipfile
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.cache import cache_folder, written_atomically
from freeadv_fast.data.cifar import ArrayUnpickler
from freeadv_fast.data.crop import pad_images, random_crop_flip
from freeadv_fast.data.loader import Batch, TrainingLoader
from freeadv_fast.data.names import keys_of
from freeadv_fast.data.prefetch import prefetched
from freeadv_fast.data.roll import Roll
from freeadv_fast.data.split import evenly_spaced_rows
from freeadv_fast.data.stream import ORDER_DRAW, Ints, Share, random_bits, shares_of_epochs
from freeadv_fast.distributed.world import World
from freeadv_fast.errors import UserError, remedy

# Images and pseudo labels, as an .npz and as a pickle call them.
NPZ_KEYS = ("image", "label")
PICKLE_KEYS = ("data", "extrapolated_targets")

# Share of a GPU's free memory that they may fill: 500,000 images of CIFAR's size are 1.5 GB.
RESIDENT_SHARE = 1 / 4
RESIDENT, IN_MEMORY, MAPPED = "resident on the device", "in host memory", "memory-mapped"

# Images whose checksums stand for all of them: 50 million would take minutes to read.
NUM_CHECKED = 4096

# Their keys begin here, far from rows (CIFAR's keys) and, but for chance, from hashes of names.
FIRST_KEY = keys_of(["--unlabelled"])[0]


class _Arrays(NamedTuple):
    """What a file holds: images as they come, pseudo labels, and where the images are now."""

    images: NDArray[Any]
    labels: NDArray[Any]
    place: str


@dataclasses.dataclass(frozen=True, eq=False)
class UnlabelledImages:
    """The images of one file.

    Attributes:
        path: The file, as the user named it.
        images: (P, H, W, 3) uint8 on the training device, or in host memory where it is too small.
        labels: (P,) int64 pseudo labels.
        classes: Class names that these are indices into.
        place: Where the images are, in words.
    """

    path: str
    images: Tensor
    labels: Ints
    classes: list[str]
    place: str

    @functools.cached_property
    def roll(self) -> Roll:
        """What the file holds: checksums of all labels and of `NUM_CHECKED` images."""
        count = len(self.labels)
        rows = evenly_spaced_rows(count, NUM_CHECKED)
        pixels = self.images[torch.from_numpy(rows).to(self.images.device)].cpu().numpy()
        stamps = [*map(zlib.crc32, pixels), zlib.crc32(self.labels.tobytes())]
        names = [f"image {row:,} of {count:,}" for row in rows]
        names.append(f"the list of {count:,} labels")
        return Roll(self.classes, names, np.array(stamps, np.uint32), "checksum", bad={})


def open_unlabelled(
    config: TrainConfig, classes: list[str], device: torch.device
) -> UnlabelledImages:
    """Opens what --unlabelled names.

    Args:
        config: The run. classes: Class names of its data.
        device: Where training runs.

    Raises:
        UserError: the file is missing or damaged, or does not fit the run, in one line.
    """
    assert config.unlabelled is not None
    flag, path = f"--unlabelled {config.unlabelled}", Path(config.unlabelled).expanduser()
    if not path.is_file():
        raise UserError(
            f"{flag}: no such file; give the pickle of Carmon et al., or an .npz with image and "
            "label"
        )
    try:
        arrays = _read_npz(path, flag) if path.suffix == ".npz" else _read_pickle(path, flag)
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"{flag}: cannot be read ({error.strerror}); let this user read it"
        ) from None
    except Exception as error:  # damaged files raise nearly anything
        words = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{flag}: damaged, or not arrays alone ({words}); get it anew") from None
    _refuse_unfit(arrays, config.image_size, len(classes), flag)
    # Whole images in a row, and writable for torch's sake; a copy only where they are not.
    images = torch.from_numpy(np.require(arrays.images, requirements=["C", "W"]))
    place = arrays.place
    if device.type == "cpu" and place == IN_MEMORY:
        place = RESIDENT
    elif device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if images.nbytes <= RESIDENT_SHARE * free:
            images, place = images.to(device), RESIDENT
    return UnlabelledImages(
        config.unlabelled, images, arrays.labels.astype(np.int64), classes, place
    )


def _refuse_unfit(arrays: _Arrays, image_size: int, num_classes: int, flag: str) -> None:
    """Raises UserError where arrays are not images and labels for this run.

    Args:
        arrays: What the file holds. flag: Names the file.
        image_size: Side of the run's images. num_classes: Of its data.
    """
    images, labels, _ = arrays
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise UserError(
            f"{flag}: its images are {images.dtype} of shape {images.shape}; store uint8 of "
            "(N, height, width, 3)"
        )
    if len(images) == 0:
        raise UserError(f"{flag}: holds no image; give another file, or leave it out")
    height, width = images.shape[1:3]
    if (height, width) != (image_size, image_size):
        raise UserError(
            f"{flag}: its images have {height} x {width} pixels, those of the run {image_size} x "
            f"{image_size} (--image-size), and none are resized; give a file of that size"
        )
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{flag}: its labels are {labels.dtype} of shape {labels.shape}; store a whole number "
            f"for each of its {len(images):,} images"
        )
    low, high = labels.min(), labels.max()
    if low < 0 or high >= num_classes:
        raise UserError(
            f"{flag}: its labels go from {low} to {high}, those of --data from 0 to "
            f"{num_classes - 1}; give pseudo labels of the same classes"
        )


def _read_pickle(path: Path, flag: str) -> _Arrays:
    """The arrays of a pickle, in host memory."""
    with path.open("rb") as file:
        content = ArrayUnpickler(file, encoding="bytes").load()
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, not a dictionary")
    # Python 2 wrote its keys as bytes.
    content = {key.decode() if isinstance(key, bytes) else key: content[key] for key in content}
    _refuse_without(PICKLE_KEYS, list(map(str, content)), flag)
    images, labels = (np.asarray(content[key]) for key in PICKLE_KEYS)
    return _Arrays(images, labels, IN_MEMORY)


def _read_npz(path: Path, flag: str) -> _Arrays:
    """The labels of an .npz in memory, its images mapped."""
    image_key, label_key = NPZ_KEYS
    with zipfile.ZipFile(path) as archive:
        found = [name.removesuffix(".npy") for name in archive.namelist()]
        _refuse_without(NPZ_KEYS, found, flag)
        with archive.open(f"{label_key}.npy") as file:
            labels = np.lib.format.read_array(file, allow_pickle=False)
        member = archive.getinfo(f"{image_key}.npy")
        if member.compress_type == zipfile.ZIP_STORED:
            images = _mapped(path, _start_of(path, member))
        else:
            images = _mapped(_unpacked(path, archive, member, flag))
    return _Arrays(images, labels, MAPPED)


def _refuse_without(keys: tuple[str, ...], found: list[str], flag: str) -> None:
    """Raises UserError where one of the keys is not among those found."""
    if not set(keys) <= set(found):
        raise UserError(
            f"{flag}: holds {', '.join(found) or 'nothing'}; store its images as {keys[0]} and "
            f"their labels as {keys[1]}"
        )


def _start_of(path: Path, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored member begin in an archive: behind its local header.

    Its name and its extra field, whose lengths stand at bytes 26 and 28, need not be those of the
    archive's directory (APPNOTE.TXT of PKWARE, 4.3.7).
    """
    with path.open("rb") as file:
        file.seek(member.header_offset)
        name_length, extra_length = struct.unpack_from("<HH", file.read(30), 26)
    return member.header_offset + 30 + int(name_length) + int(extra_length)


def _mapped(path: Path, start: int = 0) -> NDArray[Any]:
    """The array of an .npy that begins at byte `start` of a file; its pages are read when used.

    Pages that are written to would be copies, so that torch finds it writable and the file stays as
    it is.
    """
    with path.open("rb") as file:
        file.seek(start)
        shape, is_fortran, dtype = _npy_header(file)
        if dtype.hasobject:
            raise ValueError("holds Python objects")
        return np.memmap(file, dtype, "c", file.tell(), shape, "F" if is_fortran else "C")


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type of the array that follows."""
    if np.lib.format.read_magic(file) == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _unpacked(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, flag: str) -> Path:
    """A compressed member as a file in the user's cache, where a run before may have put it.

    It belongs to the archive's place, length and time. Ranks that start together on an empty cache
    unpack one each, of which the last stays.
    """
    stat = path.stat()
    identity = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    name = hashlib.blake2b(identity.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    unpacked = cache_folder() / "unlabelled" / f"{name}.npy"
    if not unpacked.is_file():
        try:
            with archive.open(member) as packed, written_atomically(unpacked) as file:
                shutil.copyfileobj(packed, file, 2**20)
        except OSError as error:
            raise UserError(
                f"{flag}: cannot be unpacked into {unpacked.parent} ({error.strerror}); "
                f"{remedy(error) or 'make the folder writable'}, or store it uncompressed "
                "(numpy.savez)"
            ) from None
    return unpacked


@dataclasses.dataclass(frozen=True)
class UnlabelledStream:
    """Which unlabelled images a rank sees, and when.

    Global minibatch t of epoch e starts at place (e T + t) U W of a walk through the images, one
    permutation after the other, T minibatches an epoch and U images a rank in each. Rank r takes
    places r, r + W, r + 2W, ... A last minibatch with fewer labelled images has as many fewer
    unlabelled ones, in proportion.

    Attributes:
        num_images: P, unlabelled images.
        share_size: U, of them in a rank's share of a whole minibatch.
        num_labelled: Labelled images of an epoch, over all ranks.
        labelled_share_size: Of them in a rank's share of a whole minibatch.
        num_batches: T.
        rank: r, this process.
        world_size: W, processes.
        seed: Seed of the permutations.
    """

    num_images: int
    share_size: int
    num_labelled: int
    labelled_share_size: int
    num_batches: int
    rank: int
    world_size: int
    seed: int

    @property
    def per_epoch(self) -> int:
        """Unlabelled images of an epoch, over all ranks."""
        whole = (self.num_batches - 1) * self.share_size * self.world_size
        return whole + self.global_size(self.num_batches - 1)

    def global_size(self, number: int) -> int:
        """Unlabelled images of an epoch's minibatch, over all ranks."""
        whole = self.labelled_share_size * self.world_size
        labelled = min(whole, self.num_labelled - number * whole)
        return labelled * self.share_size // self.labelled_share_size

    def shares(self, epoch: int, start: int = 0) -> Iterator[Share]:
        """Yields this rank's shares of `epoch` from global minibatch `start` on.

        An image has another key, and so another crop, in each walk through all of them.
        """
        for number in range(start, self.num_batches):
            size = self.global_size(number)
            first = (epoch * self.num_batches + number) * self.share_size * self.world_size
            places = np.arange(first, first + size, dtype=np.int64)[self.rank :: self.world_size]
            walks, steps = np.divmod(places, self.num_images)
            rows = np.empty_like(places)
            for walk in np.unique(walks):
                is_here = walks == walk
                rows[is_here] = _order(self.seed, int(walk), self.num_images)[steps[is_here]]
            yield Share(rows, FIRST_KEY + (walks * self.num_images + rows).astype(np.uint64), size)


@functools.lru_cache(maxsize=1)
def _order(seed: int, walk: int, num_images: int) -> Ints:
    """A permutation of all rows, the one of a walk.

    500,000 take 0.1 s, once a walk and once in a resumed run.
    """
    keys = FIRST_KEY + np.arange(num_images, dtype=np.uint64)
    draws = random_bits(seed, walk, keys, range(ORDER_DRAW, ORDER_DRAW + 1))
    return np.argsort(draws[:, 0], kind="stable")


class SemiSupervisedLoader:
    """A loader's minibatches with unlabelled images among them, see `loader.Loader`.

    They lie at equal distances, so that the parts of an accumulated update have equal shares.
    """

    def __init__(
        self,
        labelled: TrainingLoader,
        unlabelled: UnlabelledImages,
        config: TrainConfig,
        world: World,
    ) -> None:
        """Adds them.

        Args:
            labelled: The training images of --data, `config.num_unlabelled` fewer of them in a
                rank's share than an update has.
            unlabelled: The images to add.
            config: Gives augmentation, seed, the share, and whether labels mark them.
            world: This process among the others.
        """
        self.labelled, self.unlabelled = labelled, unlabelled
        self.config, self.world = config, world
        self.stream = UnlabelledStream(
            num_images=len(unlabelled.labels),
            share_size=config.num_unlabelled,
            num_labelled=labelled.num_images,
            labelled_share_size=config.update_size - config.num_unlabelled,
            num_batches=labelled.num_batches,
            rank=world.rank,
            world_size=world.size,
            seed=config.seed,
        )
        self.classes = labelled.classes
        self.num_images = labelled.num_images + self.stream.per_epoch
        self.num_batches = labelled.num_batches
        self.marks = config.method == "dat" and config.dat_unlabelled == "kl"

    def describe(self) -> str:
        """A line for the user: how many of what, and their share of a global minibatch."""
        config, size = self.config, self.world.size
        return (
            f"{len(self.unlabelled.labels):,} unlabelled images of {self.unlabelled.path}, "
            f"{config.num_unlabelled * size:,} of each minibatch's {config.update_size * size:,}, "
            f"{self.unlabelled.place}"
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields the minibatches of `epoch` from position `start` on."""
        return self.epochs(epoch, start, epoch)

    def epochs(self, epoch: int, start: int, last: int) -> Generator[Batch, None, None]:
        """As `epoch`, and then the epochs after it up to `last`."""
        unlabelled = self._unlabelled_batches(epoch, start, last)
        if self.unlabelled.place != RESIDENT:
            unlabelled = prefetched(unlabelled, self.world.device)
        labelled = self.labelled.epochs(epoch, start, last)
        with contextlib.closing(unlabelled), contextlib.closing(labelled):
            pairs = zip(labelled, unlabelled, strict=True)
            yield from (self._mixed(*pair) for pair in pairs)

    def _unlabelled_batches(
        self, epoch: int, start: int, last: int
    ) -> Generator[Batch, None, None]:
        """The unlabelled part of each minibatch, on the current stream."""
        device, labels = self.world.device, self.unlabelled.labels
        for _, _, share in shares_of_epochs(self.stream, epoch, start, last):
            pseudo_labels = torch.from_numpy(labels[share.rows])
            if self.marks:
                pseudo_labels = ~pseudo_labels
            yield Batch(
                self._pixels(share),
                pseudo_labels.to(device, non_blocking=True),
                share.global_size,
                ~torch.from_numpy(share.rows),
            )

    def _pixels(self, share: Share) -> Tensor:
        """The images of a share on the training device, cropped and mirrored as --augment says.

        The epoch of the draws is always 0: the walk is in the keys.
        """
        pool, config = self.unlabelled.images, self.config
        images = pool[torch.from_numpy(share.rows).to(pool.device, non_blocking=True)]
        images = images.to(self.world.device, non_blocking=True)
        if config.augment not in ("pad-crop-flip", "pad-crop"):
            return images
        padding, slots = config.crop_padding, np.arange(len(images))
        padded, flip = pad_images(images, padding), config.augment == "pad-crop-flip"
        return random_crop_flip(padded, slots, share.keys, padding, config.seed, 0, flip=flip)

    def _mixed(self, labelled: Batch, unlabelled: Batch) -> Batch:
        """Both in one minibatch."""
        order = torch.from_numpy(evenly_mixed(len(labelled.labels), len(unlabelled.labels)))
        on_device = order.to(labelled.images.device, non_blocking=True)
        return Batch(
            torch.cat([labelled.images, unlabelled.images])[on_device],
            torch.cat([labelled.labels, unlabelled.labels])[on_device],
            labelled.global_size + unlabelled.global_size,
            torch.cat([labelled.indices, unlabelled.indices])[order],
        )


def evenly_mixed(num_first: int, num_second: int) -> Ints:
    """Rows of two lists, one behind the other, in an order with the second's at equal distances.

    Any stretch of the order has its share of the second list, to within one row.

    Returns:
        (num_first + num_second,) int64, each list's rows in their own order.
    """
    total = num_first + num_second
    is_second = np.diff(np.arange(total + 1) * num_second // total) == 1
    order = np.empty(total, np.int64)
    order[~is_second] = np.arange(num_first)
    order[is_second] = num_first + np.arange(num_second)
    return order
