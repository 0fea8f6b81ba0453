"""An evaluation's attack by name: what users write, and what they mean by it."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from fractions import Fraction

from freeadv_fast.config.threat import AnyThreatModel, Perturbation
from freeadv_fast.errors import UserError

# Cross entropy, and the margin of Carlini and Wagner; `evaluation.attacks` computes them.
STEPPED = ("pgd", "cw")
# Steps that adapt their own length, `evaluation.autoattack`; and the four attacks together.
ADAPTIVE, ENSEMBLE = "apgd-ce", "autoattack"
# Calls of the network for an image that none of the four fools: 100 steps of APGD-CE, 100 against
# each of nine classes of APGD-T and of FAB-T, 5,000 queries of Square (Croce and Hein 2020).
ENSEMBLE_PASSES = 100 + 9 * 100 + 9 * 100 + 5000
# What people write, and the attack that they mean; a name of a part means all four.
MEANT = {
    "pgd": "pgd-50",
    "cw": "cw-100",
    "apgd-ce": "apgd-ce-100",
    "apgd": "apgd-ce-100",
    **dict.fromkeys(("autoattack", "aa", "apgd-t", "fab-t", "fab", "square"), ENSEMBLE),
}


@dataclasses.dataclass(frozen=True)
class Attack:
    """An attack by name: ``pgd-50``, ``pgd-50-10`` (10 restarts), ``cw-100``, ``autoattack``.

    Attributes:
        loss: ``pgd`` (cross entropy), ``cw`` (margin), ``apgd-ce`` (cross entropy, in steps that
            adapt their own length) or ``autoattack`` (four attacks, standard version).
        steps: Steps a restart; 0 for ``autoattack``, whose parts have their own.
        restarts: Random starts; an image falls if any of them fools the network.
    """

    loss: str
    steps: int
    restarts: int = 1

    @classmethod
    def parse(cls, text: str | Attack, flag: str = "--eval-attacks") -> Attack:
        """Reads LOSS-STEPS, LOSS-STEPS-RESTARTS or ``autoattack``.

        Args:
            text: What the user wrote.
            flag: The flag to name when the text is refused.

        Raises:
            UserError: any other form; the message names the nearest attack.
        """
        if isinstance(text, Attack):
            return text
        if text == ENSEMBLE:
            return cls(ENSEMBLE, 0)
        match = re.fullmatch(r"([a-z-]+?)-([1-9]\d{0,6})(?:-([1-9]\d{0,6}))?", text)
        if match is None or match[1] not in (*STEPPED, ADAPTIVE):
            near = nearest(text)
            raise UserError(
                f"{flag} {text}: no such attack; {f'did you mean {near}? ' if near else ''}write "
                "pgd-50 (50 steps), pgd-50-10 (10 restarts), cw-100 (margin loss), apgd-ce-100 or "
                "autoattack"
            )
        return cls(match[1], int(match[2]), int(match[3] or 1))

    def __str__(self) -> str:
        """The form users write."""
        if self.loss == ENSEMBLE:
            return ENSEMBLE
        return f"{self.loss}-{self.steps}" + (f"-{self.restarts}" if self.restarts > 1 else "")

    @property
    def has_step(self) -> bool:
        """Whether the user sets the length of its steps; others choose it themselves."""
        return self.loss in STEPPED

    @property
    def passes(self) -> int:
        """Passes through the network that an image takes which is not fooled."""
        return ENSEMBLE_PASSES if self.loss == ENSEMBLE else self.steps * self.restarts


def nearest(text: str) -> str | None:
    """The attack that a misspelt name stands for: ``pgd-50`` of ``pdg50``; None where none is near.

    Steps and restarts that were written stay.
    """
    words, numbers = re.findall(r"[a-z]+", text.lower()), re.findall(r"[1-9]\d{0,6}", text)
    near = difflib.get_close_matches("-".join(words), MEANT, 1, 0.6)
    if not near:
        return None
    name, _, usual_steps = MEANT[near[0]].rpartition("-")
    return "-".join([name, *(numbers[:2] or [usual_steps])]) if name else ENSEMBLE


def parsed(attacks: Sequence[str]) -> list[Attack]:
    """Attacks by their names."""
    return [Attack.parse(attack) for attack in attacks]


def passes(attacks: Sequence[str]) -> int:
    """Passes through the network that an image takes which no attack fools."""
    return sum(attack.passes for attack in parsed(attacks))


def doubt_about_steps(
    attacks: Sequence[Attack], threat: AnyThreatModel, flag: str = "--eval-step"
) -> list[str]:
    """A line where steps are too short or too long for the accuracies to mean robustness.

    Steps that do not add up to the radius leave most of the ball unseen: a natural network keeps
    67 % under PGD-20 at 32/255 in steps of 1/255, and 17 % in steps of 4/255. A step of more than
    the ball's width ends on its edge wherever it began.

    Args:
        attacks: Attacks; of those whose steps have a length that was set, each from a random start.
        threat: Their ball and step.
        flag: The flag that sets the step.

    Returns:
        One line, or none.
    """
    eps, step = threat.eps.levels, threat.step.levels
    attacks = [attack for attack in attacks if attack.has_step]
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
