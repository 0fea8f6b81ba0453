"""Gradients of the loss at the image: those of robust networks follow what is in the picture.

Tsipras et al. 2019, "Robustness May Be at Odds with Accuracy", section 2.2 and figure 2, whose
rendering this is: each image's gradient clipped to three standard deviations, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from torch import Tensor

from freeadv_fast.evaluation.pictures.grid import image_grid
from freeadv_fast.evaluation.pictures.subjects import Subject, input_gradient
from freeadv_fast.evaluation.report import LONGEST_NAME, STYLE, drawable, save
from freeadv_fast.evaluation.sample import Sample

NUM_DEVIATIONS = 3


def visible(gradient: Tensor) -> Tensor:
    """(n, 3, H, W) gradients as pictures in [0, 1]: grey is 0, black and white are 3 deviations.

    A gradient that is 0 everywhere is grey.
    """
    deviation = gradient.std((1, 2, 3), keepdim=True)
    scaled = gradient / (NUM_DEVIATIONS * deviation).masked_fill(deviation == 0, 1)
    return (0.5 + 0.5 * scaled).nan_to_num_(0.5).clamp_(0, 1)


def plot_saliency(
    subjects: Sequence[Subject], sample: Sample, classes: Sequence[str], path: Path
) -> None:
    """Draws the images, and below them each network's gradients there.

    Args:
        subjects: The networks, a row each.
        sample: The images, a column each.
        classes: Words for the classes.
        path: PNG to write.
    """
    rows = [("image", sample.images)]
    rows += [
        (subject.label, visible(input_gradient(subject.network, sample))) for subject in subjects
    ]
    title = (
        "Gradient of the loss at the image, channel by channel: grey is 0, black and white are "
        f"{NUM_DEVIATIONS} standard deviations of each image's own."
    )
    with matplotlib.rc_context(STYLE):
        figure, grid = image_grid(rows, title)
        for axes, label in zip(grid[0], sample.labels.tolist(), strict=True):
            axes.set_title(drawable(classes[label], LONGEST_NAME), loc="center", fontsize=9, pad=3)
        save(figure, path)
