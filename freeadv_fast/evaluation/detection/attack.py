"""PGD on a detector: points of the L-infinity ball around each image that raise its loss.

The loss is the sum of class and box loss, each image's over its own objects, so that no image's
gradient depends on another image. Padding stays as it is: the start has no noise there, and what
the detector does not see has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from freeadv_fast.config.attack import Attack
from freeadv_fast.config.threat import AnyThreatModel, L2ThreatModel
from freeadv_fast.data.loader import Batch
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.attacks import project, random_point
from freeadv_fast.evaluation.detection.predict import PixelDetector
from freeadv_fast.evaluation.evaluate import start_generator
from freeadv_fast.step.objects import Objects


def parse_attacks(
    names: Sequence[Attack | str], threat: AnyThreatModel, flag: str = "--attacks"
) -> list[Attack]:
    """Attacks on a detector by their names.

    Args:
        names: ``pgd-STEPS`` each.
        threat: Their ball.
        flag: The flag to name when one is refused.

    Raises:
        UserError: another attack, restarts, of which mean precision has no worst, or another ball.
    """
    attacks = [Attack.parse(name, flag) for name in names]
    for attack in attacks:
        if attack.loss != "pgd":
            raise UserError(
                f"{flag} {attack}: fools classifiers; a detector takes pgd-STEPS, such as pgd-10"
            )
        if attack.restarts > 1:
            raise UserError(
                f"{flag} {attack}: precision is over all images and has no worst restart of one; "
                f"use pgd-{attack.steps}"
            )
        if isinstance(threat, L2ThreatModel):
            raise UserError(f"{flag} {attack}: a detector is attacked in linf, not in l2")
    return attacks


def perturb(
    network: PixelDetector,
    images: Tensor,
    batch: Batch,
    *,
    attack: Attack,
    threat: AnyThreatModel,
    seed: int,
) -> Tensor:
    """`attack.steps` sign steps from a uniform point, each projected onto the ball and [0, 1].

    Args:
        network: In eval mode; no parameter asks for a gradient.
        images: (n, 3, H, W) float32 pixels in [0, 1], centres of the balls.
        batch: Their targets; the start is a function of (seed, its first index).
        attack: Gives the steps. threat: Radius of the ball and length of a step.
        seed: The run's.

    Returns:
        (n, 3, H, W) float32 points.
    """
    targets = batch.labels
    is_image = Objects.of(targets).is_image(*images.shape[2:])
    generator = start_generator(seed, int(batch.indices[0]), images.device)
    start = images + random_point(images, threat, generator) * is_image
    points = project(start, images, threat)
    for _ in range(attack.steps):
        points.requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(network.loss_sum(points, targets), points)
        direction = gradient.nan_to_num(0, 0, 0).sign()
        points = points.detach().add_(direction, alpha=float(threat.step))
        points = project(points, images, threat)
    return points
