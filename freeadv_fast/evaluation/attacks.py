"""Attacks for evaluation: untargeted PGD on the cross entropy or on the margin (CW).

The ball is L-infinity, walked in sign steps, or L2, walked in normalised steps.

Everything here is in [0, 1] pixels and fp32; the network is one that `models.normalize` wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freeadv_fast.config.attack import Attack
from freeadv_fast.config.threat import AnyThreatModel, L2ThreatModel, row_norms

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss whose input gradient has the cross entropy's sign, and never underflows.

    Cross entropy is softplus(logsumexp of the other logits - z_y), a rising function of the
    difference that is summed here; a sign step cannot tell the two apart. In fp32 the cross
    entropy's own gradient is exactly 0 once the label leads by more than 103: the attack then
    stands still and the image counts as robust (seen on digits, where a network led by 172).

    Args:
        logits: (N, classes), at least 2 classes; half precision is widened.
        labels: (N,) int64.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels[:, None]
    true_logit = logits.gather(1, labels).squeeze(1)
    other_logits = logits.scatter(1, labels, -torch.inf)
    return (other_logits.logsumexp(1) - true_logit).sum()


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over the batch of -relu(z_y - max over the other classes), kappa = 0.

    So "CW" in Free AT's and Madry's evaluation code: once an image is misclassified its gradient
    is zero and it stays where it is. (Carlini and Wagner 2017 minimise the L2 distance instead.)

    Args:
        logits: (N, classes), at least 2 classes.
        labels: (N,) int64.
    """
    labels = labels[:, None]
    true_logit = logits.gather(1, labels).squeeze(1)
    other_logit = logits.scatter(1, labels, -torch.inf).amax(1)
    return -F.relu(true_logit - other_logit).sum()


LOSSES: dict[str, Loss] = {"pgd": cross_entropy, "cw": margin}


class Perturbed(NamedTuple):
    """What an attack leaves behind.

    Attributes:
        images: (N, 3, H, W) float32: the first point that fooled the network; where none did, the
            last restart's; the clean image where that is misclassified already.
        is_fooled: (N,) bool: whether the network misclassifies the clean image or the point of any
            restart.
    """

    images: Tensor
    is_fooled: Tensor


def is_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) bool: the largest logit is the label's. A row that holds a NaN is wrong."""
    return (logits.argmax(1) == labels) & ~logits.isnan().any(1)


def perturb(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    attack: Attack,
    threat: AnyThreatModel,
    generator: torch.Generator | None = None,
    random_start: bool = True,
    starts: Iterator[Tensor] | None = None,
    is_standing: Tensor | None = None,
    at_once: int | None = None,
) -> Perturbed:
    """Attacks a batch, each restart only those images that still stand.

    Success is an OR over the clean image and the restarts. Keeping the point of larger loss, as the
    reference code does, would overstate robustness: with C classes the cross entropy of a correct
    image can exceed that of a misclassified one (anything up to ln C against ln 2).

    Args:
        model: Network of [0, 1] images, in eval mode: no image's logits depend on another image.
        images: (N, 3, H, W) float32 in [0, 1].
        labels: (N,) int64.
        attack: Loss, steps, restarts.
        threat: Radius of the ball and length of a step.
        generator: Source of the random starts, on the images' device; restart r draws the r-th
            batch of noise for all N images, whichever still stand. None: torch's global one.
        random_start: Start at a uniform point of the ball instead of the image.
        starts: Each restart's (N, 3, H, W) start, before any clip, where the caller draws them.
        is_standing: (N,) bool, `is_correct` of the clean images where the caller has it already.
        at_once: Images that go through the network together, see `batches_of`.

    Returns:
        Points in the ball and in [0, 1], and whether each image fell.
    """
    adversarial = images.clone()
    if is_standing is None:
        is_standing = is_correct(logits_of(model, images, at_once), labels)
    is_standing = is_standing.clone()
    for _ in range(attack.restarts):
        if starts is not None:
            start = next(starts)
        else:
            start = images + random_point(images, threat, generator) if random_start else images
        # The host learns here who still stands, and reads nothing within the steps.
        for rows, count in batches_of(is_standing.nonzero().squeeze(1), at_once):
            points = ascend(
                model, images[rows], labels[rows], start=start[rows], attack=attack, threat=threat
            )
            with torch.no_grad():
                is_right = is_correct(model(points), labels[rows])
            adversarial[rows[:count]] = points[:count]
            is_standing[rows[:count]] = is_right[:count]
    return Perturbed(adversarial, ~is_standing)


def batches_of(rows: Tensor, size: int | None) -> Iterator[tuple[Tensor, int]]:
    """Rows in batches of few sizes: cuDNN chooses and prepares kernels for each of them.

    The last batch is the smallest of size, size / 2, size / 4 and size / 8 that holds what is left,
    filled up with its first row: in eval mode no image's logits depend on another image.

    Args:
        rows: (n,) int64; n may be 0.
        size: Rows of a batch; None for all of them, and none twice.

    Yields:
        Rows of a batch, and how many of them count.
    """
    for part in rows.split(size or max(len(rows), 1)):
        count = len(part)
        if count == 0:
            continue
        sizes = [size // n for n in (8, 4, 2, 1) if size % n == 0] if size else [count]
        fitting = next(s for s in sizes if s >= count)
        yield torch.cat([part, part[:1].expand(fitting - count)]), count


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor, at_once: int | None) -> Tensor:
    """(N, classes) logits of (N, 3, H, W) images, in the batches of `batches_of`."""
    if at_once is None:
        return model(images)  # type: ignore[no-any-return]
    rows = torch.arange(len(images), device=images.device)
    return torch.cat([model(images[part])[:count] for part, count in batches_of(rows, at_once)])


def ascend(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    start: Tensor,
    attack: Attack,
    threat: AnyThreatModel,
) -> Tensor:
    """One restart: `attack.steps` times x <- project(x + step * direction of the gradient at x).

    The direction is the gradient's sign, or in an L2 ball the gradient at length 1.
    The projection is onto the ball around the image, then onto [0, 1]. The gradient is taken with
    respect to the image alone; a non-finite entry moves nothing.

    Args:
        model: Network of [0, 1] images, in eval mode.
        images: (N, 3, H, W) float32 in [0, 1], centres of the balls.
        labels: (N,) int64.
        start: (N, 3, H, W) float32; projected before the first step.
        attack: Loss and steps; restarts are the caller's.
        threat: Radius of the ball and length of a step.

    Returns:
        (N, 3, H, W) float32 points.
    """
    loss = LOSSES[attack.loss]
    points = project(start, images, threat)
    for _ in range(attack.steps):
        points.requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(model(points), labels), points)
        # Not in place: a sum's gradient is one number that all pixels share.
        gradient = gradient.nan_to_num(0, 0, 0)
        if isinstance(threat, L2ThreatModel):
            # Squares below 1e-19 underflow: the largest component becomes 1; zero stays zero.
            gradient /= gradient.abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo().tiny)
            direction = gradient / row_norms(gradient).clamp_min(1)
        else:
            direction = gradient.sign_()
        points = points.detach().add_(direction, alpha=float(threat.step))
        points = project(points, images, threat)
    return points


def project(points: Tensor, images: Tensor, threat: AnyThreatModel) -> Tensor:
    """The nearest points of the ball around each image, clipped to [0, 1]; (N, 3, H, W)."""
    radius = float(threat.eps)
    if isinstance(threat, L2ThreatModel):
        delta = points - images
        delta *= (radius / row_norms(delta).clamp_min(radius)) if radius else 0
        return (images + delta).clamp_(0, 1)
    return torch.clamp(points, (images - radius).clamp_(min=0), (images + radius).clamp_(max=1))


def random_point(
    images: Tensor, threat: AnyThreatModel, generator: torch.Generator | None
) -> Tensor:
    """A uniform point of the ball for each image: (N, 3, H, W), before any clip."""
    radius = float(threat.eps)
    if isinstance(threat, L2ThreatModel):
        direction = torch.empty_like(images).normal_(generator=generator)
        share = torch.empty_like(images[:, :1, :1, :1]).uniform_(generator=generator)
        return direction * (radius * share.pow(1 / images[0].numel()) / row_norms(direction))
    return torch.empty_like(images).uniform_(-radius, radius, generator=generator)
