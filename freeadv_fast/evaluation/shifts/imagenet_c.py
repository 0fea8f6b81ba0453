"""ImageNet-C: its corruptions and folders, and the two numbers that are called corruption error.

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.shifts.corruptions import SEVERITIES

# The published archives, in the paper's order. "extra" holds the four that are not in the mean.
IMAGENET_C = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
}

# AlexNet's error on ImageNet-C, the mean of its five severities: the list of the authors' code
# (google-research/augmix, imagenet.py, ALEXNET_ERR), taken from hendrycks/robustness. The
# published corruption error divides sums over severities, which is the same.
ALEXNET_ERROR = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
IMAGENET_CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class CorruptionErrors:
    """How often a network is wrong on corrupted images.

    Attributes:
        errors: Corruption's name to severity (1..5) to error, a fraction of the images.
        averaged: Corruptions that `mean_error` is over: the complete ones of those that belong
            in the set's mean.
        num_in_full_mean: Corruptions that belong in it: 15 for ImageNet-C.
        num_images: Images of a corruption and severity, the most that any had.
        seconds: Wall time of the evaluations.
        remarks: What is missing, partial or unusual, a line each.
        clean_error: Error on the same images without corruption; None where it was not measured.
    """

    errors: dict[str, dict[int, float]]
    averaged: tuple[str, ...]
    num_in_full_mean: int
    num_images: int
    seconds: float
    remarks: tuple[str, ...] = ()
    clean_error: float | None = None

    @property
    def corruption_errors(self) -> dict[str, float]:
        """Each corruption's error, the mean over the severities that were measured."""
        return {name: statistics.fmean(row.values()) for name, row in self.errors.items()}

    @property
    def mean_error(self) -> float | None:
        """Unnormalised mean over `averaged`; None when no corruption is complete.

        With all 15 of ImageNet-C this is what the Fast AdvProp paper calls mCE. (Its code averages
        19, the four extra ones included; we follow the paper.)
        """
        return _mean_over(self.averaged, self.corruption_errors)

    @property
    def is_full(self) -> bool:
        """Whether the means are over all the corruptions that belong in them."""
        return len(self.averaged) == self.num_in_full_mean


def alexnet_normalized(measured: CorruptionErrors) -> dict[str, float]:
    """CE_c = sum_s E(s, c) / sum_s E_AlexNet(s, c) of each complete corruption of ImageNet-C."""
    errors = measured.corruption_errors
    return {name: errors[name] / ALEXNET_ERROR[name] for name in measured.averaged}


def _mean_over(names: Collection[str], values: Mapping[str, float]) -> float | None:
    """Mean of the named values; None for no names."""
    return statistics.fmean(values[name] for name in names) if names else None


def describe_means(measured: CorruptionErrors) -> tuple[dict[str, float | None], list[str]]:
    """Both means under names that say what they are.

    The Fast AdvProp paper calls the unnormalised one mCE; everybody else the normalised one. Over
    fewer than the 15 corruptions neither is comparable, so their names begin with ``partial``.

    Returns:
        Key to mean, for a file; and the lines to print.
    """
    plain = measured.mean_error
    normalized = _mean_over(measured.averaged, alexnet_normalized(measured))
    prefix = "" if measured.is_full else "partial_"
    record = {
        f"{prefix}mean_corruption_error_unnormalized": plain,
        f"{prefix}mce_alexnet_normalized": normalized,
    }
    if plain is None or normalized is None:
        return record, ["no corruption is complete: no mean"]
    if measured.is_full:
        return record, [
            f"mean corruption error, unnormalised (as in Fast AdvProp): {plain:.1%}",
            f"mCE, normalised by AlexNet (Hendrycks and Dietterich): {normalized:.1%}",
        ]
    share = f"over {len(measured.averaged)} of {measured.num_in_full_mean} corruptions"
    return record, [
        f"mean error {share}, unnormalised, not the published mean: {plain:.1%}",
        f"mean error {share}, normalised by AlexNet, not the mCE: {normalized:.1%}",
    ]


def find_corruptions(root: Path) -> dict[str, dict[int, Path]]:
    """Finds the folders of ImageNet-C that are there.

    Args:
        root: Holds CORRUPTION/SEVERITY/CLASS/, or GROUP/CORRUPTION/SEVERITY/CLASS/ as the
            archives unpack side by side.

    Returns:
        Corruption's name, in the order of `IMAGENET_C`, to severity to folder. Folders without a
        class folder in them are left out.

    Raises:
        UserError: no such folder, or no corruption in it.
    """
    places = [root, *subfolders("--imagenet-c", root)]
    found: dict[str, dict[int, Path]] = {}
    for name in (name for names in IMAGENET_C.values() for name in names):
        for severity in SEVERITIES:
            for place in places:
                folder = place / name / str(severity)
                if folder.is_dir() and subfolders("--imagenet-c", folder):
                    found.setdefault(name, {}).setdefault(severity, folder)
    if not found:
        raise UserError(
            f"--imagenet-c {root}: no corruption in it; it must hold CORRUPTION/SEVERITY/CLASS/, "
            "such as gaussian_noise/1/n01440764/"
        )
    return found


def subfolders(flag: str, folder: Path) -> list[Path]:
    """The folders in a folder, sorted.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: no such folder")
    return sorted(entry for entry in folder.iterdir() if entry.is_dir())


def find_gaps(
    contents: Mapping[str, Mapping[int, tuple[int, int]]], num_classes: int
) -> dict[str, str]:
    """What each incomplete corruption lacks, as text.

    Args:
        contents: Corruption's name to severity to its numbers of classes and of images.
        num_classes: Classes of the network.
    """
    fullest = max(images for row in contents.values() for _, images in row.values())
    gaps = {}
    for name, row in contents.items():
        lacks = [f"no severity {severity}" for severity in SEVERITIES if severity not in row]
        for severity, (classes, images) in row.items():
            if classes < num_classes:
                lacks.append(f"{classes:,} of {num_classes:,} classes at {severity}")
            elif images < fullest:
                lacks.append(f"{images:,} of {fullest:,} images at {severity}")
        if lacks:
            gaps[name] = "; ".join(lacks)
    return gaps


def describe_gaps(
    measured: Collection[str], gaps: Mapping[str, str], unreadable: Sequence[str], num_classes: int
) -> tuple[str, ...]:
    """What keeps the numbers from being the published ones, a line each kind.

    Args:
        measured: Corruptions of which something was measured.
        gaps: What `find_gaps` found.
        unreadable: Folders that were left out, with the reason.
        num_classes: Classes of the network.
    """
    lists = {
        "missing": [name for name in ALEXNET_ERROR if name not in measured],
        "partial": [f"{name} ({gap})" for name, gap in gaps.items()],
        "unreadable": unreadable,
    }
    lines = [f"{kind}: {', '.join(names)}" for kind, names in lists.items() if names]
    if num_classes != IMAGENET_CLASSES:
        lines.append(
            f"the network knows {num_classes:,} classes, AlexNet's errors are of "
            f"{IMAGENET_CLASSES:,}: what they normalise compares with no published number"
        )
    return tuple(lines)
