"""The folders that a user names: whether they hold classes that the network knows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from freeadv_fast.data.index import shortened
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.shifts.imagenet_c import find_corruptions, subfolders


def look_at_folders(
    known: Sequence[str],
    imagenet_c: str | Path | None,
    imagenet_r: str | Path | None,
    stylized: str | Path | None,
) -> dict[str, dict[int, Path]]:
    """Finds ImageNet-C's folders and checks that the network knows the classes of all sets.

    Returns:
        What `find_corruptions` does; empty without ImageNet-C.

    Raises:
        UserError: missing or empty folder, or unknown classes.
    """
    corruptions = find_corruptions(Path(imagenet_c)) if imagenet_c is not None else {}
    for folders in corruptions.values():
        for folder in folders.values():
            _check_classes("--imagenet-c", folder, known)
    if imagenet_r is not None:
        _check_classes("--imagenet-r", Path(imagenet_r), known)
    if stylized is not None:
        _check_classes("--stylized", stylized_classes(stylized), known)
    return corruptions


def stylized_classes(root: str | Path) -> Path:
    """Where the class folders of Stylized-ImageNet's validation images are."""
    val = Path(root) / "val"
    return val if val.is_dir() else Path(root)


def _check_classes(flag: str, folder: Path, known: Sequence[str]) -> None:
    """Raises UserError where a folder holds no classes, or some that the network does not know."""
    classes = [entry.name for entry in subfolders(flag, folder)]
    if not classes:
        raise UserError(f"{flag} {folder}: no class folders in it; it must hold one a class")
    refuse_unknown(f"{flag} {folder}", classes, known)


def refuse_unknown(what: str, classes: Sequence[str], known: Sequence[str]) -> None:
    """Raises UserError where some of the classes are none of the network's."""
    unknown = sorted(set(classes) - set(known))
    if unknown:
        raise UserError(
            f"{what}: {len(unknown)} of its {len(classes)} classes are none of the {len(known)} "
            f"that the network was trained on: {shortened(unknown)}; leave them out, or evaluate "
            "a network that knows them"
        )
