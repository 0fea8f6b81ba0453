"""The corruptions of COCO-C by name, and the two numbers of its benchmark.

Source: Michaelis et al. 2019, "Benchmarking Robustness in Object Detection: Autonomous Driving when
Winter is Coming"; the corruptions are those of Hendrycks and Dietterich 2019, in their order.
"""

from __future__ import annotations

import difflib
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence

from freeadv_fast.errors import UserError

CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur",
    "zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate",
    "jpeg_compression",
)  # fmt: skip
SEVERITIES = (1, 2, 3, 4, 5)
ALL, NONE = "all", "none"


def listed_names(names: Sequence[str] | str) -> tuple[str, ...]:
    """Names that users separate by commas."""
    return tuple(names.split(",") if isinstance(names, str) else names)


def parse_corruptions(
    names: Sequence[str], flag: str = "--eval-corruptions"
) -> dict[str, tuple[int, ...]]:
    """Reads names such as ``fog`` (all severities), ``fog-3`` (one of them), ``all`` or ``all-3``.

    ``none`` alone is none.

    Args:
        names: What the user wrote.
        flag: The flag to name when a name is refused.

    Returns:
        Corruption's name to its severities, both in order.

    Raises:
        UserError: no such corruption or severity; the message names the nearest corruption.
    """
    if tuple(names) == (NONE,):
        return {}
    chosen: dict[str, set[int]] = {}
    for text in names:
        match = re.fullmatch(r"([a-z_]+?)(?:-([1-5]))?", text)
        if match is None or match[1] not in (*CORRUPTIONS, ALL):
            near = difflib.get_close_matches(text.rstrip("-0123456789"), CORRUPTIONS, 1)
            guess = f"did you mean {near[0]}? " if near else ""
            raise UserError(
                f"{flag} {text}: no such corruption; {guess}write all, names of the 15 of COCO-C "
                "such as fog, or fog-3 for one severity of 1 to 5"
            )
        for name in CORRUPTIONS if match[1] == ALL else (match[1],):
            chosen.setdefault(name, set()).update([int(match[2])] if match[2] else SEVERITIES)
    return {name: tuple(sorted(chosen[name])) for name in CORRUPTIONS if name in chosen}


def mean_precision(precisions: Mapping[str, Mapping[int, float | None]]) -> float | None:
    """mPC: the mean over corruptions of the mean over severities of AP (their equation 2).

    Args:
        precisions: Corruption's name to severity to AP.

    Returns:
        None where there is no corruption, or no AP.
    """
    rows = [_mean(row.values()) for row in precisions.values()]
    return _mean(rows)


def relative_precision(mean: float | None, clean: float | None) -> float | None:
    """rPC: mPC as a share of the AP on clean images (their equation 3); None of no AP or 0."""
    return mean / clean if mean is not None and clean else None


def is_benchmark(precisions: Mapping[str, Mapping[int, float | None]]) -> bool:
    """Whether mPC is over all that belongs in it: 15 corruptions at five severities."""
    return set(precisions) == set(CORRUPTIONS) and all(
        set(row) == set(SEVERITIES) for row in precisions.values()
    )


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values; None for no values, or where one of them is None."""
    numbers = list(values)
    if not numbers or None in numbers:
        return None
    return statistics.fmean(number for number in numbers if number is not None)
