"""An audit of a finished run: its images, all checks, a table, audit.json."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from freeadv_fast.config.presets import CPU_CLEAN_SIDE
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.threat import AnyThreatModel, Perturbation
from freeadv_fast.distributed.world import is_main_rank
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.asked import refuse_still_attacks, scale_step
from freeadv_fast.evaluation.attacks import is_correct, logits_of
from freeadv_fast.evaluation.audit import checks
from freeadv_fast.evaluation.audit.checks import Check, Trial
from freeadv_fast.evaluation.audit.surrogates import find_surrogates
from freeadv_fast.evaluation.evaluate import eval_mode, exact_arithmetic
from freeadv_fast.evaluation.sample import Sample, load_sample, lone_world
from freeadv_fast.evaluation.tables import results_table
from freeadv_fast.runs.environment import versions
from freeadv_fast.runs.json_file import write_json
from freeadv_fast.runs.log import duration
from freeadv_fast.runs.saved import SavedRun, is_run, load_run, refuse_detector

# Some 300 passes an image: two minutes of a ResNet-18 at 32 pixels on two cores; a GPU's seconds.
GPU_IMAGES, CPU_IMAGES, CPU_LARGE_IMAGES = 500, 50, 8
VERDICTS = {True: "pass", False: "FAIL", None: "not run"}
COLORS = {True: "\033[32m", False: "\033[1;31m", None: "\033[33m"}
PLAIN = "\033[0m"


def audit_run(
    run_folder: str | Path,
    *,
    data: str | None = None,
    eps: str | None = None,
    step: str | None = None,
    num_images: int | None = None,
    checkpoint: str = "last",
) -> list[Check]:
    """Audits a run, prints a table and writes ``audit.json`` into its folder.

    What fails is a finding and no error. Rank 0 works alone; the others return at once.

    Args:
        run_folder: The run's output folder.
        data: Validation images, as `--data`; the run's own by default.
        eps: Radius, such as ``4/255``; the run's own by default.
        step: Step of the attacks; by default the run's own in proportion to `eps`.
        num_images: Validation images, evenly spaced; 500 by default, and 50 without a GPU, or 8
            where they are large.
        checkpoint: ``last`` (the run's result), ``best``, ``average`` or a path.

    Returns:
        The checks; none on other ranks.

    Raises:
        UserError: no run, no such checkpoint, a detector, anything wrong with the data, data of
            other classes, radius 0, or a network that classifies none of the images right.
    """
    if not is_main_rank():
        return []
    started, world = time.perf_counter(), lone_world()
    refuse_unaudited(run_folder)
    run = load_run(run_folder, checkpoint)
    refuse_detector(run.config, f"--audit: {run_folder}", "its checks are for classifiers")
    chosen: dict[str, Any] = {
        "data": data,
        "eps": None if eps is None else Perturbation.parse(eps),
        "eval_step": None if step is None else Perturbation.parse(step, "--step"),
        "eval_images": num_images,
    }
    refuse_still_attacks(chosen)
    scale_step(chosen, run.config, world)
    chosen = {name: value for name, value in chosen.items() if value is not None}
    config = dataclasses.replace(run.config, **chosen)
    if not config.eps.levels:
        raise UserError("--eps 0: an audit needs a radius above 0; add --eps 4/255")
    if num_images is None:
        num_images = default_images(config, on_gpu=world.device.type == "cuda")
    sample = load_sample(config, world, num_images, run.classes)
    found = audit(
        run.network.to(world.device),
        sample,
        config.evaluation_threat,
        seed=config.seed,
        surrogates=find_surrogates(run),
        origin=f"--data {config.data}",
    )
    path = run.folder.root / "audit.json"
    write_json(path, _record(run, config, len(sample.labels), found))
    seconds = duration(time.perf_counter() - started)
    name = run.folder.root.resolve().name
    print(f"audit of {name}, {run.weights}, at eps {config.eps}: {len(sample.labels)} images, "
          f"{seconds}")  # fmt: skip
    print(audit_table(found, has_colors=sys.stdout.isatty()))
    print(f"wrote {path}", flush=True)
    return found


def refuse_unaudited(subject: str | Path) -> None:
    """Refuses to audit anything but a run.

    Raises:
        UserError: it is no run's folder.
    """
    if not is_run(subject):
        raise UserError(f"--audit: {subject} is no run's folder; only runs are audited")


def default_images(config: TrainConfig, *, on_gpu: bool) -> int:
    """Images of an audit; without a GPU few, and a line says so."""
    if on_gpu:
        return GPU_IMAGES
    count = CPU_IMAGES if config.image_size <= CPU_CLEAN_SIDE else CPU_LARGE_IMAGES
    print(f"no GPU: an audit of {count} images; more: --eval-images N", flush=True)
    return count


def audit(
    network: nn.Module,
    sample: Sample,
    threat: AnyThreatModel,
    *,
    seed: int = 0,
    surrogates: Mapping[str, nn.Module] | None = None,
    origin: str = "the images",
) -> list[Check]:
    """Asks all questions of a network, on those images that it classifies right.

    Args:
        network: Network of (n, 3, H, W) pixels in [0, 1]; its modes are restored.
        sample: Images on its device, and labels.
        threat: Ball and step of the accuracy in question.
        seed: Seed of starts, noise and searches.
        surrogates: Name to another network of pixels in [0, 1].
        origin: The images in a complaint.

    Raises:
        UserError: the network classifies no image right.
    """
    with eval_mode(network), exact_arithmetic(sample.images.device):
        logits = logits_of(network, sample.images, sample.at_once)
        is_right = is_correct(logits, sample.labels)
        if not is_right.any():
            raise UserError(
                f"{origin}: the network classifies none of {len(is_right)} images right; there is "
                "no robustness to audit"
            )
        trial = Trial(network, sample.rows(is_right), threat, seed)
        questions: list[Callable[[Trial], Check]] = [
            checks.has_slope,
            checks.is_deterministic,
            checks.one_step_is_weaker,
            checks.noise_is_weaker,
            checks.more_steps_do_not_matter,
            checks.restarts_do_not_matter,
            partial(checks.transfer_is_weaker, surrogates=surrogates or {}),
            # What PGD fools at all is known by now.
            checks.square_finds_nothing,
            checks.falls_without_bound,
        ]
        is_silent = not sys.stderr.isatty()
        bar = tqdm(questions, "audit", unit="check", leave=False, disable=is_silent)
        return [ask(trial) for ask in bar]


def audit_table(found: Sequence[Check], *, has_colors: bool = False) -> str:
    """A line a check, what each failure means below, and a last line with the verdict.

    Args:
        found: The checks.
        has_colors: For a terminal: green and red.
    """
    rows = [
        {"check": check.name, "verdict": VERDICTS[check.is_passed], "measured": check.measured}
        for check in found
    ]
    head, rule, *lines = results_table(rows).splitlines()
    if has_colors:
        for number, check in enumerate(found):
            word = VERDICTS[check.is_passed]
            colored = f"{COLORS[check.is_passed]}{word}{PLAIN}"
            at = lines[number].index(word, len(check.name))
            lines[number] = lines[number][:at] + colored + lines[number][at + len(word) :]
    failed = [check for check in found if check.is_passed is False]
    meanings = [f"FAIL {check.name}: {check.meaning}" for check in failed]
    return "\n".join([head, rule, *lines, *meanings, verdict(found)])


def verdict(found: Sequence[Check]) -> str:
    """One line: whether the robust accuracy can be believed."""
    failed = [check.name for check in found if check.is_passed is False]
    if failed:
        return (
            f"{len(failed)} of {len(found)} checks failed ({', '.join(failed)}): the robust "
            "accuracy is not to be trusted"
        )
    num_missing = sum(check.is_passed is None for check in found)
    missing = f", {num_missing} not run" if num_missing else ""
    return f"no check failed{missing}: nothing here speaks against the robust accuracy"


def _record(
    run: SavedRun, config: TrainConfig, num_images: int, found: Sequence[Check]
) -> dict[str, object]:
    """What audit.json holds.

    Args:
        run: The run. config: Its config, with what was chosen instead of its own.
        num_images: Images that were read; the checks are over those that are classified right.
        found: The checks.
    """
    return {
        "run": run.folder.root.name,
        "checkpoint": run.weights,
        "eps": str(config.eps),
        "norm": config.norm,
        "attack_step": str(config.eval_step),
        "data": config.data,
        "num_images": num_images,
        "seed": config.seed,
        "versions": versions(),
        "checks": [vars(check) for check in found],
    }
