"""Average precision under each corruption: of one run by severity, or of several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from freeadv_fast.evaluation.page.wording import corruption_title, plural
from freeadv_fast.evaluation.report import (
    INK,
    LONGEST_LABEL,
    LONGEST_TITLE,
    STYLE,
    SWEEP_COLORS,
    drawable,
    save,
)
from freeadv_fast.evaluation.shifts.report import SEVERITY_COLORS

# Share of a corruption's place that its bars take.
BARS = 0.8
# Room above the highest bar, for what is written there.
HEADROOM = 1.12

# Corruption's name to severity to AP, a fraction; None where it is undefined.
Precisions = Mapping[str, Mapping[Any, float | None]]


def plot_corruptions(runs: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Draws AP by corruption: a bar a severity of one run, a bar a run of several.

    Several runs are compared in the means over the severities that all of them have.

    Args:
        runs: Name to ``clean`` (of which ``AP``) and ``corruptions`` as result.json has them under
            ``detection``. Corruptions that not all runs have are left out.
        path: PNG to write.
    """
    names = [name for name in next(iter(runs.values()))["corruptions"]
             if all(name in run["corruptions"] for run in runs.values())]  # fmt: skip
    rows = {run: by_severity(own["corruptions"], names) for run, own in runs.items()}
    with matplotlib.rc_context(STYLE):
        width = max(6.5, 0.62 * len(names) * max(1, len(runs) / 3) + 2.2)
        figure = Figure(figsize=(width, 4.4), layout="constrained")
        axes = figure.subplots()
        if len(runs) == 1:
            (own,) = rows.values()
            handles = severity_bars(axes, own)
            title = title_of(next(iter(runs.values())))
        else:
            handles = run_bars(axes, rows)
            title = "AP under corruption, mean over severities"
        axes.set_title(drawable(title, LONGEST_TITLE))
        clean_lines(axes, {run: own["clean"]["AP"] for run, own in runs.items()})
        precision_axes(axes, names)
        figure.legend(handles=handles, loc="outside lower center", ncols=max(1, int(width / 1.3)))
        save(figure, path)


def title_of(run: Mapping[str, Any]) -> str:
    """What is drawn, and the means that are known; they are mPC and rPC of all of COCO-C alone.

    ``AP under corruption: mPC 17.6%, rPC 49.2%``, or ``AP under 2 corruptions: mean 40.0%, 65.4% of
    the clean AP``.
    """
    if run.get("is_benchmark"):
        what, mean, relative = "corruption", "mPC {:.1%}", "rPC {:.1%}"
    else:
        what = plural(len(run["corruptions"]), "corruption")
        mean, relative = "mean {:.1%}", "{:.1%} of the clean AP"
    known = [
        words.format(run[key])
        for words, key in ((mean, "mean_corrupted"), (relative, "relative"))
        if run.get(key) is not None
    ]
    return f"AP under {what}" + (f": {', '.join(known)}" if known else "")


def by_severity(corruptions: Precisions, names: Sequence[str]) -> dict[str, dict[int, float]]:
    """What is known, with whole numbers as severities, which JSON writes as text."""
    return {
        name: {int(key): ap for key, ap in corruptions[name].items() if ap is not None}
        for name in names
    }


def severity_bars(axes: Axes, rows: Mapping[str, Mapping[int, float]]) -> list[Any]:
    """Draws thin bars, darker with severity, and a mark at their mean; returns the legend."""
    severities = sorted({severity for row in rows.values() for severity in row})
    width = BARS / max(1, len(severities))
    for center, row in enumerate(rows.values()):
        for place, severity in enumerate(severities):
            left = center - BARS / 2 + place * width
            axes.bar(
                left,
                row.get(severity, 0.0),
                width * 0.92,
                align="edge",
                color=SEVERITY_COLORS[severity - 1],
            )
        if len(row) > 1:
            mean = sum(row.values()) / len(row)
            axes.plot([center - BARS / 2, center + BARS / 2], [mean] * 2, color=INK, linewidth=1.4)
    handles: list[Any] = [
        Patch(color=SEVERITY_COLORS[severity - 1], label=f"severity {severity}")
        for severity in severities
    ]
    mean_mark = Line2D([], [], color=INK, linewidth=1.4, label="mean of the corruption")
    return handles + [mean_mark] * (len(severities) > 1)


def run_bars(axes: Axes, runs: Mapping[str, Mapping[str, Mapping[int, float]]]) -> list[Any]:
    """Draws a bar a run beside each other, a colour each; returns the legend."""
    width, handles = BARS / len(runs), []
    for number, (run, rows) in enumerate(runs.items()):
        color = SWEEP_COLORS[number % len(SWEEP_COLORS)]
        hatch = "///" if number >= len(SWEEP_COLORS) else None
        for center, name in enumerate(rows):
            common = set.intersection(*(set(other[name]) for other in runs.values()))
            values = [rows[name][severity] for severity in common]
            left = center - BARS / 2 + number * width
            height = sum(values) / len(values) if values else 0.0
            axes.bar(left, height, width * 0.92, align="edge", color=color, hatch=hatch)
        handles.append(Patch(color=color, hatch=hatch, label=drawable(run, LONGEST_LABEL)))
    return handles


def clean_lines(axes: Axes, clean: Mapping[str, float | None]) -> None:
    """Draws the AP on clean images as a dashed line across, named where there is one run."""
    for number, precision in enumerate(clean.values()):
        if precision is None:
            continue
        color = INK if len(clean) == 1 else SWEEP_COLORS[number % len(SWEEP_COLORS)]
        axes.axhline(precision, color=color, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
    known = [precision for precision in clean.values() if precision is not None]
    if not known:
        return
    text = f"clean {known[0]:.1%}" if len(clean) == 1 else "clean\n(dashed)"
    axes.annotate(
        text,
        (1, max(known)),
        xycoords=axes.get_yaxis_transform(),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        color=INK,
        fontsize=8,
    )


def precision_axes(axes: Axes, names: Sequence[str]) -> None:
    """Percent upwards from 0, corruptions' names along the bottom."""
    heights = [bar.get_height() for bar in axes.patches]  # type: ignore[attr-defined]
    heights += [float(line.get_ydata()[0]) for line in axes.lines]  # type: ignore[index, arg-type]
    axes.set_ylim(0, min(1.0, max([*heights, 0.01]) * HEADROOM))
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylabel("AP (IoU .50 to .95)")
    axes.yaxis.set_major_formatter(lambda precision, _: f"{100 * precision:g}%")
    labels = [drawable(corruption_title(name), LONGEST_LABEL) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=35, ha="right", rotation_mode="anchor")
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")
    axes.set_axisbelow(True)
