"""Clean accuracy of a finished run on corrupted and shifted images, none of them attacked.

ImageNet-C (Hendrycks and Dietterich 2019), ImageNet-R (Hendrycks et al. 2021), Stylized-ImageNet
(Geirhos et al. 2019), and eight corruptions made on the fly. Each set leaves a JSON file beside
the run's result as soon as it is done.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from freeadv_fast.config.presets import CPU_EVAL_IMAGES
from freeadv_fast.distributed.world import World, joined_world
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.evaluate import Evaluation
from freeadv_fast.evaluation.page import refresh_page
from freeadv_fast.evaluation.shifts.folders import look_at_folders, stylized_classes
from freeadv_fast.evaluation.shifts.imagenet_c import CorruptionErrors
from freeadv_fast.evaluation.shifts.sets import (
    evaluate_imagenet_c,
    evaluate_imagenet_r,
    evaluate_on_the_fly,
    evaluate_stylized,
)
from freeadv_fast.evaluation.shifts.trial import Trial
from freeadv_fast.runs.saved import load_run, refuse_detector


@dataclasses.dataclass(frozen=True)
class Robustness:
    """What `evaluate_robustness` measured; None for a set that was not asked for."""

    imagenet_c: CorruptionErrors | None = None
    imagenet_r: Evaluation | None = None
    stylized: Evaluation | None = None
    on_the_fly: CorruptionErrors | None = None


def evaluate_robustness(
    run_folder: str | Path,
    *,
    imagenet_c: str | Path | None = None,
    imagenet_r: str | Path | None = None,
    stylized: str | Path | None = None,
    on_the_fly: bool = False,
    num_images: int | None = None,
    data: str | None = None,
    checkpoint: str = "last",
) -> Robustness:
    """Evaluates a run's network on corrupted and shifted sets.

    Prints a table and writes ``robustness-*.json`` and ``plots/robustness-*.png`` for each set, and
    the run's ``report.html`` anew.
    Under torchrun every rank calls this.

    Args:
        run_folder: The run's output folder.
        imagenet_c: Folder of ImageNet-C: CORRUPTION/SEVERITY/CLASS/, with or without the groups
            of its archives (noise/, blur/, ...) around.
        imagenet_r: Folder of CLASS/, classes among the run's: logits are restricted to them.
        stylized: Folder of CLASS/ or val/CLASS/, classes among the run's: all logits compete.
        on_the_fly: Corrupt the run's own validation images in memory.
        num_images: Images of each set, or of each corruption and severity, evenly spaced. Default:
            all; 400 without a GPU.
        data: Validation images to corrupt, as `--data`; the run's own by default.
        checkpoint: ``last`` (the run's result), ``best`` (by held-out images), ``average`` (of a
            run with --ema) or a path.

    Returns:
        The same numbers on every rank.

    Raises:
        UserError: nothing asked for, no such run, checkpoint or folder, a run of a detector, or
            classes that the network does not know.
    """
    if not (imagenet_c or imagenet_r or stylized or on_the_fly):
        raise UserError(
            "nothing to evaluate on: give --imagenet-c FOLDER, --imagenet-r FOLDER, "
            "--stylized FOLDER or --on-the-fly"
        )
    if num_images is not None and num_images < 1:
        raise UserError(f"--eval-images {num_images}: must be at least 1")
    with joined_world() as world:
        run = load_run(run_folder, checkpoint)
        refuse_detector(
            run.config,
            f"RUN {run_folder}",
            "these sets are for classifiers; use launch/evaluate.py RUN --corruptions all",
        )
        # Every folder is looked at before the first is evaluated, which can take hours.
        corruptions = world.together(
            lambda: look_at_folders(run.classes, imagenet_c, imagenet_r, stylized)
        )
        trial = Trial(run, world, _limited(num_images, world))
        measured = Robustness(
            imagenet_c=evaluate_imagenet_c(trial, imagenet_c, corruptions) if imagenet_c else None,
            imagenet_r=evaluate_imagenet_r(trial, Path(imagenet_r)) if imagenet_r else None,
            stylized=evaluate_stylized(trial, stylized_classes(stylized)) if stylized else None,
            on_the_fly=evaluate_on_the_fly(trial, data) if on_the_fly else None,
        )
        world.barrier()
        refresh_page(run.folder.root)
        return measured


def _limited(num_images: int | None, world: World) -> int | None:
    """The number of images; 400 on a machine without a GPU where the user chose none."""
    if num_images is not None or world.device.type == "cuda":
        return num_images
    if world.is_main:
        print(
            f"no GPU: at most {CPU_EVAL_IMAGES} images of each set, corruption and severity; "
            "--eval-images chooses another number",
            flush=True,
        )
    return CPU_EVAL_IMAGES
