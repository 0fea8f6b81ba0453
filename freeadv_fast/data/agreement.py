"""The roll call at a run's start: every rank holds the same images under the same labels.

Ranks that differ in one file differ in the number of minibatches, and wait for each other for ever;
ranks that differ in a class's name train on wrong labels to the end.
"""

from __future__ import annotations

from typing import cast

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.build import OpenedData, open_data
from freeadv_fast.data.coco.loader import DetectionLoader
from freeadv_fast.data.folder import FolderLoader, roll_of_files
from freeadv_fast.data.loader import Loader
from freeadv_fast.data.resident import ResidentImages, ResidentLoader
from freeadv_fast.data.roll import Changes, Roll
from freeadv_fast.distributed.world import World
from freeadv_fast.errors import UserError, blaming


def open_together(config: TrainConfig, world: World) -> OpenedData:
    """Opens the data on every rank, and compares what they found.

    Args:
        config: The run. world: This process among the others.

    Raises:
        UserError: on every rank, in one line that names the rank where it is not rank 0's as well.
    """

    def open_own() -> OpenedData:
        with blaming(f"rank {world.rank}" if world.rank else None):
            return open_data(config, world)

    opened = world.together(open_own)
    if world.size > 1:
        refuse_different_data(opened.rolls(config), world)
    return opened


def roll_of(loader: Loader) -> Roll:
    """Which images the split of an evaluation's loader holds, however few of them it reads."""
    if isinstance(loader, FolderLoader):
        return roll_of_files(loader.index)
    if isinstance(loader, DetectionLoader):
        return loader.annotations.roll
    assert isinstance(loader, ResidentLoader)
    return ResidentImages(loader.images, loader.labels.numpy(), loader.classes).roll


def refuse_different_data(rolls: dict[str, Roll], world: World) -> None:
    """Compares the rolls of all ranks; all ranks together, with the same keys.

    Digests travel first; only where two differ does that rank send its names.

    Args:
        rolls: Of every split that the run reads, by what the user typed and the split's folder.
        world: This process among the others.

    Raises:
        UserError: on every rank; names the first rank and the first file that differ.
    """
    digests = world.gather_on_host([roll.digest for roll in rolls.values()])
    found = world.on_main(lambda: _first_difference(cast(list[list[str]], digests)))
    if found is None:
        return
    rank, number = found
    place, roll = list(rolls.items())[number]
    sent = world.gather_on_host(roll if world.rank == rank else None)

    def refuse() -> None:
        difference = describe_difference(roll, cast(Roll, sent[rank]), rank)
        raise UserError(f"{place}: {difference}; give every node the same images")

    world.on_main(refuse)


def _first_difference(digests: list[list[str]]) -> tuple[int, int] | None:
    """The first rank whose digests are not rank 0's, and the number of the split."""
    for rank, theirs in enumerate(digests):
        for number, (other, own) in enumerate(zip(theirs, digests[0], strict=True)):
            if other != own:
                return rank, number
    return None


def describe_difference(own: Roll, other: Roll, rank: int) -> str:
    """Words for the first difference of two rolls.

    Args:
        own: Rank 0's. other: Another one, that of `rank`.
    """
    if own.classes != other.classes:
        return _describe_classes(own.classes, other.classes, rank)
    changes = Changes.between(own, other)
    count = len(changes.left) + len(changes.came) + len(changes.altered)
    in_all = f" ({count:,} images differ in all)" if count > 1 else ""
    if changes.left:
        return _describe_lack(changes.left[0], rank, 0, other.bad) + in_all
    if changes.came:
        return _describe_lack(changes.came[0], 0, rank, own.bad) + in_all
    if not changes.altered:
        return f"rank {rank} lists the images in another order than rank 0"
    name = changes.altered[0]
    if own.stamp == "checksum":
        return f"{name} on rank {rank} is not that of rank 0{in_all}"
    there, here = (int(roll.stamps[roll.names.index(name)]) for roll in (other, own))
    return f"{name} has {there:,} bytes on rank {rank} and {here:,} on rank 0{in_all}"


def _describe_classes(own: list[str], other: list[str], rank: int) -> str:
    """Words for two lists of classes that differ."""
    lacks = [name for name in own if name not in other]
    extra = [name for name in other if name not in own]
    if lacks and extra:
        return f"rank {rank} has the class {extra[0]}, and lacks {lacks[0]} of rank 0"
    if lacks:
        return f"rank {rank} lacks the class {lacks[0]}, which rank 0 has"
    if extra:
        return f"rank 0 lacks the class {extra[0]}, which rank {rank} has"
    return f"rank {rank} has the classes in another order than rank 0"


def _describe_lack(name: str, lacking: int, having: int, bad: dict[str, str]) -> str:
    """Words for an image that one rank reads and another one does not."""
    if name in bad:
        return f"rank {lacking} leaves out {name} ({bad[name]}), which rank {having} reads"
    return f"rank {lacking} lacks {name}, which rank {having} has"
