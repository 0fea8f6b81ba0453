"""Accuracy over the attack's radius and over its steps: whether a robust number can be believed.

Carlini et al. 2019, "On Evaluating Adversarial Robustness", sections 5.2 and 5.3: accuracy must
reach 0 as the radius grows, and settle as the steps do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from freeadv_fast.config.attack import Attack, step_across
from freeadv_fast.config.threat import AnyThreatModel, L2ThreatModel, Perturbation
from freeadv_fast.evaluation.attacks import is_correct, logits_of, perturb
from freeadv_fast.evaluation.audit.paired import TOLERANCE, Paired
from freeadv_fast.evaluation.pictures.subjects import Subject
from freeadv_fast.evaluation.report import (
    GREY,
    STYLE,
    SWEEP_COLORS,
    SWEEP_MARKS,
    save,
)
from freeadv_fast.evaluation.sample import Sample
from freeadv_fast.runs.chance import wilson_interval

STEPS = (1, 2, 5, 10, 20, 50, 100)
# Where a curve should have settled: what falls later warns.
SETTLED = 20
# Steps of the attacks over the radius.
STEPS_OVER_EPS = 20
# Radii, in those of the run; the last is the whole range of pixels.
SHARES = tuple(map(Fraction, ("1/4", "1/2", "3/4", "1", "3/2", "2", "3", "4", "6", "8", "12",
                              "16", "24", "32", "48", "64")))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Curve:
    """Accuracies of one network.

    Attributes:
        label: The network's name.
        over_eps: Radius in grey levels to accuracy; 0 is the clean one. It ends where no image
            stands, or at the whole range of pixels.
        over_steps: Steps to accuracy at the run's radius.
        falling: Images that fell after `SETTLED` steps.
    """

    label: str
    over_eps: dict[Fraction, float]
    over_steps: dict[int, float]
    falling: Paired

    @property
    def has_settled(self) -> bool:
        """Whether chance explains what fell after `SETTLED` steps."""
        return not self.falling.is_beyond_chance


def measure(subject: Subject, sample: Sample, threat: AnyThreatModel, *, seed: int) -> Curve:
    """Attacks the images at growing radii, and at the run's radius with more and more steps.

    Every attack is PGD from the same random start, in K steps of 2.5 eps / K. An image that a
    smaller radius or fewer steps have fooled counts as fooled.

    Args:
        subject: The network.
        sample: The images.
        threat: The run's ball.
        seed: Seed of the random starts.
    """
    logits = logits_of(subject.network, sample.images, sample.at_once)
    clean = is_correct(logits, sample.labels)

    def standing_after(eps: Perturbation, steps: int, standing: Tensor) -> Tensor:
        ball = type(threat)(eps, step_across(eps, steps))
        fooled = perturb(
            subject.network,
            sample.images,
            sample.labels,
            attack=Attack("pgd", steps),
            threat=ball,
            generator=torch.Generator(sample.images.device).manual_seed(seed),
            is_standing=standing,
            at_once=sample.at_once,
        ).is_fooled
        return ~fooled

    standing, over_eps = clean, {Fraction(0): _share(clean)}
    for eps in _radii(threat, sample):
        if not standing.any():
            break
        standing = standing_after(eps, STEPS_OVER_EPS, standing)
        over_eps[eps.levels] = _share(standing)
    by_steps, standing = {}, clean
    for steps in STEPS:
        by_steps[steps] = standing = standing_after(threat.eps, steps, standing)
    return Curve(
        subject.label,
        over_eps,
        {steps: _share(left) for steps, left in by_steps.items()},
        Paired.of(~by_steps[STEPS[-1]], ~by_steps[SETTLED]),
    )


def _share(standing: Tensor) -> float:
    """The fraction of the images that stand."""
    return int(standing.sum()) / len(standing)


def _radii(threat: AnyThreatModel, sample: Sample) -> list[Perturbation]:
    """The radii, up to the one from which any image can be reached."""
    widest = Fraction(255)
    if isinstance(threat, L2ThreatModel):
        widest = Fraction(round(255 * sample.images[0].numel() ** 0.5))
    levels = [share * threat.eps.levels for share in SHARES]
    return [Perturbation(radius) for radius in (*(r for r in levels if r < widest), widest)]


def curves_record(
    curves: Sequence[Curve],
    subjects: Sequence[Subject],
    threat: AnyThreatModel,
    num_images: int,
    seed: int,
) -> dict[str, Any]:
    """What robustness-curves.json holds: every point with its 95 % interval."""

    def point(accuracy: float) -> dict[str, float]:
        low, high = wilson_interval(accuracy, num_images)
        return {"accuracy": accuracy, "low": round(low, 4), "high": round(high, 4)}

    return {
        "eps": str(threat.eps),
        "norm": "l2" if isinstance(threat, L2ThreatModel) else "linf",
        "num_images": num_images,
        "seed": seed,
        "networks": [
            {
                "label": curve.label,
                "run": subject.run.folder.root.name,
                "checkpoint": subject.run.weights,
                "over_eps": [
                    {"eps": str(Perturbation(levels)), "steps": STEPS_OVER_EPS} | point(accuracy)
                    for levels, accuracy in curve.over_eps.items()
                ],
                "over_steps": [
                    {"steps": steps, "step": str(step_across(threat.eps, steps))} | point(accuracy)
                    for steps, accuracy in curve.over_steps.items()
                ],
                "fell_after_20_steps": curve.falling.only_first,
                "has_settled": curve.has_settled,
            }
            for curve, subject in zip(curves, subjects, strict=True)
        ],
    }


def plot_curves(
    curves: Sequence[Curve], threat: AnyThreatModel, num_images: int, path: Path
) -> None:
    """Draws accuracy over the radius on the left and over the steps on the right.

    Args:
        curves: The networks.
        threat: The run's ball.
        num_images: Images that were attacked; bands are their 95 % intervals.
        path: PNG to write.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 4.5), layout="constrained")
        over_eps, over_steps = figure.subplots(1, 2, sharey=True)
        # What stands longer is masked, and would squeeze all others; the caption tells of it.
        widest = 8 * threat.eps.levels
        for number, curve in enumerate(curves):
            radii = {float(levels): a for levels, a in curve.over_eps.items() if levels <= widest}
            _line(over_eps, radii, num_images, number, curve.label)
            _line(over_steps, curve.over_steps, num_images, number, curve.label)
        unit = "L2 radius eps (1/255)" if isinstance(threat, L2ThreatModel) else "eps (1/255)"
        over_eps.set(title=f"PGD-{STEPS_OVER_EPS} at growing eps", xlabel=unit)
        over_eps.set(ylabel="images classified correctly", ylim=(0, 1), xlim=(0, None))
        over_eps.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        over_eps.axvline(float(threat.eps.levels), color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
        over_eps.text(
            float(threat.eps.levels), 0.985, " the run's", color=GREY, fontsize=8, va="top"
        )
        over_steps.set(title=f"More steps at eps {threat.eps}", xlabel="steps of PGD", xscale="log")
        over_steps.set_xticks(STEPS, map(str, STEPS))
        over_steps.minorticks_off()
        over_eps.legend(loc="upper right")
        figure.supxlabel(_caption(curves, num_images), fontsize=8, color=GREY)
        save(figure, path)


def _line(axes: Axes, points: dict[Any, float], num_images: int, number: int, label: str) -> None:
    """Draws one network's accuracies and the band that chance explains."""
    color, places = SWEEP_COLORS[number % len(SWEEP_COLORS)], list(points)
    bounds = [wilson_interval(accuracy, num_images) for accuracy in points.values()]
    axes.fill_between(
        places, [low for low, _ in bounds], [high for _, high in bounds],
        color=color, alpha=0.13, linewidth=0,
    )  # fmt: skip
    mark = SWEEP_MARKS[number % len(SWEEP_MARKS)]
    axes.plot(places, list(points.values()), color=color, marker=mark, markersize=4, label=label,
              clip_on=False)  # fmt: skip


def _caption(curves: Sequence[Curve], num_images: int) -> str:
    """What the bands are, how to read the curves, and which network should be doubted."""
    bands = f"{num_images} images, bands of 95 %. Every attack of K steps takes 2.5 eps / K a step."
    doubts = [
        f"{curve.label}: {curve.falling.only_first} fell after {SETTLED} steps, beyond chance"
        for curve in curves
        if not curve.has_settled
    ]
    for curve in curves:
        widest, standing = list(curve.over_eps.items())[-1]
        if wilson_interval(standing, num_images)[0] > TOLERANCE:
            doubts.append(f"{curve.label}: {standing:.0%} stand at {Perturbation(widest)}")
    if doubts:
        return "\n".join([bands, "Masked gradients?", *doubts])
    return (
        f"{bands}\nA curve that keeps falling after {SETTLED} steps, or never reaches 0, warns of "
        "masked gradients; none here does, beyond chance."
    )
