"""Accuracies as people read them: beside the attack's steps and what chance explains."""

from __future__ import annotations

import math
from collections.abc import Mapping

from freeadv_fast.config.attack import Attack
from freeadv_fast.evaluation.evaluate import Evaluation
from freeadv_fast.evaluation.tables import results_table

# 95 % of a normal distribution lie within so many standard deviations.
Z95 = 1.959964
# From here on the interval is narrower than +-1.4 points, whatever the accuracy.
ENOUGH_IMAGES = 5000


def wilson_interval(accuracy: float, num_images: int) -> tuple[float, float]:
    """The accuracies, fractions, that `num_images` images at this one cannot tell apart (95 %).

    Wilson's score interval (1927): within 0 and 1, and right for 0 of 400 as well, where
    +-1.96 standard errors claim certainty.

    Args:
        accuracy: Fraction of the images that are right.
        num_images: At least 1.
    """
    shrunk = 1 + Z95**2 / num_images
    center = (accuracy + Z95**2 / (2 * num_images)) / shrunk
    variance = accuracy * (1 - accuracy) / num_images + (Z95 / (2 * num_images)) ** 2
    half = Z95 * math.sqrt(variance) / shrunk
    return max(0.0, center - half), min(1.0, center + half)


def interval_text(accuracy: float, num_images: int) -> str:
    """``13.6-21.0%`` of an accuracy of few images; a dash of one that chance hardly moves."""
    if num_images >= ENOUGH_IMAGES:
        return "-"
    low, high = wilson_interval(accuracy, num_images)
    return f"{100 * low:.1f}-{high:.1%}"


def accuracy_table(measured: Evaluation, step: str) -> str:
    """A line for the clean images and one for each attack, with all that makes it weak or strong.

    Args:
        measured: The accuracies.
        step: The attacks' step, such as ``1/255``.

    Returns:
        Lines joined by newlines, without a last one.
    """
    clean = {"none": measured.clean_accuracy, "none, top-5": measured.clean_top5}
    rows = [
        _row(name, None, accuracy, measured.num_clean_images)
        for name, accuracy in clean.items()
        if accuracy is not None
    ]
    rows += [
        _row(name, step, accuracy, measured.num_images)
        for name, accuracy in measured.robust_accuracy.items()
    ]
    return results_table(rows)


def side_by_side(networks: Mapping[str, tuple[float, Mapping[str, float]]], step: str) -> str:
    """A line for the clean images and one for each attack, a column for each network.

    Args:
        networks: Column's title to the clean accuracy and the one under each attack.
        step: The attacks' step, such as ``1/255``.

    Returns:
        Lines joined by newlines, without a last one.
    """
    clean = {title: accuracy for title, (accuracy, _) in networks.items()}
    rows = [attack_columns("none", None) | clean]
    attacks = dict.fromkeys(name for _, robust in networks.values() for name in robust)
    for name in attacks:
        under = {title: robust.get(name) for title, (_, robust) in networks.items()}
        rows.append(attack_columns(name, step) | under)
    return results_table(rows)


def attack_columns(name: str, step: str | None) -> dict[str, object]:
    """What makes an attack weak or strong, a column each; no step: there is no attack."""
    attack = None if step is None else Attack.parse(name)
    return {
        "attack": name,
        "steps": attack and attack.steps,
        "step": step or "-",
        "restarts": attack and attack.restarts,
    }


def _row(name: str, step: str | None, accuracy: float, num_images: int) -> dict[str, object]:
    """One accuracy; without a step it is a clean one."""
    return attack_columns(name, step) | {
        "images": num_images,
        "accuracy": accuracy,
        "95% interval": interval_text(accuracy, num_images),
    }
