"""Two attacks on the same images: whether one fools more of them than chance explains."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from freeadv_fast.runs.chance import Z95

# Three images in a hundred, our choice: even sound networks lose one or two to further steps and
# restarts, and so little changes no comparison of methods.
TOLERANCE = 0.03


@dataclasses.dataclass(frozen=True)
class Paired:
    """Images that one of two attacks fools and the other does not.

    Attributes:
        only_first: Those that the first alone fools.
        only_second: Those that the second alone fools.
        num_images: All images that both attacked.
    """

    only_first: int
    only_second: int
    num_images: int

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> Paired:
        """Counts the images.

        Args:
            first: (n,) bool, the images that the first attack fools. second: The second.
        """
        return cls(int((first & ~second).sum()), int((second & ~first).sum()), len(first))

    @property
    def excess(self) -> float:
        """By what share of the images the first attack fools more; below 0 if it fools fewer."""
        return (self.only_first - self.only_second) / max(self.num_images, 1)

    @property
    def is_beyond_chance(self) -> bool:
        """Whether the first fools more by over `TOLERANCE`, with a confidence of 97.5 %.

        The bound is that of McNemar's paired difference (1947): only images on which the attacks
        differ make noise.
        """
        differing = self.only_first + self.only_second
        variance = differing - self.excess**2 * self.num_images
        noise = Z95 * math.sqrt(max(variance, 0.0)) / max(self.num_images, 1)
        return self.excess - noise > TOLERANCE
