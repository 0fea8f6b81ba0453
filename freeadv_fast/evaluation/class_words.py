"""Words for ImageNet's folders: n01440764 is a tench."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

WNID = re.compile(r"n\d{8}")
# Kaggle's table lies beside ILSVRC/, three floors above ILSVRC/Data/CLS-LOC/train.
SYNSET_FILE, FLOORS_ABOVE = "LOC_synset_mapping.txt", 3


def class_words(classes: Sequence[str], data: str) -> list[str]:
    """Class names for people: words for WordNet's ids, all other names as they are.

    The words are those of Kaggle's LOC_synset_mapping.txt where it lies beside the data, and else
    those that timm brings with it, which go by the id. (torchvision's go by the index among all
    1,000 classes, and would be wrong for a part of them.)

    Args:
        classes: Names of the class folders.
        data: What ``--data`` says.
    """
    if not any(map(WNID.fullmatch, classes)):
        return list(classes)
    return worded(classes, words_beside(Path(data)) or words_of_timm())


def worded(classes: Sequence[str], words: Mapping[str, str]) -> list[str]:
    """The first word of each class that has any; two classes of one word keep their ids beside it.

    ImageNet has two cranes and two maillots.
    """
    short = [words.get(name, name).split(",")[0].strip() or name for name in classes]
    return [
        word if short.count(word) == 1 else f"{word} {name}"
        for word, name in zip(short, classes, strict=True)
    ]


def words_beside(data: Path) -> dict[str, str]:
    """Kaggle's table of a folder or of one above it: ``n01440764 tench, Tinca tinca`` a line."""
    folder = data.absolute()
    for place in (folder, *list(folder.parents)[:FLOORS_ABOVE]):
        try:
            lines = (place / SYNSET_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        return {wnid: words for wnid, _, words in (line.partition(" ") for line in lines)}
    return {}


def words_of_timm() -> dict[str, str]:
    """timm's words for the classes of ImageNet-22k, ImageNet-1k's among them."""
    # A quarter of a second that most runs need not spend.
    from timm.data.imagenet_info import ImageNetInfo

    known = ImageNetInfo("imagenet-22k")
    names: list[str] = known.label_names()  # type: ignore[no-untyped-call]
    return {name: known.label_name_to_description(name) for name in names}
