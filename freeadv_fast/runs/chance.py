"""What chance alone makes of an accuracy that few images measured."""

from __future__ import annotations

import math

# 95 % of a normal distribution lie within so many standard deviations.
Z95 = 1.959964


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
