"""All pictures of one run, or of several side by side, from their folders."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from freeadv_fast.config.presets import CPU_CLEAN_SIDE
from freeadv_fast.distributed.world import is_main_rank
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.class_words import class_words
from freeadv_fast.evaluation.evaluate import eval_mode, exact_arithmetic
from freeadv_fast.evaluation.pictures import curves as curve
from freeadv_fast.evaluation.pictures.large_eps import plot_large_eps
from freeadv_fast.evaluation.pictures.saliency import plot_saliency
from freeadv_fast.evaluation.pictures.subjects import Subject, choose, line_up
from freeadv_fast.evaluation.pictures.surface import plot_surfaces
from freeadv_fast.evaluation.sample import Sample, load_sample, lone_world
from freeadv_fast.runs.json_file import write_json
from freeadv_fast.runs.saved import SavedRun, load_run, refuse_detector
from freeadv_fast.runs.whole_file import renamed_when_whole

# Images of the curves, some 250 passes each: a minute of a ResNet-18 at 32 pixels on two cores.
GPU_IMAGES, CPU_IMAGES, CPU_LARGE_IMAGES = 500, 32, 8
NUM_SURFACES, NUM_COLUMNS = 2, 8


@dataclasses.dataclass(frozen=True)
class Album:
    """What the pictures are drawn of.

    Attributes:
        first: The run whose ball, seed and folder count.
        subjects: The networks.
        sample: Images of the curves, among which others are chosen.
        words: Class names for people.
    """

    first: SavedRun
    subjects: list[Subject]
    sample: Sample
    words: list[str]

    @property
    def folder(self) -> Path:
        """Where the pictures go."""
        return self.first.folder.plots


def draw_pictures(
    run_folders: Sequence[str | Path], *, checkpoint: str = "last", num_images: int | None = None
) -> list[Path]:
    """Draws the papers' pictures into the first run's ``plots/``.

    ``loss-surface.png``, ``large-eps.png``, ``saliency.png``, ``robustness-curves.png`` and its
    numbers, ``robustness-curves.json``. Radius, norm and seed are the first run's. Rank 0 draws.

    Args:
        run_folders: Runs of the same data; those after the first stand beside it.
        checkpoint: Of each run: ``last`` (its result), ``best`` (by held-out images), ``average``
            or a path.
        num_images: Validation images of the curves, evenly spaced; 500 by default, and 32 without
            a GPU, or 8 where they are large.

    Returns:
        The files written.

    Raises:
        UserError: no run, no such run or checkpoint, one of a detector, runs of different data, or
            eps 0.
    """
    if not is_main_rank():
        return []
    if not run_folders:
        raise UserError("RUN: give a run's folder, or several of the same data")
    if num_images is not None and num_images < 1:
        raise UserError(f"--eval-images {num_images}: must be at least 1")
    album = _open_album([load_run(folder, checkpoint) for folder in run_folders], num_images)
    album.folder.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        for subject in album.subjects:
            stack.enter_context(eval_mode(subject.network))
        stack.enter_context(exact_arithmetic(album.sample.images.device))
        return [path for draw in (_surface, _large_eps, _saliency, _curves) for path in draw(album)]


def _open_album(runs: Sequence[SavedRun], num_images: int | None) -> Album:
    """Loads the images that all runs are drawn on.

    Raises:
        UserError: as `draw_pictures`.
    """
    first, world = runs[0], lone_world()
    for run in runs:
        refuse_detector(
            run.config,
            f"RUN {run.folder.root}",
            "these pictures are of classifiers; its own are drawn where it is trained, in plots/",
        )
    if not first.config.eps.levels:
        raise UserError(f"RUN {first.folder.root}: its --eps is 0; pictures need a radius above 0")
    subjects = line_up(runs, world.device)
    if num_images is None:
        num_images = _default_images(first, on_gpu=world.device.type == "cuda")
    sample = load_sample(first.config, world, num_images, first.classes)
    return Album(first, subjects, sample, class_words(sample.classes, first.config.data))


def _default_images(run: SavedRun, *, on_gpu: bool) -> int:
    """Images of the curves; without a GPU few, and a line says so."""
    if on_gpu:
        return GPU_IMAGES
    is_small = run.config.image_size <= CPU_CLEAN_SIDE
    count = CPU_IMAGES if is_small else CPU_LARGE_IMAGES
    print(f"no GPU: curves of {count} images; more: --eval-images N", flush=True)
    return count


def _drawn(path: Path, draw: Callable[[Path], None]) -> Path:
    """Draws a picture whole or not at all, and says so."""
    started = time.perf_counter()
    with renamed_when_whole(path) as partial:
        draw(partial)
    print(f"wrote {path} in {time.perf_counter() - started:.1f} s", flush=True)
    return path


def _surface(album: Album) -> list[Path]:
    """Draws the loss around two images."""
    chosen = choose(album.sample, album.subjects, NUM_SURFACES)
    threat, seed = album.first.config.evaluation_threat, album.first.config.seed
    return [
        _drawn(
            album.folder / "loss-surface.png",
            lambda path: plot_surfaces(
                album.subjects, chosen, album.words, threat, path, seed=seed
            ),
        )
    ]


def _large_eps(album: Album) -> list[Path]:
    """Draws adversarial images at a large radius."""
    chosen = choose(album.sample, album.subjects, NUM_COLUMNS)
    threat, seed = album.first.config.evaluation_threat, album.first.config.seed
    return [
        _drawn(
            album.folder / "large-eps.png",
            lambda path: plot_large_eps(
                album.subjects, chosen, album.words, threat, path, seed=seed
            ),
        )
    ]


def _saliency(album: Album) -> list[Path]:
    """Draws gradients at the images."""
    chosen = choose(album.sample, album.subjects, NUM_COLUMNS)
    return [
        _drawn(
            album.folder / "saliency.png",
            lambda path: plot_saliency(album.subjects, chosen, album.words, path),
        )
    ]


def _curves(album: Album) -> list[Path]:
    """Draws accuracy over radius and steps, and writes its numbers beside it."""
    config, count = album.first.config, len(album.sample.labels)
    threat = config.evaluation_threat
    measured = [
        curve.measure(subject, album.sample, threat, seed=config.seed)
        for subject in tqdm(
            album.subjects, "curves", leave=False, unit="network", disable=not sys.stderr.isatty()
        )
    ]
    numbers = album.folder / "robustness-curves.json"
    write_json(numbers, curve.curves_record(measured, album.subjects, threat, count, config.seed))
    picture = album.folder / "robustness-curves.png"
    return [
        numbers,
        _drawn(picture, lambda path: curve.plot_curves(measured, threat, count, path)),
    ]
