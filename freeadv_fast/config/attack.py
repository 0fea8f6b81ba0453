"""An evaluation's attack by name: what users write, and what they mean by it."""

from __future__ import annotations

import dataclasses
import re

from freeadv_fast.errors import UserError

# Cross entropy, and the margin of Carlini and Wagner; `evaluation.attacks` computes them.
LOSS_NAMES = ("pgd", "cw")


@dataclasses.dataclass(frozen=True)
class Attack:
    """An attack by name: ``pgd-50``, ``pgd-50-10`` (10 restarts), ``cw-100``.

    Attributes:
        loss: ``pgd`` (cross entropy) or ``cw`` (margin).
        steps: Sign steps a restart.
        restarts: Random starts; an image falls if any of them fools the network.
    """

    loss: str
    steps: int
    restarts: int = 1

    @classmethod
    def parse(cls, text: str | Attack, flag: str = "--eval-attacks") -> Attack:
        """Reads LOSS-STEPS or LOSS-STEPS-RESTARTS.

        Args:
            text: What the user wrote.
            flag: The flag to name when the text is refused.

        Raises:
            UserError: any other form.
        """
        if isinstance(text, Attack):
            return text
        match = re.fullmatch(r"([a-z]+)-([1-9]\d{0,6})(?:-([1-9]\d{0,6}))?", text)
        if match is None or match[1] not in LOSS_NAMES:
            raise UserError(
                f"{flag} {text}: no such attack; write pgd-50 (50 steps), pgd-50-10 "
                "(10 restarts) or cw-100 (margin loss)"
            )
        return cls(match[1], int(match[2]), int(match[3] or 1))

    def __str__(self) -> str:
        """The form users write."""
        return f"{self.loss}-{self.steps}" + (f"-{self.restarts}" if self.restarts > 1 else "")
