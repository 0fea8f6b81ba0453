"""Images with boxes, a row an image: each box with its class and score, a colour a class."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import Normal, Stroke
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from freeadv_fast.evaluation.report import LONGEST_NAME, STYLE, SWEEP_COLORS, drawable, save

# Inches: a picture's width, the space between two, what is above and below all of them; and how
# high a picture may be for its width.
SIDE, GAP, TOP, BOTTOM, HIGHEST = 2.5, 0.08, 0.55, 0.4, 1.2
# Letters of 9 points that fit into an inch.
LETTERS = 14.5
LABEL_POINTS = 6.5
# Of the file: letters are not as wide at another.
DPI = 150
# Classes beyond so many have the colours of the first ones again.
CLASS_COLORS = (*SWEEP_COLORS, "#332288", "#882255", "#999933", "#44AA99", "#DDCC77", "#222222")


class Panel(NamedTuple):
    """An image and the boxes on it.

    Attributes:
        picture: (H, W, 3) pixels in [0, 1].
        boxes: (k, 4) x1, y1, x2, y2 in these pixels.
        labels: (k,) classes.
        scores: (k,), falling; None of true objects.
    """

    picture: NDArray[np.float32]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32] | None = None


def plot_boxes(
    columns: Mapping[str, Sequence[Panel]],
    classes: Sequence[str],
    path: str | Path,
    *,
    title: str,
) -> None:
    """Draws a row an image, with the class and the score of each box, a colour a class.

    A label stands where it hides no other; where there is no such place, the colour says the class.

    Args:
        columns: What was done to the images, to the images and their boxes; equally many.
        classes: Class names; a label is an index into them.
        path: PNG to write.
        title: Text above all.
    """
    rows = list(zip(*columns.values(), strict=True))
    with matplotlib.rc_context(STYLE):
        figure, grid = panel_grid(rows, list(columns), title)
        labels = dict.fromkeys(int(n) for row in rows for panel in row for n in panel.labels)
        colors = dict(zip(labels, itertools.cycle(CLASS_COLORS), strict=False))
        names = {n: drawable(classes[n], LONGEST_NAME) for n in labels}
        for axes_row, row in zip(grid, rows, strict=True):
            for axes, panel in zip(axes_row, row, strict=True):
                show_boxes(axes, panel, colors)
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()  # places are known from here on
        for axes_row, row in zip(grid, rows, strict=True):
            for axes, panel in zip(axes_row, row, strict=True):
                write_labels(axes, panel, names, colors)
        handles = [Patch(color=colors[n], label=names[n]) for n in labels]
        if handles:
            num_columns = max(1, int(figure.get_figwidth() / 1.4))
            figure.legend(
                handles=handles[: 2 * num_columns],
                loc="lower center",
                ncols=min(len(handles), num_columns),
            )
        save(figure, path)


def panel_grid(
    rows: Sequence[Sequence[Panel]], names: Sequence[str], title: str
) -> tuple[Figure, NDArray[Any]]:
    """Places the pictures by inches, rows as high as their image, names above the first."""
    width = GAP + len(names) * (SIDE + GAP)
    heights = [SIDE * min(HIGHEST, first.picture.shape[0] / first.picture.shape[1])
               for first, *_ in rows]  # fmt: skip
    lines = textwrap.wrap(title, int(width * LETTERS))
    height = TOP + 0.15 * (len(lines) - 1) + sum(heights) + GAP * len(rows) + BOTTOM
    figure = Figure(figsize=(width, height), dpi=DPI)
    grid = np.empty((len(rows), len(names)), dtype=object)
    bottom = height - TOP - 0.15 * (len(lines) - 1)
    for number, row in enumerate(rows):
        bottom -= heights[number]
        for column, panel in enumerate(row):
            left = GAP + column * (SIDE + GAP)
            place = (left / width, bottom / height, SIDE / width, heights[number] / height)
            axes = grid[number, column] = figure.add_axes(place)
            axes.imshow(panel.picture, vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.grid(visible=False)
        bottom -= GAP
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(drawable(name, int(SIDE * LETTERS)), loc="center", fontsize=9, pad=3)
    figure.text(GAP / width, 1 - 0.08 / height, "\n".join(lines), ha="left", va="top", fontsize=9)
    return figure, grid


def show_boxes(axes: Axes, panel: Panel, colors: Mapping[int, str]) -> None:
    """Draws the boxes, with a light edge that is seen on any ground."""
    edge = [Stroke(linewidth=2.6, foreground="white", alpha=0.7), Normal()]
    for (x1, y1, x2, y2), label in zip(panel.boxes, panel.labels, strict=True):
        color = colors[int(label)]
        # imshow's pixels are centred on whole numbers, those of boxes begin there.
        corner = (x1 - 0.5, y1 - 0.5)
        axes.add_patch(
            Rectangle(corner, x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=1.3,
                      path_effects=edge)
        )  # fmt: skip


def write_labels(
    axes: Axes, panel: Panel, names: Mapping[int, str], colors: Mapping[int, str]
) -> None:
    """Writes class and score beside each box where they hide no other; the best score first."""
    placed: list[Bbox] = []
    for number, label in enumerate(panel.labels.tolist()):
        score = "" if panel.scores is None else f" {panel.scores[number]:.2f}"
        color = colors[label]
        text = axes.text(
            0, 0, names[label] + score, transform=None, fontsize=LABEL_POINTS,
            color=ink_on(color), va="bottom", ha="left", clip_on=False,
            bbox={"facecolor": color, "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip
        extent = text.get_window_extent()
        box = axes.transData.transform(panel.boxes[number].reshape(2, 2) - 0.5)
        place = free_place(extent, box, axes.get_window_extent(), placed)
        if place is None:
            text.remove()
            continue
        text.set_transform(axes.transAxes)
        x, y = axes.transAxes.inverted().transform(place.min)
        text.set_position((x, y))
        placed.append(place)


def free_place(
    extent: Bbox, box: NDArray[np.float64], within: Bbox, placed: Sequence[Bbox]
) -> Bbox | None:
    """Where a label of this extent fits at a box: above, inside or below it; None of nowhere.

    Args:
        extent: Of the label, wherever it is. box: (2, 2) two corners of the box.
        within: The picture. placed: Labels that it may not hide.
    """
    pad = extent.height / 4
    width, height = extent.width + 2 * pad, extent.height + pad
    (left, low), (right, high) = box.min(0), box.max(0)
    for x in (left, right - width):
        x = min(max(x, within.x0), within.x1 - width)
        for y in (high, high - height, low - height, low):
            place = Bbox.from_bounds(x + pad, y + pad / 2, extent.width, extent.height)
            area = Bbox.from_bounds(x, y, width, height)
            is_inside = within.y0 <= area.y0 and area.y1 <= within.y1 and within.x0 <= area.x0
            if is_inside and not any(area.overlaps(other) for other in placed):
                return place
    return None


def ink_on(color: str) -> str:
    """Black or white, whichever is read more easily on a colour."""
    red, green, blue = to_rgb(color)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"
