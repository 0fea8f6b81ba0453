"""What a minibatch cost, in image passes."""

from __future__ import annotations

from typing import NamedTuple


class Passes(NamedTuple):
    """Forward-backward image passes of a minibatch, over all ranks.

    Attributes:
        weights: Passes whose gradient moves the weights.
        attack: Passes that only moved a perturbation.
    """

    weights: int
    attack: int = 0
