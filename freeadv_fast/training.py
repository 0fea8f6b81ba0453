"""Training, from a config to a result: the loop, its checkpoints and its selection.

A batch's way is short: the loader yields it, the method trains on it, the host counts it. What
needs the device's answer (metrics, finite weights, held-out accuracy) is asked for at logs,
checkpoints and epoch ends only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from freeadv_fast.config.budget import Budget
from freeadv_fast.config.file import config_to_dict, config_to_yaml
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.agreement import open_together
from freeadv_fast.data.build import Loaders, deal_images
from freeadv_fast.data.loader import Batch
from freeadv_fast.distributed.heartbeat import arrive
from freeadv_fast.distributed.world import joined_world
from freeadv_fast.errors import UserError
from freeadv_fast.runs import checkpoint
from freeadv_fast.runs.environment import environment
from freeadv_fast.runs.log import RunFolder, labelled
from freeadv_fast.session import rewind
from freeadv_fast.session.ahead import Ahead
from freeadv_fast.session.averages import average_state, chosen_among
from freeadv_fast.session.conclude import conclude
from freeadv_fast.session.guard import Count
from freeadv_fast.session.method import enter_phase
from freeadv_fast.session.network import build_learner, build_network
from freeadv_fast.session.prepare import (
    prepare,
    refuse_different_configs,
    refuse_empty_exchange,
    refuse_unfit_evaluation,
    remake_folder,
    with_precision,
)
from freeadv_fast.session.result import Result, read_result
from freeadv_fast.session.resume import rank_state, to_cpu
from freeadv_fast.session.run import Run
from freeadv_fast.session.selection import measure_held_out, score
from freeadv_fast.session.signals import Interrupted, StopRequests
from freeadv_fast.session.start import resolved, start_lines


def train(config: TrainConfig, model: nn.Module | None = None) -> Result:
    """Trains, selects, evaluates and reports a network as a config says.

    Args:
        config: The whole run. Under torchrun every rank calls this with the same config.
        model: A network of your own in place of the one that ``config.arch`` names: (n, 3, H, W)
            float32 images, normalised by ``config.normalization``, to (n, classes) float32 logits.
            A copy of it is trained; once the run is finished the module itself holds the last
            weights, and keeps its class, device and mode. Before that it is unchanged.

    Returns:
        What result.json holds, and the network as `Result.model`; of a finished run that
        ``resume`` finds, what it came to.

    Raises:
        UserError: a flag, the data, the network or the output folder is wrong, or the loss became
            non-finite; a `ValueError` with one line.
        Interrupted: a signal asked to stop; everything is saved for ``resume``.
    """
    with joined_world() as world:
        run = prepare(config, world, model)
        if run is None:
            return read_result(RunFolder(Path(config.run_folder)), model)
        try:
            with StopRequests() as stop:
                train_epochs(run, stop)
                stop.leave_at_once = True
                return conclude(run)
        finally:
            run.log.close()
            run.lock.release()


def train_epochs(run: Run, stop: StopRequests) -> None:
    """Trains until the budget is spent; each data epoch ends with a selection and a checkpoint."""
    progress = run.progress
    try:
        with contextlib.closing(Ahead(run)) as ahead:
            while not run.is_complete:
                run.clock.start()
                if train_epoch(run, ahead, stop):
                    end_epoch(run)
                save(run)
                obey_requests(run, stop)
                if run.is_complete:
                    run.world.on_main(run.saver.finish)
                run.clock.pause()
                progress.train_seconds = run.clock.seconds
    except Interrupted:  # all is saved; or it is the second Ctrl-C, which waits for nothing
        raise
    except Exception:
        say_what_is_not_saved(run)
        raise


def say_what_is_not_saved(run: Run) -> None:
    """Waits for the disk where a run fails, and says so if that fails as well."""
    try:
        run.saver.finish()
    except UserError as error:
        run.log.say(str(error))


def train_epoch(run: Run, ahead: Ahead, stop: StopRequests) -> bool:
    """Trains on what is left of one data epoch, saving in between as often as asked.

    Returns:
        False when the guard rewound the run: its place in the data is another one now.
    """
    config, progress, loader = run.config, run.progress, run.loaders.train
    run.model.train()
    while progress.minibatch < loader.num_batches:
        batch = run.world.together(ahead.next)
        # cuDNN times its algorithms, which takes seconds, but not for the shape of an epoch's last
        # minibatch, which may be smaller than the others. (The only one of an epoch is whole.)
        is_last = progress.minibatch + 1 == loader.num_batches > 1
        torch.backends.cudnn.benchmark = not is_last
        with run.decoding.watching(run.phase, batch, run.learner.is_warm):
            passes = run.method.train_minibatch(batch.images, batch.labels, batch.global_size)
        progress.minibatch += 1
        arrive(f"epoch {progress.epoch}, minibatch {progress.minibatch}")
        progress.passes += passes.weights
        progress.attack_passes += passes.attack
        progress.warm_up_seconds += run.clock.cold_seconds(run.learner.is_warm)
        for line in run.decoding.decide(run.phase, progress.epoch, progress.minibatch):
            run.log.say(line)
        run.guard.advance(passes)
        run.log.advance(passes.weights)
        if progress.minibatch == loader.num_batches or run.is_budget_spent:
            measure(run, batch)
            return True
        check = run.guard.check(run.model, run.loaders.guard) if run.guard.is_due else None
        if check or progress.minibatch % config.log_every == 0:
            measure(run, batch)
            run.log.write(progress.last_line | (check.line if check else {}))
        if check and rewind.judge(run, check.count):
            return False
        obey_requests(run, stop)
    return True


def end_epoch(run: Run) -> None:
    """Selects among the weights, uncounted in train_seconds; a check of the guard's as well."""
    progress, loaders = run.progress, run.loaders
    run.clock.pause()
    found = select(run)
    count, checked = check_at_end(run, found)
    run.log.write(progress.last_line | found | checked)
    run.clock.start()
    begins_phase, selected = False, (progress.best_score, progress.best_epoch)
    # More of them where images left while the run was stopped: that place ends its epoch.
    if progress.minibatch >= loaders.train.num_batches:
        progress.epoch, progress.minibatch = progress.epoch + 1, 0
        begins_phase = run.budget.begins_phase(progress.epoch)
        if begins_phase:  # before the save: it holds a new delta
            enter_phase(run)
    if count is not None:
        is_rewound = rewind.judge(run, count)
        if begins_phase and is_rewound:  # back in the old phase, and to its selection
            progress.best_score, progress.best_epoch = selected
        elif begins_phase:
            rewind.begin_anew(run)


def check_at_end(run: Run, found: dict[str, float]) -> tuple[Count | None, dict[str, float]]:
    """The guard's check at the end of a data epoch, None where it is off; and what is logged of it.

    The selection is one, unless it has measured averaged weights: these still stand when the plain
    ones, which training goes on from, have collapsed.

    Args:
        run: In the phase of the epoch.
        found: What the selection has measured.
    """
    loaders = run.loaders
    if not run.guard.is_on or loaders.holdout is None:
        return None, {}
    if run.learner.average is not None:
        check = run.guard.check(run.model, loaders.guard)
        return check.count, check.line
    num_images = loaders.holdout.num_images
    return Count(round(found["holdout_robust_accuracy"] * num_images), num_images), {}


def obey_requests(run: Run, stop: StopRequests) -> None:
    """Saves when it is time to, and leaves when a signal asked; all ranks together."""
    is_due = time.monotonic() - run.saved_at >= run.config.checkpoint_every
    signum, must_save = run.world.max_on_host([stop.received, int(is_due)])
    if signum or must_save:
        save(run)
    if signum:
        run.world.on_main(run.saver.finish)
        raise Interrupted(signum)


def measure(run: Run, batch: Batch) -> None:
    """Reads the meters into `last_line`, the next line of log.jsonl; waits for the device.

    Raises:
        UserError: a loss was not finite. (An overflow that fp16's scaler skips is one of the
            scaled gradients; the loss itself stays finite.)
    """
    progress, learner = run.progress, run.learner
    reading = learner.meters.read(run.world)
    if reading.nonfinite_losses:
        refuse_nonfinite(run)
    line: dict[str, Any] = {
        "passes": progress.passes,
        "epoch": progress.epoch,
        "updates": learner.updates,
        "loss": reading.loss,
        "lr": learner.lr_at(learner.updates - 1),
        "passes_per_second": run.clock.lap(progress.passes),
        "nonfinite_gradients": reading.nonfinite_gradients,
    }
    if reading.skipped_updates:
        line["skipped_updates"] = reading.skipped_updates
    if progress.attack_passes:
        line["attack_passes"] = progress.attack_passes
    accuracy = reading.accuracy if learner.task.has_hits else {}
    line |= {f"train_{role}_accuracy": share for role, share in accuracy.items()}
    if learner.task.has_hits and "clean" not in accuracy:
        hits = learner.clean_hits(batch.images, batch.labels).to(torch.float64)
        line["train_clean_accuracy"] = run.world.sum_(hits).item() / batch.global_size
    progress.last_line = line
    run.log.tell(line, run.clock.seconds)


def refuse_nonfinite(run: Run) -> None:
    """Stops a run whose loss or weights are no longer finite.

    Raises:
        UserError: always.
    """
    raise UserError(
        f"--lr {run.config.lr:g}: the loss became non-finite in epoch {run.progress.epoch} after "
        f"{run.progress.passes} passes; start again with a lower --lr (checkpoints saved before "
        f"are kept in {run.folder.checkpoints})"
    )


def select(run: Run) -> dict[str, float]:
    """Measures the held-out slice and keeps the weights as best.pt if none were better.

    Averaged weights where there are some.

    Returns:
        What was measured, for log.jsonl; nothing where no images are held out.
    """
    progress = run.progress
    if run.loaders.holdout is None:
        return {}
    with chosen_among(run):
        measured = measure_held_out(run, f"epoch {progress.epoch} held-out")
        found, reached = {"holdout_clean_accuracy": measured.clean_accuracy}, score(measured)
        if measured.robust_accuracy:
            found["holdout_robust_accuracy"] = reached
        if reached > progress.best_score:
            progress.best_score, progress.best_epoch = reached, progress.epoch
            save_best(run)
    accuracies = [f"clean {measured.clean_accuracy:.1%}"]
    accuracies += [f"{name} {value:.1%}" for name, value in measured.robust_accuracy.items()]
    run.log.say(
        f"epoch {progress.epoch}: held-out {', '.join(accuracies)}, loss "
        f"{progress.last_line['loss']:.3f}, {progress.last_line['passes_per_second']:.0f} passes/s"
    )
    return found


def save_best(run: Run) -> None:
    """Writes best.pt: weights and what they are, nothing to continue from."""
    refuse_nonfinite_weights(run)
    state = identity(run) | {
        "model": run.model.state_dict(),
        "epoch": run.progress.best_epoch,
        "is_averaged": run.learner.average is not None,
    }
    write(run, state, checkpoint.BEST)


def save(run: Run) -> None:
    """Writes last.pt: everything that makes the next update what it would have been.

    The last good state is in the same file, so that the two are never of different times.

    Rank 0's weights and optimizer stand for all; perturbation, running statistics, generators and
    sums are each rank's own. Inside ``model`` the running statistics are the ranks' mean, and so
    are those of ``average``.
    """
    refuse_nonfinite_weights(run)
    run.world.on_main(lambda: remake_folder(run))
    run.progress.train_seconds = run.clock.seconds
    rank_states = run.world.gather_on_host(to_cpu(rank_state(run)))
    good = run.guard.good and rewind.gathered(run.guard.good, run.world)
    average = average_state(run)
    with checkpoint.averaged_buffers(run.model, run.world):
        state = identity(run) | {
            "model": run.model.state_dict(),
            "learner": run.learner.state_dict(),
            "average": average,
            "progress": dataclasses.asdict(run.progress),
            "guard": run.guard.history.state_dict(),
            "good": good,
            "decoding": run.decoding.state_dict(),
            "log_bytes": run.log.settle(),
            "data": run.phase_loaders[-1].state,
            "ranks": rank_states,
        }
        write(run, state, checkpoint.LAST)
    run.saved_at = time.monotonic()


def identity(run: Run) -> dict[str, Any]:
    """What a checkpoint says about itself."""
    return {
        "arch": run.config.arch,
        "classes": list(run.loaders.train.classes),
        "config": config_to_dict(run.recorded),
        "made_for": run.made_for,
    }


def write(run: Run, state: dict[str, Any], name: str) -> None:
    """Rank 0 begins to write; if it could not write what came before, every rank learns why."""

    def save_own() -> None:
        run.lock.refuse_if_lost()
        run.saver.save(state, run.folder.checkpoints, name)

    run.world.on_main(save_own)


def refuse_nonfinite_weights(run: Run) -> None:
    """Keeps a checkpoint of finite weights and statistics from being replaced by one of others."""
    tensors = [*run.model.parameters(), *checkpoint.batch_norm_buffers(run.model).values()]
    if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
        refuse_nonfinite(run)


def dry_run(config: TrainConfig) -> list[str]:
    """What `train` would do: its config, its start and the first minibatches; writes nothing."""
    with joined_world() as world:
        refuse_different_configs(config, world)
        config = with_precision(config, world)
        refuse_empty_exchange(config, world)
        opened = open_together(config, world)
        phase_loaders = world.together(lambda: deal_images(config, world, opened))
        world.together(lambda: refuse_unfit_evaluation(config, phase_loaders[-1].val))
        budget = Budget.of(config, [loaders.train.num_batches for loaders in phase_loaders])
        classes = phase_loaders[-1].train.classes
        network = world.together(lambda: build_network(config, classes, is_fresh=True))
        learner = build_learner(network, config, world, budget)
        machine = environment(world.size)
        return [
            config_to_yaml(resolved(config, phase_loaders[-1])).rstrip(),
            *start_lines(config, world, phase_loaders, budget, learner, machine),
            *world.together(lambda: first_minibatches(budget, phase_loaders)),
        ]


def first_minibatches(budget: Budget, phase_loaders: tuple[Loaders, ...]) -> list[str]:
    """The shapes and types of each phase's first minibatch."""
    lines = []
    for span, loaders in zip(budget.spans, phase_loaders, strict=True):
        batch = next(iter(loaders.train.epoch(span.epochs.start)))
        lines.append(
            f"images {tuple(batch.images.shape)} {batch.images.dtype}, "
            f"labels {tuple(batch.labels.shape)} {batch.labels.dtype}"
        )
    return labelled("minibatch", lines)
