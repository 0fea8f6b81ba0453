"""Accuracies as people read them: beside the attack's steps and what chance explains."""

from __future__ import annotations

from collections.abc import Mapping

from freeadv_fast.config.attack import Attack
from freeadv_fast.evaluation.evaluate import Evaluation
from freeadv_fast.evaluation.tables import results_table
from freeadv_fast.runs.chance import wilson_interval

# From here on the interval is narrower than +-1.4 points, whatever the accuracy.
ENOUGH_IMAGES = 5000


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
    return "\n".join([results_table(rows), *part_lines(measured)])


def part_lines(measured: Evaluation) -> list[str]:
    """A line for each attack of several parts: what stood after each of them."""
    return [
        f"{name}, seed {measured.seed}: of {measured.num_images:,} images "
        + ", ".join(f"{share:.1%} stand {part}" for part, share in parts.items())
        for name, parts in measured.attack_parts.items()
    ]


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
    """What makes an attack weak or strong, a column each; no step: there is no attack.

    AutoAttack's parts have steps of their own, and choose their length.
    """
    attack = None if step is None else Attack.parse(name)
    has_steps = attack is not None and attack.steps > 0
    return {
        "attack": name,
        "steps": attack.steps if attack and has_steps else None,
        "step": step if attack and attack.has_step else "-",
        "restarts": attack.restarts if attack and has_steps else None,
    }


def _row(name: str, step: str | None, accuracy: float, num_images: int) -> dict[str, object]:
    """One accuracy; without a step it is a clean one."""
    return attack_columns(name, step) | {
        "images": num_images,
        "accuracy": accuracy,
        "95% interval": interval_text(accuracy, num_images),
    }
