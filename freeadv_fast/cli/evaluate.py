"""The flags of launch/evaluate.py, and what it does with them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from freeadv_fast.config.choices import Norm
from freeadv_fast.evaluation.audit.run import audit_run, refuse_unaudited
from freeadv_fast.evaluation.candidate import refuse_unread
from freeadv_fast.evaluation.page import refresh_page
from freeadv_fast.evaluation.subject import evaluate
from freeadv_fast.runs.saved import is_run

# What an evaluation reads and an audit does not.
NOT_OF_AUDITS = (
    "norm", "image_list", "preprocessing", "image_size", "arch", "mean", "std", "output_dir",
    "corruptions",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class EvaluateFlags:
    """Evaluates a run or any other network, and writes evaluation-*.json into a run's folder."""

    subject: tyro.conf.Positional[str]
    """A run's folder; an export's folder; a file of weights (torchvision's, timm's, RobustBench's,
    MadryLab's, ours), read without running code; or module:function, called without arguments,
    that builds a network of pixels in [0, 1]. All but runs need --data and --eps."""
    attacks: str | None = None
    """Such as pgd-50,cw-50, pgd-20-10 (10 restarts), autoattack. Default: the run's, or pgd-50."""
    eps: str | None = None
    """Radius of the perturbation, such as 4/255. Default: the run's."""
    step: str | None = None
    """Step of the attacks, such as 1/255. Default: the run's, in proportion to eps, or eps / 4."""
    eval_images: int | None = None
    """Validation images to attack; a detector is evaluated on these alone. Default: as the run, or
    all."""
    corruptions: str | None = None
    """Corruptions under which a detector is evaluated too: all (the 15 of COCO-C at five
    severities), or such as fog,snow-3 (one severity). Default: none."""
    norm: Norm | None = None
    """Of the ball of what is no run. Default: as the run that an export or a checkpoint is of was
    trained, and linf."""
    data: str | None = None
    """Other validation images, as the training script's --data."""
    image_list: str | None = None
    """Evaluate these images of a folder: a file with CLASS/FILE a line, such as RobustBench's
    imagenet_test_image_ids.txt. Default: all."""
    preprocessing: str | None = None
    """How a folder's images are made the network's size, by RobustBench's names: Res256Crop224,
    BicubicRes256Crop224, Crop288, Res224 or none. Default: as the run or the export, or
    Res256Crop224's in proportion to --image-size."""
    image_size: int | None = None
    """Side of the images that a network takes which is no run's. Default: an export's own, 32 for
    CIFAR, SVHN and digits, 224 for folders."""
    arch: str | None = None
    """The network whose weights a file holds, as the training script's --arch."""
    mean: str | None = None
    """Per-channel mean, such as 0.485,0.456,0.406, of the normalisation before a file's network.
    Default: the file's own, which goes first; the library's for a folder, CIFAR's for CIFAR."""
    std: str | None = None
    """Per-channel standard deviation, likewise."""
    output_dir: str | None = None
    """Folder of evaluation-*.json. Default: the run's; none where there is no run."""
    checkpoint: str = "last"
    """last (the run's result), best (by held-out images), average, or a path."""
    audit: bool = False
    """Ask what broken defences fail: nine checks, a table, audit.json in the run's folder. Without
    --attacks nothing else is evaluated."""


def run_evaluation(flags: EvaluateFlags) -> int:
    """Does what launch/evaluate.py was asked for; returns its exit status.

    Raises:
        UserError: as `evaluate` and `audit_run`.
    """
    if flags.audit:  # an evaluation may take hours
        refuse_unaudited(flags.subject)
        unread = {name: getattr(flags, name) for name in NOT_OF_AUDITS}
        refuse_unread(unread, "an audit does not read it")
    if flags.attacks is not None or not flags.audit:
        evaluate_as(flags)
        refresh_page(written_folder(flags))
    if flags.audit:
        chosen = {"data": flags.data, "eps": flags.eps, "step": flags.step}
        audit_run(
            flags.subject, **chosen, num_images=flags.eval_images, checkpoint=flags.checkpoint
        )
        refresh_page(flags.subject)
    return 0


def written_folder(flags: EvaluateFlags) -> Path:
    """Where an evaluation was written, if it was: beside a run's result, as an export's in it."""
    if flags.output_dir is not None:
        return Path(flags.output_dir)
    subject = Path(flags.subject).expanduser()
    return subject if is_run(subject) else subject.resolve().parent


def evaluate_as(flags: EvaluateFlags) -> None:
    """Evaluates what the flags name, as they say."""
    evaluate(
        flags.subject,
        data=flags.data,
        attacks=flags.attacks,
        eps=flags.eps,
        step=flags.step,
        num_images=flags.eval_images,
        checkpoint=flags.checkpoint,
        norm=flags.norm,
        image_size=flags.image_size,
        arch=flags.arch,
        mean=flags.mean,
        std=flags.std,
        preprocessing=flags.preprocessing,
        image_list=flags.image_list,
        output_dir=flags.output_dir,
        corruptions=flags.corruptions,
    )
