"""COCO's numbers as people read them on a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from freeadv_fast.evaluation.detection.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    is_benchmark,
    mean_precision,
    relative_precision,
)
from freeadv_fast.evaluation.tables import results_table

# Of the twelve those that tables show.
SHOWN = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def percent(fraction: float | None) -> str:
    """``35.8%``; a dash where there is no number."""
    return "-" if fraction is None else f"{fraction:.1%}"


def precision_table(
    clean: Mapping[str, float | None],
    attacks: Mapping[str, Mapping[str, float | None]],
    step: str,
    num_images: int,
) -> list[str]:
    """A line for the clean images and one for each attack, after the columns' titles.

    Args:
        clean: COCO's numbers by name. attacks: Attack's name to these.
        step: The attacks' step, such as ``1/255``.
        num_images: Images of each.
    """
    measured = [("none", "-", clean), *((name, step, own) for name, own in attacks.items())]
    rows = [
        {"attack": name, "step": length, "images": num_images}
        | {number: own[number] for number in SHOWN}
        for name, length, own in measured
    ]
    return results_table(rows).splitlines()


def corruption_lines(
    precisions: Mapping[str, Mapping[int, float | None]], clean: float | None, num_images: int
) -> list[str]:
    """AP by corruption and severity, and what it comes to; nothing where there is none.

    Args:
        precisions: Corruption's name to severity to AP.
        clean: AP of the same images without corruption.
        num_images: Images of each.
    """
    if not precisions:
        return []
    shown = [severity for severity in SEVERITIES if any(severity in p for p in precisions.values())]
    rows = [
        {"AP under": name}
        | {f"severity {severity}": row.get(severity) for severity in shown}
        | {"mean": mean_precision({name: row})}
        for name, row in precisions.items()
    ]
    mean = mean_precision(precisions)
    relative = relative_precision(mean, clean)
    if is_benchmark(precisions):
        means = f"mPC {percent(mean)}, rPC {percent(relative)} of the clean AP"
    else:
        pairs, all_pairs = sum(map(len, precisions.values())), len(CORRUPTIONS) * len(SEVERITIES)
        means = (
            f"mean {percent(mean)}, {percent(relative)} of the clean AP, over {pairs} of the "
            f"{all_pairs} pairs of mPC"
        )
    means += f" ({num_images:,} images)"
    return [*results_table(rows).splitlines(), means]
