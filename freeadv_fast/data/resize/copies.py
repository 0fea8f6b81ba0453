"""Makes a smaller copy of an ImageFolder, so that training at low resolution decodes fewer bytes.

    python -m freeadv_fast.data.resize /imagenet /imagenet-160 --size 160

Wong et al. 2020, "Fast is better than free", train ImageNet on such copies: shorter side 160 for
crops of 128 px, 352 for 224 px, the original files for 288 px.

Every file is written beside its name and renamed, so that a name never stands for half an image;
the same command after an interruption goes on where it stopped. A file that fails, whatever of, is
left out and listed, and the others are copied; phases leave it out of the original as well.
"""

from __future__ import annotations

import collections
import concurrent.futures
import errno
import functools
import io
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image
from tqdm import tqdm

from freeadv_fast.data.formats.picture_file import BadImage
from freeadv_fast.data.headers import inspect_image
from freeadv_fast.data.index import JPEG_EXTENSIONS, is_image_name
from freeadv_fast.data.names import class_folders, walk
from freeadv_fast.data.pixels import read_rgb
from freeadv_fast.data.verdict import first_line
from freeadv_fast.errors import UserError
from freeadv_fast.runs.json_file import read_json, write_json
from freeadv_fast.runs.whole_file import renamed_when_whole

SPLITS = ("train", "val")
SETTINGS = "resize.json"
BAD_LIST = "resize.bad.txt"
# A worker takes so many files at a time: about a second of work, so that the bar moves and Ctrl-C
# does not wait, and few enough messages between the processes.
PART_FILES = 64
# One file may be what killed its worker; so many in a row speak of the machine.
KILLED_IN_A_ROW = 3
# A copy's name that the target's file system cannot hold; other errors there are not the file's.
BAD_NAMES = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)

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
    Files that cannot be read or resized are left out and listed in `BAD_LIST` in the target.

    Args:
        source: Folder that holds train/ and val/ with one folder a class in each.
        target: Folder of the copy: new, empty, or one that this function has begun.
        size: Shorter side in pixels, at least 8.
        quality: JPEG quality, 1 to 100.
        workers: Processes; as many as this process may use processors by default.

    Raises:
        UserError: a flag or a folder is wrong, the disk is full, or workers are killed.
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
    """Images of both splits, relative to the source, as `index` finds them.

    Makes their folders in the target.
    """
    files = []
    for split in SPLITS:
        for place, names in folders_of(resizing.source / split):
            inside = os.path.relpath(place, resizing.source)
            (resizing.target / inside).mkdir(parents=True, exist_ok=True)
            files += [os.path.join(inside, name) for name in sorted(names) if is_image_name(name)]
    return files


def folders_of(split: Path) -> Iterator[tuple[str, list[str]]]:
    """The class folders of a split and those below them, and the names of the files in each.

    Raises:
        UserError: one of them cannot be read.
    """
    try:
        for name in class_folders(str(split))[0]:
            for place, names, _ in walk(os.path.join(split, name), str(split)):
                yield place, names
    except OSError as error:
        raise UserError(
            f"SOURCE {error.filename}: {error.strerror}; let this user read it"
        ) from None


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
    """Resizes the files; when anything but a file fails, no further part is begun.

    Raises:
        UserError: workers are killed, whatever they do.
    """
    start_fork_server()
    done = 0
    while done < len(files):
        try:
            for report in in_parts(resizing, files[done:], workers):
                done += report.counts.total()
                yield report
        except BrokenProcessPool:
            # A worker was killed, and the file that it was at is one of those under way.
            suspects = files[done : done + (workers + 1) * PART_FILES]
            for report in one_by_one(resizing, suspects):
                done += 1
                yield report


def start_fork_server() -> None:
    """Starts what forks the workers, deaf to Ctrl-C.

    Ctrl-C reaches every process of the terminal; only this one answers. Workers inherit what is
    blocked: one that ignored the signal only once it runs could die of it while it starts, and
    the pool would kill the others in the middle of a file.
    """
    context().set_forkserver_preload([__name__])
    resource_tracker.ensure_running()  # the fork server would start it, and it unblocks the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def context() -> ForkServerContext:
    """Not fork: the bar runs a thread, and a lock it holds then would never be released."""
    return multiprocessing.get_context("forkserver")


def in_parts(resizing: Resizing, files: list[str], workers: int) -> Iterator[Report]:
    """Resizes the files in parts.

    Raises:
        BrokenProcessPool: a worker was killed.
    """
    pool = concurrent.futures.ProcessPoolExecutor(workers, context())
    parts = [files[start : start + PART_FILES] for start in range(0, len(files), PART_FILES)]
    try:
        yield from pool.map(functools.partial(resize_part, resizing), parts)
    finally:
        pool.shutdown(cancel_futures=True)


def one_by_one(resizing: Resizing, files: list[str]) -> Iterator[Report]:
    """Resizes each file with no other one under way; what kills its worker is bad.

    Raises:
        UserError: too many in a row are killed.
    """
    killed: list[str] = []
    for file in files:
        try:
            (report,) = in_parts(resizing, [file], workers=1)
            killed.clear()
        except BrokenProcessPool:
            killed.append(file)
            reason = "cannot be resized: the process was killed, most likely for want of memory"
            report = Report(collections.Counter(["bad"]), {file: reason})
        if len(killed) == KILLED_IN_A_ROW:
            raise UserError(
                f"--workers: one alone was killed at {len(killed)} images in a row, from "
                f"{killed[0]} on, most likely for want of memory; the same command goes on from "
                "here"
            )
        yield report


def resize_part(resizing: Resizing, files: Iterable[str]) -> Report:
    """Resizes some of the files, in a worker."""
    counts: collections.Counter[Outcome] = collections.Counter()
    bad = {}
    for file in files:
        try:
            counts[resize_file(resizing, file)] += 1
        except (BadImage, OSError) as error:
            if isinstance(error, OSError) and error.errno not in BAD_NAMES:
                raise
            counts["bad"] += 1
            bad[file] = first_line(error)
    return Report(counts, bad)


def resize_file(resizing: Resizing, file: str) -> Outcome:
    """Makes the copy of one image.

    Args:
        resizing: Folders, size and quality.
        file: Path relative to the source.

    Raises:
        BadImage: it cannot be read or resized.
        OSError: the copy cannot be written.
    """
    same_name = resizing.target / file
    # Appended, not replaced: 1.png and 1.jpg may lie side by side.
    is_jpeg_name = file.lower().endswith(JPEG_EXTENSIONS)
    jpeg_name = same_name if is_jpeg_name else same_name.with_name(same_name.name + ".jpg")
    if same_name.exists() or jpeg_name.exists():
        return "there already"
    try:
        smaller = smaller_jpeg(resizing, file)
        content = (resizing.source / file).read_bytes() if smaller is None else smaller
    except BadImage:
        raise
    except Exception as error:  # whatever it is, it is this file's: the others are copied
        raise BadImage(f"cannot be resized: {first_line(error)}") from None
    with renamed_when_whole(same_name if smaller is None else jpeg_name) as partial:
        partial.write_bytes(content)
    return "copied" if smaller is None else "resized"


def smaller_jpeg(resizing: Resizing, file: str) -> bytes | None:
    """The copy of one image as a JPEG; None where it is small enough as it is."""
    source = str(resizing.source / file)
    height, width = inspect_image(source)
    shorter = min(height, width)
    if shorter <= resizing.size:
        return None
    # torchvision.transforms.Resize: the longer side is rounded down.
    scaled = (resizing.size * width // shorter, resizing.size * height // shorter)
    # PIL's bilinear filter widens with the reduction, which is what torchvision's antialias=True
    # does on tensors: a pixel of the copy is the mean of all it covers. Training sees the same
    # filter whether it resizes the original or this copy.
    image = read_rgb(source).resize(scaled, Image.Resampling.BILINEAR)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=resizing.quality)
    return content.getvalue()


def write_bad_list(resizing: Resizing, bad: dict[str, str]) -> None:
    """Writes one line a bad file, path and reason; removes the list when there is none."""
    path = resizing.target / BAD_LIST
    if not bad:
        path.unlink(missing_ok=True)
        return
    lines = [f"{resizing.source / file}\t{reason}\n" for file, reason in sorted(bad.items())]
    with renamed_when_whole(path) as partial:
        partial.write_bytes(os.fsencode("".join(lines)))
