"""What an evaluation was asked for, and what stands where nothing was said."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from freeadv_fast.config.attack import Attack, passes
from freeadv_fast.config.choices import Norm
from freeadv_fast.config.presets import CPU_EVAL_ATTACKS, CPU_EVAL_IMAGES
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.data.view import View
from freeadv_fast.distributed.world import World
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.candidate import Candidate

# Data whose images have one size and are not resized.
SMALL_DATA, SMALL_SIDE = ("cifar10", "cifar100", "svhn", "digits"), 32
# What a network is attacked with of which no run says it.
NETWORK_ATTACKS = ("pgd-50",)


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the user asked for.

    Attributes:
        chosen: Fields of a config; None where the user left them to the subject.
        view: Which images, and how they are seen.
        output_dir: Where the evaluation is written; None for the run's folder.
    """

    chosen: dict[str, Any]
    view: View
    output_dir: Path | None


def names_of(attacks: Sequence[Attack | str] | str) -> tuple[str, ...]:
    """Attacks by name; a misspelt one is refused before anything is loaded."""
    listed = attacks.split(",") if isinstance(attacks, str) else attacks
    return tuple(str(Attack.parse(attack, "--attacks")) for attack in listed)


def refuse_still_attacks(chosen: Mapping[str, Any]) -> None:
    """Refuses attacks that cannot move an image.

    Raises:
        UserError: radius or step is 0.
    """
    if chosen["eps"] is not None and chosen["eps"].levels == 0:
        raise UserError("--eps 0: an attack needs a radius above 0, such as 4/255")
    if chosen["eval_step"] is not None and chosen["eval_step"].levels == 0:
        raise UserError(
            "--step 0: an attack that stands still; give a step above 0, or leave it out"
        )


def made_folder(folder: Path) -> Path:
    """A folder, made if missing.

    Raises:
        UserError: it cannot be made.
    """
    folder = folder.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: {error.strerror or error}") from None
    return folder


def config_for(
    candidate: Candidate,
    chosen: dict[str, Any],
    image_size: int | None,
    norm: Norm | None,
    view: View,
) -> TrainConfig:
    """What is asked of a candidate, as a config of pixels in [0, 1].

    Args:
        candidate: The network. chosen: Fields of a config.
        image_size: Side of the images in pixels, if it was typed. norm: Of the ball, likewise.
        view: Of the images.

    Raises:
        UserError: an image size beside a preprocessing that has its own.
    """
    is_small = chosen["data"].partition(":")[0] in SMALL_DATA
    usual = SMALL_SIDE if is_small else TrainConfig.image_size
    side = image_size or candidate.image_size or usual
    resize = side if is_small else None
    if image_size is None and candidate.resize_size is not None:
        resize = candidate.resize_size
    if view.way is not None:
        resize = 0
        if view.way.image_size is not None:
            if image_size not in (None, view.way.image_size):
                raise UserError(
                    f"--image-size {image_size}: --preprocessing {view.preprocessing} makes images "
                    f"of {view.way.image_size} pixels; leave it out"
                )
            side = view.way.image_size
    return TrainConfig(
        method="pgd",  # it reads the norm
        m=1,
        data=chosen["data"],
        norm=norm or candidate.norm or TrainConfig.norm,
        eps=chosen["eps"],
        eval_step=chosen["eval_step"] or Perturbation(chosen["eps"].levels / 4),
        eval_attacks=chosen["eval_attacks"] or NETWORK_ATTACKS,
        eval_images=chosen["eval_images"],
        image_size=side,
        resize_size=resize,
        augment="none",
        normalization="none",
    )


def scale_step(chosen: dict[str, Any], config: TrainConfig, world: World) -> None:
    """The run's step in proportion to another radius: 20 of its own may not cross a larger ball."""
    eps = chosen["eps"]
    if eps is None or chosen["eval_step"] is not None or not config.eps.levels:
        return
    step = Perturbation(config.eval_step.levels * eps.levels / config.eps.levels)
    if step != config.eval_step:
        chosen["eval_step"] = step
        if world.is_main:
            print(f"for --eps {eps}: --step {step}", flush=True)


def limit_without_gpu(
    chosen: dict[str, Any],
    attacks: Sequence[str],
    world: World,
    view: View,
    doing: str = "attacking",
) -> None:
    """Without a GPU, what nobody chose is one PGD-20 on at most 400 images.

    A detector is evaluated on these alone.

    Args:
        chosen: What the user chose; completed.
        attacks: Those that are made otherwise; they stay where they cost no more.
        world: Its rank 0 says what was limited.
        view: A list of images is a choice.
        doing: What is done with no more images, in words.
    """
    said = []
    if chosen["eval_attacks"] is None and passes(attacks) > passes(CPU_EVAL_ATTACKS):
        chosen["eval_attacks"] = CPU_EVAL_ATTACKS
        named, full = ",".join(CPU_EVAL_ATTACKS), ",".join(attacks)
        said.append(f"no GPU: {named} instead of {full}; --attacks chooses others")
    if chosen["eval_images"] is None and view.image_list is None:
        chosen["eval_images"] = CPU_EVAL_IMAGES
        said.append(f"no GPU: {doing} at most {CPU_EVAL_IMAGES} images; more: --eval-images N")
    if world.is_main and said:
        print("\n".join(said), flush=True)
