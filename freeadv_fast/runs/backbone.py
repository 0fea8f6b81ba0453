"""A detector's first weights: a classifier's for its backbone, or another detector's."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from freeadv_fast.errors import UserError
from freeadv_fast.models.batch_norm import branch_parameters, without_auxiliary
from freeadv_fast.models.retinanet import Detector
from freeadv_fast.runs.foreign import (
    find_weights,
    first_misfit,
    named_as,
    other_head,
    without_spare,
)

# What torchvision's pyramids and towers of convolutions were called before 0.13.
OLD_PYRAMID = re.compile(r"(\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$")
OLD_TOWER = re.compile(r"(_head\.conv)\.(\d+)\.(weight|bias)$")


def load_into_detector(
    detector: Detector, state: dict[str, Any], arch: str, origin: str
) -> list[str]:
    """Loads what a checkpoint holds for a detector: all of it, or its backbone's weights.

    Args:
        detector: Not wrapped.
        state: What `checkpoint.load_checkpoint` returned: a detector's, or of a classifier with
            torchvision's names, whose last layer is left out.
        arch: The detector's name, for the message.
        origin: Flag and path to name when nothing fits.

    Returns:
        What the user should know, a line.

    Raises:
        UserError: there is no backbone of this kind.
    """
    found = find_weights(state)
    if not found:
        raise UserError(f"{origin}: holds no weights")
    weights = _named_for(detector, _upgraded(found))
    own = detector.state_dict()
    classifier = other_head(own, weights)
    if not first_misfit(own, weights | {key: own[key] for key in classifier}):
        detector.load_state_dict(weights | {key: own[key] for key in classifier})
        afresh = "; it is for other classes, its classifier starts afresh" if classifier else ""
        return [f"{origin}: a detector's weights{afresh}"]
    body = detector.backbone.body
    weights = _named_for(body, found)
    weights = {key: w for key, w in weights.items() if not key.startswith("fc.")}
    misfit = first_misfit(body.state_dict(), weights)
    if misfit:
        raise UserError(f"{origin}: holds no backbone of --arch {arch} ({misfit})")
    body.load_state_dict(weights)
    return [f"{origin}: the backbone's weights; pyramid and head start afresh"]


def _named_for(module: nn.Module, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under a module's names, without a branch and a normaliser that it has not."""
    own = module.state_dict()
    weights = without_spare(own, named_as(own.keys(), found))
    return weights if branch_parameters(module)[1] else without_auxiliary(weights)


def _upgraded(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under torchvision's newer names, which its own modules give them on loading.

    A tower's convolutions stood at 0, 2, 4 and 6 in its Sequential, activations between them.
    """

    def newer(tower: re.Match[str]) -> str:
        return f"{tower[1]}.{int(tower[2]) // 2}.0.{tower[3]}"

    return {OLD_TOWER.sub(newer, OLD_PYRAMID.sub(r"\1.0.\2", key)): w for key, w in weights.items()}
