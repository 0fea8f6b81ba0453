"""Rows of images with a name on the left and words above and below each."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

# Inches: a picture's side, names at the left, the title of one line with the words below it, and
# what two lines below a picture take.
SIDE, LEFT, TITLE, WORDS, GAP = 1.35, 0.65, 0.62, 0.4, 0.08
# Letters of 9 points that fit into an inch.
LETTERS = 14.5


def image_grid(
    rows: Sequence[tuple[str, Tensor]], title: str, *, has_words: bool = False
) -> tuple[Figure, np.ndarray]:
    """Draws rows of (n, 3, H, W) pictures in [0, 1], each with its name at the left.

    Everything is placed by inches, so that no number of rows makes words overlap.

    Args:
        rows: Name and pictures of each row, equally many.
        title: Text above all; it is broken where it is too long.
        has_words: Leave room for two lines below each picture from the second row on.

    Returns:
        The figure, and its (rows, n) axes.
    """
    num_columns = len(rows[0][1])
    width = LEFT + num_columns * (SIDE + GAP)
    lines = textwrap.wrap(title, max(24, int((width - LEFT) * LETTERS)))
    top = TITLE + 0.15 * (len(lines) - 1)
    below = [GAP] + [GAP + WORDS if has_words else GAP] * (len(rows) - 1)
    height = top + len(rows) * SIDE + sum(below)
    figure = Figure(figsize=(width, height))
    axes = np.empty((len(rows), num_columns), dtype=object)
    bottom = height - top
    for row, (name, pictures) in enumerate(rows):
        bottom -= SIDE
        for column, picture in enumerate(pictures.permute(0, 2, 3, 1).cpu().numpy()):
            left = LEFT + column * (SIDE + GAP)
            place = (left / width, bottom / height, SIDE / width, SIDE / height)
            axes[row, column] = figure.add_axes(place)
            show_picture(axes[row, column], picture)
        axes[row, 0].set_ylabel("\n".join(textwrap.wrap(name, 20)), fontsize=9, labelpad=6)
        bottom -= below[row]
    figure.text(LEFT / width, 1 - 0.1 / height, "\n".join(lines), ha="left", va="top", fontsize=9)
    return figure, axes


def show_picture(axes: Axes, picture: np.ndarray) -> None:
    """Shows (H, W, 3) pixels in [0, 1] without axes."""
    axes.imshow(picture, vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
