"""The networks of a picture, side by side, and the images that are shown of their data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.threat import AnyThreatModel, L2ThreatModel, row_norms
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.attacks import cross_entropy, is_correct, logits_of
from freeadv_fast.evaluation.report import LONGEST_LABEL, drawable
from freeadv_fast.evaluation.sample import Sample
from freeadv_fast.runs.saved import SavedRun

# Runs side by side: more of them leave no room for their images.
MOST_RUNS = 4


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network that is drawn.

    Attributes:
        label: Its name in pictures.
        run: Its run.
        network: Network of (n, 3, H, W) pixels in [0, 1], in eval mode, on the device.
    """

    label: str
    run: SavedRun
    network: nn.Module


def line_up(runs: Sequence[SavedRun], device: torch.device) -> list[Subject]:
    """Brings runs of the same data onto the device, each under a name of its own.

    A run is named after its method; where two have the same one, all are named after their folders.

    Raises:
        UserError: too many runs, or runs of different data.
    """
    if len(runs) > MOST_RUNS:
        raise UserError(f"RUN: {len(runs)} runs; at most {MOST_RUNS} fit side by side")
    first = runs[0]
    for run in runs[1:]:
        _refuse_other_data(first, run)
    labels = [_method_in_words(run.config) for run in runs]
    if len(set(labels)) < len(runs):
        labels = [drawable(run.folder.root.resolve().name, LONGEST_LABEL) for run in runs]
    return [
        Subject(label, run, run.network.to(device)) for label, run in zip(labels, runs, strict=True)
    ]


def _refuse_other_data(first: SavedRun, other: SavedRun) -> None:
    """Raises UserError where two runs see different images."""
    for name in ("data", "image_size"):
        own, its = getattr(first.config, name), getattr(other.config, name)
        if own != its:
            raise UserError(
                f"RUN {other.folder.root}: its --{name.replace('_', '-')} {its} is not the {own} "
                f"of {first.folder.root}; pictures compare runs of the same images"
            )
    if first.classes != other.classes:
        raise UserError(
            f"RUN {other.folder.root}: its classes are not those of {first.folder.root}; pictures "
            "compare runs of the same images"
        )


def _method_in_words(config: TrainConfig) -> str:
    """``free m=4``, ``natural``."""
    return f"{config.method} m={config.m}" if config.method == "free" else config.method


def choose(sample: Sample, subjects: Sequence[Subject], count: int) -> Sample:
    """Images to show: evenly spaced among those that every network classifies right.

    Where these are too few, others follow in their order.
    """
    is_right = torch.stack(
        [
            is_correct(logits_of(subject.network, sample.images, sample.at_once), sample.labels)
            for subject in subjects
        ]
    ).all(0)
    right, rest = is_right.nonzero().squeeze(1), (~is_right).nonzero().squeeze(1)
    if len(right) >= count:
        spaced = torch.linspace(0, len(right) - 1, count).round().long()
        return sample.rows(right[spaced.to(right.device)])
    return sample.rows(torch.cat([right, rest])[:count].sort().values)


def input_gradient(network: nn.Module, sample: Sample) -> Tensor:
    """(n, 3, H, W) gradient of the attacks' loss at the images; each image's own.

    It points where the cross entropy's does, and never underflows.
    """
    parts = zip(
        sample.images.split(sample.at_once), sample.labels.split(sample.at_once), strict=True
    )
    gradients: list[Tensor] = []
    for images, labels in parts:
        points = images.detach().requires_grad_()
        with torch.enable_grad():
            loss = cross_entropy(network(points), labels)
        gradients += torch.autograd.grad(loss, points)
    return torch.cat(gradients)


def ball_directions(
    gradient: Tensor, threat: AnyThreatModel, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The adversarial and a random direction of a ball, each as long as its radius.

    In L-infinity the gradient's sign and random signs (Rademacher), in L2 the gradient and noise
    at length 1, times eps.

    Args:
        gradient: (n, 3, H, W). threat: Gives ball and radius. generator: Source of the noise.
    """
    noise = torch.empty_like(gradient).normal_(generator=generator)
    if isinstance(threat, L2ThreatModel):
        largest = gradient.abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo().tiny)
        gradient = gradient / largest
        pair = gradient / row_norms(gradient).clamp_min(1), noise / row_norms(noise)
    else:
        pair = gradient.sign(), noise.sign()
    ascent, random = (direction * float(threat.eps) for direction in pair)
    return ascent, random
