"""Adversarial images at a large radius: those of a robust network look like another class.

Free AT's figure 2 (Shafahi et al. 2019), after Tsipras et al. 2019, "Robustness May Be at Odds with
Accuracy", section 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import matplotlib
import torch

from freeadv_fast.config.attack import Attack, step_across
from freeadv_fast.config.threat import AnyThreatModel, L2ThreatModel, Perturbation
from freeadv_fast.evaluation.attacks import perturb
from freeadv_fast.evaluation.pictures.grid import image_grid
from freeadv_fast.evaluation.pictures.subjects import Subject
from freeadv_fast.evaluation.report import (
    GREEN,
    LONGEST_NAME,
    STYLE,
    VERMILION,
    drawable,
    save,
)
from freeadv_fast.evaluation.sample import Sample

ATTACK = Attack.parse("pgd-30")
# The paper's 30/255 on CIFAR-10, rounded, and at least twice the run's radius; in L2 five times.
LEAST_LEVELS, TIMES, TIMES_L2 = 32, 2, 5


def large_threat(threat: AnyThreatModel) -> AnyThreatModel:
    """The ball of the picture around the run's, in steps that cross it."""
    if isinstance(threat, L2ThreatModel):
        levels = TIMES_L2 * threat.eps.levels
    else:
        levels = min(max(TIMES * threat.eps.levels, Fraction(LEAST_LEVELS)), Fraction(255))
    eps = Perturbation(levels)
    return type(threat)(eps, step_across(eps, ATTACK.steps))


def plot_large_eps(
    subjects: Sequence[Subject],
    sample: Sample,
    classes: Sequence[str],
    threat: AnyThreatModel,
    path: Path,
    *,
    seed: int,
) -> None:
    """Draws the images, and below them each network's adversarial ones with what it sees in them.

    Args:
        subjects: The networks, a row each.
        sample: The images, a column each.
        classes: Words for the classes.
        threat: The run's ball; the picture's is larger.
        path: PNG to write.
        seed: Seed of the random starts.
    """
    large = large_threat(threat)
    rows, words = [("image", sample.images)], []
    for subject in subjects:
        points = perturb(
            subject.network,
            sample.images,
            sample.labels,
            attack=ATTACK,
            threat=large,
            generator=torch.Generator(sample.images.device).manual_seed(seed),
            is_standing=torch.ones_like(sample.labels, dtype=torch.bool),
            at_once=sample.at_once,
        ).images
        with torch.no_grad():
            words.append(subject.network(points).softmax(1).max(1))
        rows.append((subject.label, points))
    ball = " in L2" if isinstance(large, L2ThreatModel) else ""
    title = (
        f"{ATTACK} within {large.eps}{ball}; the run's own radius is {threat.eps}. Above: the true "
        "class. Below: what the network takes the image for, and how surely; green where right."
    )
    with matplotlib.rc_context(STYLE):
        figure, grid = image_grid(rows, title, has_words=True)
        labels = sample.labels.tolist()
        for axes, label in zip(grid[0], labels, strict=True):
            axes.set_title(drawable(classes[label], LONGEST_NAME), loc="center", fontsize=9, pad=3)
        for line, (confidence, guess) in zip(grid[1:], words, strict=True):
            for axes, label, sure, seen in zip(
                line, labels, confidence.tolist(), guess.tolist(), strict=True
            ):
                axes.set_xlabel(
                    f"{drawable(classes[seen], LONGEST_NAME)}\n{sure:.0%}",
                    color=GREEN if seen == label else VERMILION,
                    fontsize=8,
                    labelpad=3,
                    linespacing=1.05,
                )
        save(figure, path)
