"""What a checkpoint holds of each rank, and the way back to it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from freeadv_fast.config.file import config_from_dict
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.distributed.world import World
from freeadv_fast.errors import UserError
from freeadv_fast.methods.build import TrainingMethod
from freeadv_fast.runs import checkpoint
from freeadv_fast.runs.json_file import read_json
from freeadv_fast.runs.log import RunFolder
from freeadv_fast.session.averages import own_statistics, restore_average
from freeadv_fast.session.changes import changes_for_ranks, refuse_fixed, with_consequences
from freeadv_fast.session.run import Progress, Run, say
from freeadv_fast.step.learner import Learner

# Same machine, versions, ranks and threads: what bit-identical resumption rests on.
REPRODUCIBLE_WITH = ("hardware", "versions", "threads", "ranks")


def find_checkpoint(config: TrainConfig, world: World, folder: RunFolder) -> dict[str, Any] | None:
    """The state to resume from: rank 0 chooses the file, every rank reads it."""
    path = world.on_main(lambda: checkpoint.newest_intact(folder.checkpoints))
    if path is None:
        say(world, f"--resume: no checkpoint in {folder.checkpoints}; starting from the beginning")
        return None
    say(world, f"resuming from {path}")
    if world.is_main and (folder.checkpoints / checkpoint.DAMAGED).exists():
        say(world, f"the damaged {checkpoint.LAST} is kept as {checkpoint.DAMAGED}")
    state = checkpoint.load_checkpoint(path)
    if not {"config", "learner", "progress", "ranks"} <= state.keys():
        raise UserError(f"--resume: {path} holds weights only; start a run with --init-from {path}")
    if not {"guard", "good"} <= state.keys():
        raise UserError(
            f"--resume: {path} is from an older version of freeadv_fast; finish the run with that, "
            f"or start one with --init-from {path}"
        )
    saved = config_from_dict(state["config"], f"--resume {path}")
    state.setdefault("made_for", len(state["ranks"]))  # a run that has always had as many
    changed = changes_for_ranks(saved, config, state["made_for"], world.size)
    refuse_fixed(changed, saved, config, folder.root)
    if changed:
        say(world, f"changed: {with_consequences(changed, saved, config)}")
    return state if len(state["ranks"]) == world.size else without_ranks(state, world)


def as_made(config: TrainConfig, state: dict[str, Any]) -> TrainConfig:
    """The config with what a checkpoint's run keeps: minibatches of the ranks it was made for."""
    saved = config_from_dict(state["config"])
    precision = saved.precision if config.precision == "auto" else config.precision
    return dataclasses.replace(
        config, batch_size=saved.batch_size, phases=saved.phases, precision=precision
    )


def without_ranks(state: dict[str, Any], world: World) -> dict[str, Any]:
    """A checkpoint of another number of ranks, of which nothing is left that is a rank's own."""
    say(
        world,
        f"ranks: {world.size} (was {len(state['ranks'])}); the global minibatches stay the same, "
        "perturbation and generators start anew, running statistics from the ranks' mean; batch "
        "norm sees a rank's new share, unless --bn-group limits it",
    )
    return state | {"ranks": None, "good": None}


def rank_state(run: Run) -> dict[str, Any]:
    """What each rank has of its own: perturbation, sums, generators, running statistics.

    And of an average those of its running statistics.
    """
    return {
        "method": run.method.state_dict(),
        "meters": run.learner.meters.state_dict(),
        "random": checkpoint.random_state(run.world.device),
        "buffers": checkpoint.batch_norm_buffers(run.model),
        "average": own_statistics(run.learner),
    }


def restore(
    state: dict[str, Any],
    config: TrainConfig,
    world: World,
    model: nn.Module,
    learner: Learner,
    method: TrainingMethod,
) -> Progress:
    """Puts every part back where the checkpoint left it.

    Where an average begins or is dropped, best.pt starts anew, as in a new phase: held-out images
    do not choose between plain weights and averages.
    """
    checkpoint.load_weights(model, state, config.arch, "--resume")
    learner.load_state_dict(state["learner"])
    if state["ranks"] is not None:  # of as many ranks as there are
        own = state["ranks"][world.rank]
        for name, buffer in checkpoint.batch_norm_buffers(model).items():
            buffer.copy_(own["buffers"][name])
        learner.meters.load_state_dict(own["meters"])
        method.load_state_dict(own["method"])
        checkpoint.restore_random_state(own["random"], world.device)
    restore_average(learner, state, world.rank)
    progress = Progress(**state["progress"])
    if (state.get("average") is None) != (learner.average is None):
        progress.best_score = -1.0
    return progress


def warn_about_changes(folder: RunFolder, record: dict[str, Any], world: World) -> None:
    """Says what differs from the session before: the rest will then not be bit-identical."""
    if not world.is_main or not folder.environment.exists():
        return
    try:
        before = read_json(folder.environment)
    except ValueError:
        say(world, f"{folder.environment}: not JSON, so that changes since then are not known")
        return
    changed = [key for key in REPRODUCIBLE_WITH if before.get(key) != record.get(key)]
    if changed:
        say(world, f"warning: {', '.join(changed)} changed since the checkpoint (see "
            f"{folder.environment}); the rest of the run will not be bit-identical")  # fmt: skip


def to_cpu(value: Any) -> Any:
    """The same nested state with every tensor on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: to_cpu(entry) for key, entry in value.items()}
    return value
