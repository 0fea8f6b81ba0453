"""Everything a run needs before its first minibatch: folder, data, network, restored state."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from freeadv_fast.config.attack import parsed
from freeadv_fast.config.budget import Budget
from freeadv_fast.config.file import config_from_dict, config_to_dict, load_config
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.written import as_typed
from freeadv_fast.data.agreement import open_together
from freeadv_fast.data.build import deal_images
from freeadv_fast.data.coco.loader import DetectionLoader
from freeadv_fast.data.kept import recognise
from freeadv_fast.data.loader import Loader
from freeadv_fast.distributed.world import World
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.autoattack.package import refuse_unfit
from freeadv_fast.evaluation.detection.evaluate import refuse_unmeasurable
from freeadv_fast.models.own import arch_of, freeze_unused, refuse_unnamed_network
from freeadv_fast.runs.checkpoint import LAST, PREVIOUS
from freeadv_fast.runs.environment import environment
from freeadv_fast.runs.json_file import write_json
from freeadv_fast.runs.lock import FolderLock
from freeadv_fast.runs.log import Forecast, RunFolder, RunLog, save_config
from freeadv_fast.session.changes import (
    BUDGET,
    EVALUATION,
    differences,
    for_ranks,
    in_words,
    refuse_fixed,
)
from freeadv_fast.session.cost import costs_of, until
from freeadv_fast.session.decoding import Decoding
from freeadv_fast.session.guard import History
from freeadv_fast.session.method import (
    build_guard,
    build_phase_method,
)
from freeadv_fast.session.network import build_learner, build_network, resolve_precision
from freeadv_fast.session.resume import (
    as_made,
    find_checkpoint,
    restore,
    warn_about_changes,
)
from freeadv_fast.session.rewind import snapshot
from freeadv_fast.session.run import Clock, Progress, Run, say
from freeadv_fast.session.start import start_lines


def prepare(config: TrainConfig, world: World, own_model: nn.Module | None = None) -> Run | None:
    """Builds a run, restored from its checkpoint when it is resumed.

    Args:
        config: The run.
        world: This process among the others.
        own_model: The caller's network, of which a copy is trained; the config names one otherwise.

    Returns:
        None when the run in the folder is finished and there is nothing to do.

    Raises:
        UserError: data, folder, network or checkpoint cannot be used.
    """
    config = naming_own_network(config, own_model)
    refuse_different_configs(config, world)
    folder = RunFolder(Path(config.run_folder))
    if config.resume and world.on_main(lambda: is_finished(config, folder)):
        return None
    lock = FolderLock(folder.root)
    try:
        return build_run(config, world, own_model, folder, lock)
    except BaseException:
        lock.release()
        raise


def build_run(
    config: TrainConfig,
    world: World,
    own_model: nn.Module | None,
    folder: RunFolder,
    lock: FolderLock,
) -> Run:
    """`prepare` of a run that is not finished.

    Args:
        config: The run, as it is asked for. world: This process among the others.
        own_model: The caller's network, or None.
        folder: The run's. lock: Of that folder, which is taken as soon as it is read or written.
    """
    state = None
    if config.resume:
        world.on_main(lambda: take(lock) if folder.root.is_dir() else None)
        state = find_checkpoint(config, world, folder)
    if state is not None:
        config = as_made(config, state)
    made_for = state["made_for"] if state else world.size
    recorded = with_precision(config, world)
    config = for_ranks(recorded, made_for, world.size)
    refuse_empty_exchange(config, world)
    opened, held_out = open_together(config, world), None
    if state is not None:
        held_out, lines = world.together(lambda: recognise(state, config, opened))
        for line in lines:
            say(world, line)
    phase_loaders = world.together(lambda: deal_images(config, world, opened, held_out))
    classes = phase_loaders[-1].train.classes
    world.together(lambda: refuse_unfit_evaluation(config, phase_loaders[-1].val))
    budget = Budget.of(config, [loaders.train.num_batches for loaders in phase_loaders])
    if state is not None:
        refuse_spent_budget(config, state, budget)
    torch.manual_seed(config.seed)
    model = world.together(
        lambda: build_network(config, classes, is_fresh=state is None, own=own_model)
    )
    if own_model is not None and (unused := freeze_unused(model, config.image_size)):
        say(world, f"not in the network's output, left as they are: {', '.join(unused)}")
    learner = build_learner(model, config, world, budget)
    model = learner.network
    phase = budget.phase_of(state["progress"]["epoch"]) if state else 0
    history = History.of(state["guard"]) if state else History()
    learner.lr_at = history.slowed(learner.lr_at, config.m)
    method = build_phase_method(config, phase, learner, world, len(classes), history)
    guard = build_guard(
        config,
        phase_loaders[phase],
        method,
        history,
        world,
        is_recorded=learner.runner is not None,
    )
    torch.manual_seed(config.seed + 1_000_003 * world.rank)  # no dropout mask on two ranks
    progress, log_bytes = Progress(), 0
    world.on_main(lambda: move_in(folder, lock, config.resume))
    if state is not None:
        progress = restore(state, config, world, model, learner, method)
        log_bytes = int(state["log_bytes"])
        guard.good = state["good"]
    decoding = Decoding([loaders.train for loaders in phase_loaders], world, config.workers)
    decoding.load_state_dict(state.get("decoding", {}) if state else {})
    record = environment(ranks=world.size)
    if state is not None:
        warn_about_changes(folder, record, world)
    world.on_main(lambda: write_description(folder, recorded, record))
    for line in start_lines(config, world, phase_loaders, budget, learner, record):
        say(world, line)
    for line in decoding.lines(phase):
        say(world, line)
    costs = until(config.max_passes, costs_of(config, budget, phase_loaders, world.size))
    forecast = Forecast([(cost.passes.weights, cost.config.image_size**2) for cost in costs])
    log = RunLog(folder, forecast, log_bytes, progress.passes, world.is_main)
    clock = Clock(progress.train_seconds, progress.passes)
    run = Run(
        config, world, folder, phase_loaders, budget, model, learner, method, guard, decoding,
        progress, clock, log, lock, recorded, made_for, time.monotonic(), own_model,
    )  # fmt: skip
    if state is not None and guard.is_on and guard.good is None:
        guard.good = snapshot(run)  # a finished run, or one of other ranks, has left none
    if not run.is_complete:
        world.on_main(lambda: keep_evaluations(folder))
    return run


def is_finished(config: TrainConfig, folder: RunFolder) -> bool:
    """Whether the run has its result and nothing more is asked of it; says so.

    Raises:
        UserError: something is asked of it that it cannot give.
    """
    if not folder.result.exists():
        return False
    saved = load_config(folder.config)
    names = differences(saved, config)
    refuse_fixed(names, saved, config, folder.root)
    changed = in_words(names, saved, config)
    if set(names) & {*BUDGET, *EVALUATION}:
        if not any((folder.checkpoints / name).exists() for name in (LAST, PREVIOUS)):
            raise UserError(
                f"--resume: {folder.root} is finished and its checkpoints are gone, so that it "
                f"cannot go on with {changed}"
            )
        return False
    unused = f"; {changed} would change nothing" if changed else ""
    print(f"{folder.root} is finished; its result is in {folder.result}{unused}", flush=True)
    return True


def refuse_spent_budget(config: TrainConfig, state: dict[str, Any], budget: Budget) -> None:
    """Refuses a budget with which a run would not go on.

    Raises:
        UserError: the run has done more already, or something else has ended it.
    """
    names = [n for n in differences(config_from_dict(state["config"]), config) if n in BUDGET]
    if not names:
        return
    asked, done = as_typed(names[0], getattr(config, names[0])), Progress(**state["progress"])
    limit = config.max_passes
    if History.of(state["guard"]).has_stopped:
        raise UserError(
            f"{asked}: the guard has stopped the run after a collapse; start another one with "
            "--on-collapse restore"
        )
    if "max_passes" not in names and limit is not None and done.passes >= limit:
        raise UserError(
            f"{asked}: --max-passes {limit} has ended the run; add --max-passes None, or more"
        )
    is_longer = limit is not None and done.passes > limit
    if done.epoch > budget.data_epochs or is_longer:
        raise UserError(
            f"{asked}: the run has made {done.epoch} passes over the data and {done.passes:,} "
            "image passes already; give at least as many"
        )


def take(lock: FolderLock) -> None:
    """Takes a run's folder for this process, with a line where a dead one still held it."""
    if (line := lock.take()) is not None:
        print(line, flush=True)


def move_in(folder: RunFolder, lock: FolderLock, resume: bool) -> None:
    """Makes the folder this run's; a result that it is about to outdate keeps another name."""
    folder.claim(resume)
    take(lock)
    if (kept := folder.set_result_aside()) is not None:
        print(f"the result so far is kept as {kept}", flush=True)


def keep_evaluations(folder: RunFolder) -> None:
    """Keeps what was measured of weights that are about to be trained further elsewhere."""
    if (kept := folder.set_evaluations_aside()) is not None:
        print(f"evaluations of the weights so far are kept in {kept}", flush=True)


def remake_folder(run: Run) -> None:
    """Makes a run's folder again where somebody has removed it: what is in memory is not lost.

    Raises:
        UserError: it cannot be made.
    """
    if run.folder.config.exists():
        return
    run.folder.claim(resume=True)
    run.lock.renew()
    write_description(run.folder, run.recorded, environment(ranks=run.world.size))
    run.log.reopen()
    run.log.say(
        f"{run.folder.root} was gone and is made anew: what it held is lost, training goes on"
    )


def with_precision(config: TrainConfig, world: World) -> TrainConfig:
    """The config with the precision that its ``auto`` means here."""
    precision = resolve_precision(config.precision, world.device)
    return dataclasses.replace(config, precision=precision)  # type: ignore[arg-type]


def naming_own_network(config: TrainConfig, own_model: nn.Module | None) -> TrainConfig:
    """The config as it is recorded: a network of the caller's own is what it says it is.

    Raises:
        UserError: the config is that of a run with such a network, and none was handed over.
    """
    if own_model is not None:
        return dataclasses.replace(config, arch=arch_of(own_model))
    refuse_unnamed_network(config.arch)
    return config


def refuse_different_configs(config: TrainConfig, world: World) -> None:
    """Every rank must train the same run: ranks that differ would diverge without a word.

    Raises:
        UserError: on every rank; names the first flag that differs and the rank.
    """
    configs = world.gather_on_host(config_to_dict(config))

    def compare() -> None:
        first, *others = cast(list[dict[str, Any]], configs)
        for rank, other in enumerate(others, start=1):
            for name in first:
                if other[name] != first[name]:
                    flag = "--" + name.replace("_", "-")
                    raise UserError(
                        f"{flag}: rank {rank} has {other[name]}, rank 0 has {first[name]}; start "
                        "every node with the same flags"
                    )

    world.on_main(compare)


def refuse_unfit_evaluation(config: TrainConfig, loader: Loader) -> None:
    """Refuses what could not be evaluated at the end, before hours of training.

    Args:
        config: The run. loader: Of its validation images.

    Raises:
        UserError: an attack or a corruption that these classes or images do not take, or a package
            is missing.
    """
    if isinstance(loader, DetectionLoader):
        refuse_unmeasurable(config.eval_corruptions, loader)
    elif config.eps.levels:
        refuse_unfit(parsed(config.eval_attacks), len(loader.classes), "--eval-attacks")


def refuse_empty_exchange(config: TrainConfig, world: World) -> None:
    """Each rank sends every other one an adversarial image at least.

    Raises:
        UserError: a rank's adversarial share is smaller than the number of ranks.
    """
    if config.method != "fast-advprop" or not config.shuffle:
        return
    smallest = min(config.phase_configs, key=lambda phase: phase.batch_size)
    if smallest.num_adversarial < world.size:
        raise UserError(
            f"--batch-size {smallest.batch_size}: {smallest.num_adversarial} adversarial images a "
            f"rank (--p-adv {config.p_adv:g}) cannot be shuffled over {world.size} ranks; use at "
            f"least --batch-size {math.ceil(world.size / config.p_adv)}"
        )


def write_description(folder: RunFolder, config: TrainConfig, record: dict[str, Any]) -> None:
    """Writes config.yaml and env.json."""
    save_config(config, folder.config)
    write_json(folder.environment, record)
