"""Makes a smaller copy of an ImageFolder, so that training at low resolution decodes fewer bytes.

    python -m freeadv_fast.data.resize /imagenet /imagenet-160 --size 160

Wong et al. 2020, "Fast is better than free", train ImageNet on such copies: shorter side 160 for
crops of 128 px, 352 for 224 px, the original files for 288 px.

Every file is written beside its name and renamed, so that a name never stands for half an image;
the same command after an interruption goes on where it stopped.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image
from tqdm import tqdm

from freeadv_fast.data.headers import BadImage, inspect_image
from freeadv_fast.data.index import is_image_name
from freeadv_fast.errors import UserError
from freeadv_fast.runs.log import read_json, write_json
from freeadv_fast.runs.whole_file import renamed_when_whole

SPLITS = ("train", "val")
SETTINGS = "resize.json"
BAD_LIST = "resize.bad.txt"
# A worker takes so many files at a time: about a second of work, so that the bar moves and Ctrl-C
# does not wait, and few enough messages between the processes.
PART_FILES = 64

Outcome = Literal["resized", "copied", "there already", "bad"]


class Resizing(NamedTuple):
    """What is done to every image.

    Attributes:
        source: Folder that holds train/ and val/. target: Folder of the copy.
        size: Shorter side of the copies in pixels.
        quality: JPEG quality of the copies, 1 to 100.
    """

    source: Path
    target: Path
    size: int
    quality: int

    @property
    def settings(self) -> dict[str, object]:
        """What a copy is made with, by flag; all its files must be made with the same."""
        source = str(self.source.resolve())
        return {"SOURCE": source, "--size": self.size, "--quality": self.quality}


class Report(NamedTuple):
    """What became of the images.

    Attributes:
        counts: Number of images by outcome.
        bad: Path relative to the source, and why the image has no copy.
    """

    counts: collections.Counter[Outcome]
    bad: dict[str, str]


def resize_folder(
    source: str | Path,
    target: str | Path,
    *,
    size: int,
    quality: int = 95,
    workers: int | None = None,
) -> Report:
    """Copies train/ and val/ with every image at a shorter side of at most `size` pixels.

    Class folders are the same, empty ones included. Copies are RGB JPEGs; one of a file that is
    not named so gets .jpg after its name. Images that are small enough are copied byte for byte.
    Files that are no whole JPEG or PNG are left out and listed in `BAD_LIST` in the target.

    Args:
        source: Folder that holds train/ and val/ with one folder a class in each.
        target: Folder of the copy: new, empty, or one that this function has begun.
        size: Shorter side in pixels, at least 8.
        quality: JPEG quality, 1 to 100.
        workers: Processes; as many as this process may use processors by default.

    Raises:
        UserError: a flag or a folder is wrong, the disk is full, or a worker was killed.
    """
    resizing = Resizing(Path(source), Path(target), size, quality)
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    refuse_bad_flags(resizing, workers)
    try:
        claim(resizing)
        files = list_images(resizing)
        counts: collections.Counter[Outcome] = collections.Counter()
        bad: dict[str, str] = {}
        with tqdm(total=len(files), unit=" images", disable=None, dynamic_ncols=True) as bar:
            for part in in_processes(resizing, files, workers):
                counts.update(part.counts)
                bad.update(part.bad)
                bar.update(part.counts.total())
        write_bad_list(resizing, bad)
    except OSError as error:
        raise UserError(f"TARGET {target}: {error}; the same command goes on from here") from None
    return Report(counts, bad)


def refuse_bad_flags(resizing: Resizing, workers: int) -> None:
    """Raises UserError for numbers and folders that cannot be meant."""
    if resizing.size < 8:
        raise UserError(f"--size {resizing.size}: must be at least 8 pixels")
    if not 1 <= resizing.quality <= 100:
        raise UserError(f"--quality {resizing.quality}: must be between 1 and 100")
    if workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    for split in SPLITS:
        if not (resizing.source / split).is_dir():
            raise UserError(
                f"SOURCE {resizing.source}: no {split}/ folder in it; an ImageFolder holds train/ "
                "and val/ with one folder a class in each"
            )
    if resizing.target.resolve().is_relative_to(resizing.source.resolve()):
        raise UserError(
            f"TARGET {resizing.target}: lies inside SOURCE, whose files it would mix with; "
            "choose a folder outside"
        )


def list_images(resizing: Resizing) -> list[str]:
    """Images of both splits, relative to the source; makes their folders in the target."""
    files = []
    for split in SPLITS:
        for place, _, names in os.walk(resizing.source / split, followlinks=True):
            inside = os.path.relpath(place, resizing.source)
            (resizing.target / inside).mkdir(parents=True, exist_ok=True)
            files += [os.path.join(inside, name) for name in sorted(names) if is_image_name(name)]
    return files


def claim(resizing: Resizing) -> None:
    """Makes the target and notes size and quality in it; a resumed copy must have the same.

    Raises:
        UserError: the target holds something else, or copies of another size or quality.
    """
    settings, path = resizing.settings, resizing.target / SETTINGS
    resizing.target.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if any(resizing.target.iterdir()):
            raise UserError(f"TARGET {resizing.target}: holds other files; choose a new folder")
        write_json(path, settings)
    for flag, begun in read_json(path).items():
        if begun != settings[flag]:
            raise UserError(
                f"{flag} {settings[flag]}: {resizing.target} was begun with {flag} {begun}; "
                "go on with that, or choose another TARGET"
            )


def in_processes(resizing: Resizing, files: list[str], workers: int) -> Iterator[Report]:
    """Resizes the files in parts; when anything fails, no further part is begun.

    Raises:
        UserError: a worker was killed.
    """
    # Not fork: the bar runs a thread, and a lock it holds at that moment would never be released.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["freeadv_fast.data"])
    # Ctrl-C reaches every process of the terminal; only this one answers. Workers inherit what is
    # blocked: one that ignored the signal only once it runs could die of it while it starts, and
    # the pool would kill the others in the middle of a file.
    resource_tracker.ensure_running()  # the fork server would start it, and it unblocks the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    pool = concurrent.futures.ProcessPoolExecutor(workers, context)
    parts = [files[start : start + PART_FILES] for start in range(0, len(files), PART_FILES)]
    try:
        yield from pool.map(functools.partial(resize_part, resizing), parts)
    except BrokenProcessPool:
        raise UserError(
            f"--workers {workers}: one of them was killed, most likely for want of memory; the "
            "same command with fewer goes on from here"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def resize_part(resizing: Resizing, files: Iterable[str]) -> Report:
    """Resizes some of the files, in a worker."""
    counts: collections.Counter[Outcome] = collections.Counter()
    bad = {}
    for file in files:
        try:
            counts[resize_file(resizing, file)] += 1
        except BadImage as reason:
            counts["bad"] += 1
            bad[file] = str(reason)
    return Report(counts, bad)


def resize_file(resizing: Resizing, file: str) -> Outcome:
    """Makes the copy of one image.

    Args:
        resizing: Folders, size and quality.
        file: Path relative to the source.

    Raises:
        BadImage: not a whole JPEG or PNG.
        OSError: the copy cannot be written.
    """
    source, same_name = resizing.source / file, resizing.target / file
    is_jpeg_name = file.lower().endswith((".jpg", ".jpeg"))
    # Appended, not replaced: 1.png and 1.jpg may lie side by side.
    jpeg_name = same_name if is_jpeg_name else same_name.with_name(same_name.name + ".jpg")
    if same_name.exists() or jpeg_name.exists():
        return "there already"
    height, width = inspect_image(str(source))
    shorter = min(height, width)
    if shorter <= resizing.size:
        with renamed_when_whole(same_name) as partial:
            shutil.copyfile(source, partial)
        return "copied"
    image = decode(source)
    # torchvision.transforms.Resize: the longer side is rounded down.
    scaled = (resizing.size * width // shorter, resizing.size * height // shorter)
    # PIL's bilinear filter widens with the reduction, which is what torchvision's antialias=True
    # does on tensors: a pixel of the copy is the mean of all it covers. Training sees the same
    # filter whether it resizes the original or this copy.
    image = image.resize(scaled, Image.Resampling.BILINEAR)
    with renamed_when_whole(jpeg_name) as partial:
        image.save(partial, "JPEG", quality=resizing.quality)
    return "resized"


def decode(path: Path) -> Image.Image:
    """The image as RGB, also where the file is grey, CMYK or has a palette.

    Raises:
        BadImage: PIL cannot decode it.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImage(f"cannot be decoded: {error}") from None


def write_bad_list(resizing: Resizing, bad: dict[str, str]) -> None:
    """Writes one line a bad file, path and reason; removes the list when there is none."""
    path = resizing.target / BAD_LIST
    if not bad:
        path.unlink(missing_ok=True)
        return
    lines = [f"{resizing.source / file}\t{reason}\n" for file, reason in sorted(bad.items())]
    with renamed_when_whole(path) as partial:
        partial.write_bytes(os.fsencode("".join(lines)))
