"""What a checkpoint keeps of its training images, and what a resumed run makes of it.

The images that a run holds out stay held out as long as they are there, and none that was trained
on takes their place: the best weights and the guard would be judged by images known to the network.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from freeadv_fast.config.file import config_to_dict
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.build import OpenedData
from freeadv_fast.data.index import shortened
from freeadv_fast.data.roll import Changes, Roll
from freeadv_fast.data.stream import Keys
from freeadv_fast.errors import UserError

BEFORE_NAMES = (
    "the checkpoint is from before images were known by their names: their order, their crops and "
    "the held-out images are drawn anew"
)


class Recognised(NamedTuple):
    """A resumed run's data.

    Attributes:
        held_out: Keys of the images that the run holds out; None where they are to be drawn.
        lines: What the user should know, a line each.
    """

    held_out: Keys | None
    lines: list[str]


def recognise(state: dict[str, Any], config: TrainConfig, opened: OpenedData) -> Recognised:
    """Compares the training images with those that a checkpoint is of.

    Args:
        state: The checkpoint. config: The resumed run.
        opened: Its data; under another path than before, they may lack images but hold no others.

    Raises:
        UserError: other classes, other unlabelled images, or other images under another path.
    """
    saved, now = state["config"], config_to_dict(config)
    moved = [name for name in ("data", "phase_data") if saved.get(name) != now[name]]
    _refuse_other_classes(state["classes"], opened.roll.classes, config)
    _refuse_other_unlabelled(state, config, opened)
    if "data" not in state:
        if moved:
            raise UserError(
                f"--data {config.data}: the checkpoint is from before images were known by their "
                f"names, and cannot tell whether these are the same; resume it with "
                f"--data {saved['data']}"
            )
        return Recognised(None, [BEFORE_NAMES])
    changes = Changes.between(Roll.from_state(state["data"]["roll"]), opened.roll)
    if moved and (changes.came or changes.altered):
        raise UserError(
            f"--data {config.data}: not the images that the run was trained on under "
            f"{saved['data']}: {changes}; resume it with those, or choose another --output-dir"
        )
    lines = []
    if changes:
        lines.append(
            f"training images changed since the checkpoint: {changes}; the others keep their "
            "order, their crops and their side of the split"
        )
    return Recognised(state["data"]["held_out"].numpy().view(np.uint64), lines)


def _refuse_other_classes(before: list[str], now: list[str], config: TrainConfig) -> None:
    """Raises UserError where a label would mean another class than it did."""
    if before == now:
        return
    left, came = (sorted(set(one) - set(other)) for one, other in ((before, now), (now, before)))
    raise UserError(
        f"--data {config.data}: its classes are not those that the run was trained on: "
        f"{shortened(left) or 'none'} left, {shortened(came) or 'none'} came; resume it with the "
        "same classes"
    )


def _refuse_other_unlabelled(
    state: dict[str, Any], config: TrainConfig, opened: OpenedData
) -> None:
    """Raises UserError where the unlabelled images are not the checkpoint's, whatever their path.

    Their order is drawn from their number, and which of them changed is not known.
    """
    saved, before = state.get("data", {}).get("unlabelled"), state["config"].get("unlabelled")
    if saved is None and config.unlabelled is None:
        return
    if saved is None:
        raise UserError(
            f"--unlabelled {config.unlabelled}: the run was made without; leave it out, or choose "
            "another --output-dir"
        )
    if opened.unlabelled is None:
        raise UserError(
            f"--unlabelled None: the run was made with {before}; resume it with that, or choose "
            "another --output-dir"
        )
    if Roll.from_state(saved).digest != opened.unlabelled.roll.digest:
        raise UserError(
            f"--unlabelled {config.unlabelled}: not the images that the run was trained on under "
            f"{before}; resume it with those, or choose another --output-dir"
        )
