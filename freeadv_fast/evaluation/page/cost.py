"""What a run cost, and where the time went."""

from __future__ import annotations

import dataclasses
from typing import Any

from freeadv_fast.evaluation.page.curves import readings
from freeadv_fast.evaluation.page.files import RunFiles, is_number

# A forward pass, a backward pass to the image and one to the weights cost about the same, a third
# of a pass each. A pass for the weights counts as all three, one for an attack alone as two.
THIRDS_FOR_WEIGHTS, THIRDS_FOR_ATTACK = 3, 2


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the time.

    Attributes:
        name: What was done. note: How it is known.
        seconds: How long. share: Of the whole, a fraction. tone: Colour of its bar.
    """

    name: str
    note: str
    seconds: float
    share: float
    tone: int


@dataclasses.dataclass(frozen=True)
class Spent:
    """What a run cost.

    Attributes:
        passes: Image passes for the weights. attack_passes: Those for a perturbation alone.
        train_seconds: Training with its checkpoints. evaluation_seconds: The final evaluations.
        passes_per_second: For the weights. images_per_second: Images of the data that were read.
        attack_share: The attack's part of the training steps, a fraction.
        parts: Where the time went.
    """

    passes: int
    attack_passes: int
    train_seconds: float
    evaluation_seconds: float | None
    passes_per_second: float | None
    images_per_second: float | None
    attack_share: float
    parts: tuple[Part, ...]


def spent(files: RunFiles) -> Spent:
    """The cost of a run, from its result and its log."""
    result = files.result
    passes, attack_passes = int(result["passes"]), int(result.get("attack_passes") or 0)
    seconds = float(result["train_seconds"])
    evaluation = result.get("evaluation_seconds")
    per_image = files.config.weight_passes if files.config else None
    attack = THIRDS_FOR_ATTACK * attack_passes
    attack_share = attack / max(attack + THIRDS_FOR_WEIGHTS * passes, 1)
    return Spent(
        passes,
        attack_passes,
        seconds,
        evaluation,
        result.get("passes_per_second"),
        passes / per_image / seconds if per_image and seconds > 0 else None,
        attack_share,
        tuple(parts(files, seconds, evaluation, attack_share)),
    )


def parts(
    files: RunFiles, seconds: float, evaluation: float | None, attack_share: float
) -> list[Part]:
    """The parts of the whole time that are known."""
    start = number_or_0(files.result.get("warm_up_seconds"))
    guard = sum(value for _, value in readings(files.log, "guard_seconds"))
    steps = max(seconds - start - guard, 0.0)
    attack = steps * attack_share
    at_end = "the attacks" if files.detection is None else "precision"
    known = (
        ("start-up", "measured: until the rate was steady", start, 3),
        ("passes for the weights", "the rest of the training", steps - attack, 0),
        ("attack", "estimated from the passes", attack, 1),
        ("guard", "measured: its checks", guard, 2),
        ("evaluation", f"measured: {at_end} at the end", number_or_0(evaluation), 4),
    )
    whole = sum(length for _, _, length, _ in known)
    return [
        Part(name, note, length, length / whole, tone)
        for name, note, length, tone in known
        if length > 0
    ]


def number_or_0(value: Any) -> float:
    """A number of a JSON file; 0 of anything else."""
    return float(value) if is_number(value) else 0.0
