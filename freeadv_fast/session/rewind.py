"""What follows a collapse: the way back to the last good state of a run, and on from there.

A rewind puts back everything that a checkpoint holds (weights and their average, running
statistics, optimizer, scaler, perturbation, sums, random generators, the position in the data and
in the schedule). What the lost work cost stays counted: `passes`, `attack_passes` and
`train_seconds` go on.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from freeadv_fast.config.choices import OnCollapse
from freeadv_fast.distributed.world import World
from freeadv_fast.session.guard import GOOD_SHARE, MAX_COLLAPSES, Count, History
from freeadv_fast.session.method import build_own_method
from freeadv_fast.session.resume import rank_state, restore, to_cpu
from freeadv_fast.session.run import Run

CONSEQUENCES: dict[OnCollapse, str] = {
    "stop": "training stops",
    "restore": "training goes on at half the learning rate",
    "gradalign": "training goes on with GradAlign",
}


def judge(run: Run, count: Count) -> bool:
    """Notes a check; keeps a good state, and rewinds a run whose robustness collapsed.

    Args:
        run: The run, at a minibatch boundary.
        count: Held-out images that stood, over all ranks.

    Returns:
        Whether the run was rewound: its position is another one now, and it may be complete.
    """
    history = run.guard.history
    best = history.best
    if history.add(count):
        rewind(run, best, count)
        return True
    if count.accuracy >= GOOD_SHARE * best.accuracy:
        run.guard.good = snapshot(run)
    return False


def begin_anew(run: Run) -> None:
    """Forgets the checks before a phase: accuracies at two image sizes do not compare."""
    run.guard.history.forget()
    run.guard.good = snapshot(run)


def rewind(run: Run, best: Count, now: Count) -> None:
    """Puts the last good state back, changes what must change, and says so in one line."""
    guard, progress, config = run.guard, run.progress, run.config
    assert guard.good is not None  # the check that set a best left one
    action = answer(guard.history, config.on_collapse)
    collapse = {
        "detected_at_passes": progress.passes,
        "epoch": epochs_done(run),
        "robust_accuracy_before": best.accuracy,
        "robust_accuracy_after": now.accuracy,
        "action": action,
        "restores": len(guard.history.collapses) + 1,
    }
    # Optimizers keep the tensors that they load: the good state must stay as it is.
    good = copy.deepcopy(guard.good)
    vars(guard.history).update(vars(History.of(good["guard"])))  # the learning rate reads this one
    progress.epoch, progress.minibatch = (good["progress"][k] for k in ("epoch", "minibatch"))
    build_own_method(run)  # the good state may be of another phase
    restore(good, config, run.world, run.model, run.learner, run.method)
    guard.history.collapses.append(collapse | {"rewound_to_update": run.learner.updates})
    if action == "gradalign":
        build_own_method(run)
    guard.good = snapshot(run)  # another rewind goes back to here, with the method of now
    run.log.say(
        f"warning: catastrophic overfitting, seen in epoch {collapse['epoch']:.2f} after "
        f"{progress.passes:,} passes: robust accuracy fell from {best.accuracy:.1%} to "
        f"{now.accuracy:.1%}; back at epoch {epochs_done(run):.2f}, {CONSEQUENCES[action]} "
        f"(--on-collapse {config.on_collapse}, collapse {len(guard.history.collapses)} of at most "
        f"{MAX_COLLAPSES})"
    )


def epochs_done(run: Run) -> float:
    """Data epochs that led to the present weights, with the fraction."""
    progress = run.progress
    return round(progress.epoch + progress.minibatch / run.loaders.train.num_batches, 4)


def answer(history: History, asked: OnCollapse) -> OnCollapse:
    """What the user asked for; a lower rate where GradAlign is on already; at last a stop."""
    if len(history.collapses) + 1 >= MAX_COLLAPSES:
        return "stop"
    return "restore" if asked == "gradalign" and history.collapses else asked


def snapshot(run: Run) -> dict[str, Any]:
    """A copy of a run's state in memory, weights on the device, in the form of a checkpoint.

    Under ``ranks`` there is this rank's own part only; `gathered` brings the others.
    """
    return copy.deepcopy(
        {
            "model": run.model.state_dict(),
            "learner": run.learner.state_dict(),
            "average": run.learner.average and run.learner.average.state_dict(),
            "progress": dataclasses.asdict(run.progress),
            "guard": run.guard.history.state_dict(),
            "ranks": {run.world.rank: rank_state(run)},
        }
    )


def gathered(state: dict[str, Any], world: World) -> dict[str, Any]:
    """A snapshot as rank 0 writes it; all ranks together."""
    own = to_cpu(state["ranks"][world.rank])
    return state | {"ranks": world.gather_on_host(own)}
