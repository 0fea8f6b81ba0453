"""The images of an evaluation: the same ones on every rank, and complaints that name its flags."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from freeadv_fast.config.presets import CPU_CLEAN_SIDE
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.agreement import refuse_different_data, roll_of
from freeadv_fast.data.build import build_folder_loader, build_val_loader
from freeadv_fast.data.folder import FolderLoader
from freeadv_fast.data.index import TooManyBad
from freeadv_fast.data.loader import Loader
from freeadv_fast.data.view import AS_CONFIGURED, View
from freeadv_fast.distributed.world import World
from freeadv_fast.errors import UserError, blaming

AnyLoader = TypeVar("AnyLoader", bound=Loader)


def open_val(
    config: TrainConfig, world: World, num_images: int | None, view: View = AS_CONFIGURED
) -> Loader:
    """Opens the validation images of `config` on every rank, see `build_val_loader`.

    Raises:
        UserError: on every rank; anything wrong with the data, or others on some rank.
    """
    place = f"--data {config.data}: val"
    return _agreed(
        place, "--data", world, lambda: build_val_loader(config, world, num_images, view)
    )


def open_folder(
    flag: str, folder: Path, config: TrainConfig, world: World, num_images: int | None
) -> FolderLoader:
    """Opens a folder of one folder a class on every rank, see `build_folder_loader`.

    Args:
        flag: What the user typed the folder after.
        folder: The folder.
        config: Gives image size, resize, batch size and workers.
        world: This process among the others.
        num_images: Images to read over all ranks; None for all.

    Raises:
        UserError: on every rank; anything wrong with the data, or others on some rank.
    """
    return _agreed(
        f"{flag} {folder}",
        flag,
        world,
        lambda: build_folder_loader(folder, config, world, num_images),
    )


def whole_val_loader(
    config: TrainConfig, world: World, view: View = AS_CONFIGURED
) -> Loader | None:
    """All validation images, for a clean accuracy that hangs on no choice of images to attack.

    None where that is no other set than the attacked one, and where it would take hours: images
    of more than `CPU_CLEAN_SIDE` pixels without a GPU.
    """
    is_cheap = world.device.type == "cuda" or config.image_size <= CPU_CLEAN_SIDE
    if config.eval_images is None or not is_cheap:
        return None
    return build_val_loader(config, world, None, view)


def other_classes(data: str, loader: Loader, num_classes: int) -> str:
    """The complaint about data of other classes than the network's."""
    return (
        f"--data {data}: its {len(loader.classes)} classes are not the {num_classes} that the "
        "network was trained on"
    )


def _agreed(place: str, flag: str, world: World, build: Callable[[], AnyLoader]) -> AnyLoader:
    """Builds a loader on every rank, and compares what they found.

    Args:
        place: The data in a complaint about other ranks. flag: What named them.
        world: This process among the others.
        build: Builds this rank's.
    """

    def build_own() -> AnyLoader:
        with blaming(f"rank {world.rank}" if world.rank else None), _flagged(flag):
            return build()

    loader = world.together(build_own)
    if world.size > 1:
        refuse_different_data({place: roll_of(loader)}, world)
    return loader


@contextlib.contextmanager
def _flagged(flag: str) -> Iterator[None]:
    """Names the evaluation's own flag where the data's complaint names one of training.

    Raises:
        UserError: the one that was raised within the block, in other words.
    """
    try:
        yield
    except TooManyBad as error:
        raise UserError(
            f"{flag}: {error.found}; repair or remove them, for an evaluation leaves out no more "
            f"than {error.max_bad_fraction:.2%}"
        ) from None
    except UserError as error:
        rest = str(error).removeprefix("--data: ")
        raise error if rest == str(error) else UserError(f"{flag}: {rest}") from None
