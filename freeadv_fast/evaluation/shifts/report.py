"""Errors on corrupted images: a table, and a chart with a bar a severity."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from freeadv_fast.evaluation.report import (
    GREY,
    INK,
    LONGEST_LABEL,
    LONGEST_TITLE,
    STYLE,
    VERMILION,
    drawable,
    save,
)
from freeadv_fast.evaluation.tables import results_table

# Five shades up to BLUE's dark end, evenly spaced in lightness, for severities 1 to 5.
SEVERITY_COLORS = ("#C6DEF1", "#8FC1E3", "#4F9FD0", "#0072B2", "#00466E")
# Empty space between two groups of corruptions, in widths of a corruption.
GROUP_GAP = 0.45


def corruption_table(
    errors: Mapping[str, Mapping[int, float]], normalized: Mapping[str, float] | None = None
) -> str:
    """Lays the errors on a set of corruptions out, a line a corruption.

    Args:
        errors: Corruption's name to severity to error, a fraction; severities may be missing.
        normalized: Corruption's name to its error over AlexNet's; None for no such column.

    Returns:
        Lines joined by newlines, without a last one.
    """
    severities = sorted({severity for row in errors.values() for severity in row})
    rows = []
    for name, row in errors.items():
        cells: dict[str, object] = {"error at severity": _readable(name)}
        cells |= {str(severity): row.get(severity) for severity in severities}
        cells["mean"] = _mean(row)
        if normalized is not None:
            cells["over AlexNet's"] = normalized.get(name)
        rows.append(cells)
    return results_table(rows)


def plot_corruptions(
    groups: Mapping[str, Mapping[str, Mapping[int, float]]],
    path: str | Path,
    *,
    title: str,
    references: Mapping[str, float],
    starred: Collection[str] = (),
    footnote: str = "",
) -> None:
    """Draws five thin bars a corruption, darker with severity, and a mark at their mean.

    Args:
        groups: Group's name to corruption's name to severity (1..5) to error, a fraction.
        path: PNG to write.
        title: Text above the chart.
        references: Text to error of each dashed line across the chart.
        starred: Corruptions whose name gets a star.
        footnote: Text below the chart.
    """
    num_corruptions = sum(map(len, groups.values()))
    width = max(6.5, 0.66 * num_corruptions + 0.25 * len(groups) + 1.7)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, 4.4), layout="constrained")
        axes = figure.subplots()
        axes.set_title(drawable(title, LONGEST_TITLE), pad=22)
        places: list[tuple[str, float]] = []
        start = 0.0
        for group, errors in groups.items():
            for name, row in errors.items():
                label = drawable(_readable(name), LONGEST_LABEL)
                places.append((label + "*" * (name in starred), start))
                _corruption_bars(axes, start, row)
                start += 1
            _group_heading(axes, drawable(group, LONGEST_LABEL), start - len(errors), start - 1)
            start += GROUP_GAP
        axes.set_xlim(-0.6, start - GROUP_GAP - 0.4)
        _error_axes(axes, places)
        _reference_lines(axes, references)
        _severity_legend(figure)
        if footnote:
            axes.set_xlabel(
                drawable(footnote, 2 * LONGEST_TITLE),
                fontsize=8,
                color=GREY,
                loc="left",
                labelpad=8,
            )
        save(figure, path)


def _error_axes(axes: Axes, places: Sequence[tuple[str, float]]) -> None:
    """Percent upwards, corruptions' names along the bottom."""
    axes.set(ylim=(0, 1), ylabel="images classified wrongly")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xticks(
        [place for _, place in places],
        [name for name, _ in places],
        rotation=35,
        ha="right",
        rotation_mode="anchor",
    )
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")
    axes.set_axisbelow(True)


def _corruption_bars(axes: Axes, center: float, row: Mapping[int, float]) -> None:
    """Draws the bars of one corruption around `center`, and their mean."""
    width = 0.8 / len(SEVERITY_COLORS)
    for severity, error in row.items():
        left = center + (severity - 1 - len(SEVERITY_COLORS) / 2) * width
        axes.bar(left, error, width * 0.92, align="edge", color=SEVERITY_COLORS[severity - 1])
    axes.plot([center - 0.4, center + 0.4], [_mean(row)] * 2, color=INK, linewidth=1.4)


def _group_heading(axes: Axes, name: str, first: float, last: float) -> None:
    """Writes a group's name above its corruptions, over a thin rule."""
    across = axes.get_xaxis_transform()
    axes.plot(
        [first - 0.42, last + 0.42],
        [1.015, 1.015],
        transform=across,
        color=GREY,
        linewidth=0.8,
        clip_on=False,
    )
    axes.text((first + last) / 2, 1.03, name, transform=across, ha="center", color=GREY, fontsize=8)


def _reference_lines(axes: Axes, references: Mapping[str, float]) -> None:
    """Draws at most two dashed lines across the chart, named on the right, clear of each other."""
    ascending = sorted(references.items(), key=lambda item: item[1])
    for (text, error), color, side in zip(
        reversed(ascending), (INK, VERMILION), ("bottom", "top"), strict=False
    ):
        axes.axhline(error, color=color, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{drawable(text, LONGEST_LABEL)} {error:.1%}",
            (1, error),
            xycoords=axes.get_yaxis_transform(),
            xytext=(5, 0),
            textcoords="offset points",
            va=side,
            color=color,
            fontsize=8,
        )


def _severity_legend(figure: Figure) -> None:
    """Names the shades and the mark."""
    handles: list[Any] = [Patch(color=color) for color in SEVERITY_COLORS]
    names = ["severity 1", *map(str, range(2, len(SEVERITY_COLORS) + 1))]
    figure.legend(
        [*handles, Line2D([], [], color=INK, linewidth=1.4)],
        [*names, "mean of the corruption"],
        loc="outside lower center",
        ncols=len(names) + 1,
        handlelength=1.1,
        columnspacing=1.0,
    )


def _readable(name: str) -> str:
    """jpeg_compression as people write it."""
    return name.replace("_", " ").replace("jpeg", "JPEG")


def _mean(row: Mapping[int, float]) -> float:
    """Mean over the severities that are there."""
    return sum(row.values()) / len(row)
