"""Averaged weights of a run: put into the network's place, saved, and gone on from.

Training goes on from the plain weights, and the guard checks these: a collapse shows in them first.
What is chosen, evaluated and exported are the averages, beside the plain last weights.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from freeadv_fast.runs import checkpoint
from freeadv_fast.session.run import Run
from freeadv_fast.step.learner import Learner


@contextlib.contextmanager
def weights_of(run: Run, state: dict[str, Any]) -> Iterator[None]:
    """Within the block the network has other weights, afterwards its own again.

    Args:
        run: The run.
        state: What best.pt holds, or `average_state`.
    """
    own = copy.deepcopy(run.model.state_dict())  # a module of the user's may keep more than tensors
    origin = "the average" if "decay" in state else checkpoint.BEST
    try:
        checkpoint.load_weights(run.model, state, run.config.arch, origin)
        yield
    finally:
        run.model.load_state_dict(own)


@contextlib.contextmanager
def chosen_among(run: Run) -> Iterator[None]:
    """Within the block the network is what held-out images choose among.

    Its averaged weights where there are some, and running statistics that are the ranks' mean.
    """
    average = average_state(run)
    own = checkpoint.averaged_buffers(run.model, run.world)
    with own if average is None else weights_of(run, average):
        yield


def average_state(run: Run) -> dict[str, Any] | None:
    """A run's average as a checkpoint holds it; None where there is none. All ranks together.

    Weights are the same on every rank; averaged running statistics are the ranks' mean, as those
    are of which they are averages.
    """
    average, world = run.learner.average, run.world
    if average is None:
        return None
    state = average.state_dict()
    if world.size > 1:
        for name, value in average.statistics.items():
            state["model"][name] = world.sum_(value.clone()).div_(world.size)
    return state


def own_statistics(learner: Learner) -> dict[str, Any] | None:
    """What each rank has of its own in the average; None where there is none."""
    return None if learner.average is None else learner.average.statistics


def restore_average(learner: Learner, state: dict[str, Any], rank: int) -> None:
    """Goes on with a checkpoint's average; of another decay, or of none, it begins anew.

    Args:
        learner: With the checkpoint's weights.
        state: The checkpoint, or a state to rewind to.
        rank: Whose running statistics to take, where the checkpoint is of as many ranks.
    """
    average, saved = learner.average, state.get("average")
    if average is None:
        return
    if saved is None or saved["decay"] != average.decay:
        average.restart()
        return
    average.load_state_dict(saved)
    if state["ranks"] is not None:
        average.load_statistics(state["ranks"][rank]["average"])
