"""Names and numbers as the page writes them."""

from __future__ import annotations

from pathlib import PurePath

from freeadv_fast.evaluation.page.files import is_number
from freeadv_fast.runs.log import duration

DASH = "\N{EN DASH}"

METHOD_TITLES = {
    "natural": "Natural training",
    "free": "Free adversarial training",
    "fgsm": "FGSM training",
    "fgsm-rs": "FGSM training from random starts",
    "n-fgsm": "N-FGSM training",
    "gradalign": "GradAlign training",
    "elle": "ELLE training",
    "pgd": "PGD training",
    "trades": "TRADES training",
    "free-trades": "Free TRADES training",
    "yopo": "YOPO training",
    "dat": "Distributed adversarial training",
    "advprop": "AdvProp training",
    "fast-advprop": "Fast AdvProp training",
}

DATA_TITLES = {
    "digits": "handwritten digits",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "svhn": "SVHN",
    "synthetic": "random pixels",
    "shapes": "synthetic shapes",
}

BALLS = {"linf": "L\N{INFINITY}", "l2": "L2"}

# A page is read in the second in which it says so; below this many, a tenth matters.
SECONDS_WITH_TENTHS = 60


def method_title(method: str) -> str:
    """A method in words; the name that the user typed where it has none."""
    return METHOD_TITLES.get(method, method)


def data_title(data: str) -> str:
    """A data set in words, without the path to it: ``cifar10:/data`` is CIFAR-10.

    Other sets than COCO itself come in COCO's layout, and go by their folder.
    """
    kind, _, folder = data.partition(":")
    if kind == "coco":
        data = folder
    return DATA_TITLES.get(kind) or PurePath(data).name or data


def corruption_title(name: str) -> str:
    """``jpeg_compression`` as people write it."""
    return name.replace("_", " ").replace("jpeg", "JPEG")


def percent(fraction: object) -> str:
    """``49.7%``; a dash of what is no number."""
    return f"{fraction:.1%}" if is_number(fraction) else DASH


def count(number: object) -> str:
    """``26,740``; a dash of what is no number."""
    return f"{number:,.0f}" if is_number(number) else DASH


def seconds(length: object) -> str:
    """``5.8 s``, ``1 min 20 s``, ``4 h 15 min``; a dash of what is no number."""
    if not is_number(length):
        return DASH
    return f"{length:.1f} s" if length < SECONDS_WITH_TENTHS else duration(length)


def size(num_bytes: int) -> str:
    """``512 B``, ``1.2 MB``."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes} B"


def plural(number: int, noun: str) -> str:
    """``1 restart``, ``2 restarts``."""
    return f"{number:,} {noun}" + "s" * (number != 1)
