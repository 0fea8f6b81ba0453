"""An evaluation's attack by name: what users write, and what they mean by it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from fractions import Fraction

from freeadv_fast.config.threat import AnyThreatModel, Perturbation
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


def parsed(attacks: Sequence[str]) -> list[Attack]:
    """Attacks by their names."""
    return [Attack.parse(attack) for attack in attacks]


def passes(attacks: Sequence[str]) -> int:
    """Passes through the network that an image takes which no attack fools."""
    return sum(attack.steps * attack.restarts for attack in parsed(attacks))


def doubt_about_steps(
    attacks: Sequence[Attack], threat: AnyThreatModel, flag: str = "--eval-step"
) -> list[str]:
    """A line where steps are too short or too long for the accuracies to mean robustness.

    Steps that do not add up to the radius leave most of the ball unseen: a natural network keeps
    67 % under PGD-20 at 32/255 in steps of 1/255, and 17 % in steps of 4/255. A step of more than
    the ball's width ends on its edge wherever it began.

    Args:
        attacks: Attacks, each from a random start.
        threat: Their ball and step.
        flag: The flag that sets the step.

    Returns:
        One line, or none.
    """
    eps, step = threat.eps.levels, threat.step.levels
    if not eps:
        return []
    doubtful, trouble = [a for a in attacks if a.steps * step < eps], "too weak: {} cannot cross"
    if not doubtful and step > 2 * eps:
        doubtful, trouble = [*attacks], "too coarse: {} leaps over"
    if not doubtful:
        return []
    moves = f"{', '.join(map(str, doubtful))} in steps of {threat.step}"
    better = step_across(threat.eps, min(attack.steps for attack in doubtful))
    return [f"{trouble.format(moves)} eps {threat.eps}; try {flag} {better}"]


def step_across(eps: Perturbation, steps: int) -> Perturbation:
    """2.5 eps / K, at most eps: K such steps reach every point of the ball (Madry et al. 2018).

    Rounded up to hundredths of a grey level, so that it can be typed.
    """
    share = min(Fraction(1), Fraction(5, 2 * steps))
    return Perturbation(Fraction(math.ceil(eps.levels * share * 100), 100))
