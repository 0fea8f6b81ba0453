"""The loss around images: smooth and flat where a network is robust.

Free AT's figure 3 (Shafahi et al. 2019): the cross entropy over the plane of the gradient's
sign and a random direction of signs, free training against natural and against PGD training.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from freeadv_fast.config.threat import AnyThreatModel, L2ThreatModel
from freeadv_fast.evaluation.attacks import logits_of
from freeadv_fast.evaluation.pictures.grid import LETTERS, show_picture
from freeadv_fast.evaluation.pictures.subjects import Subject, ball_directions, input_gradient
from freeadv_fast.evaluation.report import LONGEST_NAME, STYLE, VERMILION, drawable, save
from freeadv_fast.evaluation.sample import Sample

# Points along each direction; an odd number, so that the image itself is one of them.
GRID = 21
# Inches: an image at the left of so much space, a surface, the words above all, what is below.
LEFT, THUMBNAIL, COLUMN, ROW, TOP, BOTTOM = 1.5, 1.1, 3.7, 2.8, 0.95, 0.15
# A surface's axes reach up beyond its row, where they are empty.
AXES = 3.4


def loss_surface(
    subject: Subject, sample: Sample, threat: AnyThreatModel, *, seed: int
) -> list[Tensor]:
    """The cross entropy at x + u d + v r, u and v from -1 to 1, clipped to the pixels' range.

    Args:
        subject: The network; d is its own adversarial direction, as long as the radius.
        sample: The images.
        threat: Gives ball and radius.
        seed: Seed of the random direction r, as long as d and the same one for every network.

    Returns:
        For each image (GRID, GRID) float32: u along the rows, v along the columns.
    """
    generator = torch.Generator(sample.images.device).manual_seed(seed)
    ascent, random = ball_directions(input_gradient(subject.network, sample), threat, generator)
    along = torch.linspace(-1, 1, GRID, device=sample.images.device)
    u, v = (grid.reshape(-1, 1, 1, 1) for grid in torch.meshgrid(along, along, indexing="ij"))
    surfaces = []
    for image, label, one, other in zip(sample.images, sample.labels, ascent, random, strict=True):
        points = (image + u * one + v * other).clamp_(0, 1)
        logits = logits_of(subject.network, points, sample.at_once)
        losses = F.cross_entropy(logits, label.expand(len(points)), reduction="none")
        surfaces.append(losses.nan_to_num(0).view(GRID, GRID).cpu())
    return surfaces


def plot_surfaces(
    subjects: Sequence[Subject],
    sample: Sample,
    classes: Sequence[str],
    threat: AnyThreatModel,
    path: Path,
    *,
    seed: int,
) -> None:
    """Draws a row an image and a column a network, heights and colours on one scale a row.

    Args:
        subjects: The networks.
        sample: The images, two or so.
        classes: Words for the classes.
        threat: Gives ball and radius.
        path: PNG to write.
        seed: Seed of the random direction.
    """
    columns = [loss_surface(subject, sample, threat, seed=seed) for subject in subjects]
    width = LEFT + COLUMN * len(subjects)
    height = TOP + ROW * len(sample.labels) + BOTTOM
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))

        def place(left: float, bottom: float, wide: float, high: float) -> Any:
            return left / width, bottom / height, wide / width, high / height

        for row, label in enumerate(sample.labels.tolist()):
            bottom = height - TOP - ROW * (row + 1)
            middle = bottom + (ROW - THUMBNAIL) / 2
            thumbnail = figure.add_axes(place(0.2, middle, THUMBNAIL, THUMBNAIL))
            show_picture(thumbnail, sample.images[row].permute(1, 2, 0).cpu().numpy())
            thumbnail.set_title(drawable(classes[label], LONGEST_NAME), loc="center", fontsize=9)
            highest = max(1e-6, *(column[row].max().item() for column in columns))
            for number, column in enumerate(columns):
                left = LEFT + COLUMN * number
                axes: Any = figure.add_axes(place(left, bottom, COLUMN, AXES), projection="3d")
                _surface(axes, column[row].numpy(), highest, threat)
        for number, subject in enumerate(subjects):
            middle = LEFT + COLUMN * (number + 0.5)
            figure.text(
                middle / width, 1 - (TOP - 0.12) / height, subject.label,
                ha="center", va="bottom", fontsize=10, fontweight="bold",
            )  # fmt: skip
        _title(figure, threat, width, height)
        save(figure, path)


def _title(figure: Figure, threat: AnyThreatModel, width: float, height: float) -> None:
    """Says above all what is drawn, in inches from the left and from the top."""
    ball = " in L2" if isinstance(threat, L2ThreatModel) else ""
    text = (
        f"Cross entropy within eps {threat.eps}{ball} of a validation image, on {GRID} x {GRID} "
        "points. Red: through the image, along the network's own gradient. Each row has one scale."
    )
    lines = textwrap.wrap(text, int((width - 0.4) * LETTERS))
    figure.text(0.2 / width, 1 - 0.1 / height, "\n".join(lines), ha="left", va="top", fontsize=9)


def _surface(axes: Any, surface: np.ndarray, highest: float, threat: AnyThreatModel) -> None:
    """Draws one surface, and on it the way along the gradient through the image."""
    along = np.linspace(-1, 1, GRID)
    u, v = np.meshgrid(along, along, indexing="ij")
    axes.plot_surface(
        u, v, surface, cmap="viridis", vmin=0, vmax=highest,
        rcount=GRID, ccount=GRID, linewidth=0.2, edgecolor="#FFFFFF55",
    )  # fmt: skip
    middle = GRID // 2
    axes.plot(u[:, middle], v[:, middle], surface[:, middle], color=VERMILION, zorder=9)
    is_l2 = isinstance(threat, L2ThreatModel)
    axes.set(zlim=(0, highest), xlim=(-1, 1), ylim=(-1, 1), zlabel="cross entropy (nats)")
    axes.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1))
    # Of tiny losses: a power of ten above the axis would lie on its title.
    axes.zaxis.set_major_formatter("{x:.3g}")
    axes.set(
        xlabel="gradient (eps)" if is_l2 else "gradient sign (eps)",
        ylabel="random direction (eps)" if is_l2 else "random signs (eps)",
    )
    axes.patch.set_visible(False)  # it would hide the words of the row above
    axes.view_init(elev=24, azim=-128)
    axes.tick_params(labelsize=7)
    axes.set_box_aspect(None, zoom=0.88)
