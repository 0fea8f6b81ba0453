"""What a finished run leaves behind: the final evaluation, the export, result.json, pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import Any

import torch

from freeadv_fast.data.coco.loader import DetectionLoader
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.autoattack.ledger import forget
from freeadv_fast.evaluation.detection.corruptions import parse_corruptions
from freeadv_fast.evaluation.detection.evaluate import DetectionEvaluation, evaluate_detector
from freeadv_fast.evaluation.evaluate import Evaluation, evaluate
from freeadv_fast.evaluation.images import whole_val_loader
from freeadv_fast.models.half_weights import drop_half_weights
from freeadv_fast.models.normalize import with_normalizer
from freeadv_fast.models.own import hand_back
from freeadv_fast.models.retinanet import Detector
from freeadv_fast.runs import checkpoint
from freeadv_fast.runs.environment import hardware, versions
from freeadv_fast.runs.export.trained import withdraw
from freeadv_fast.runs.json_file import write_json
from freeadv_fast.session import outputs
from freeadv_fast.session.averages import average_state, weights_of
from freeadv_fast.session.guard import Count
from freeadv_fast.session.outputs import Measured
from freeadv_fast.session.prepare import remake_folder
from freeadv_fast.session.result import Result
from freeadv_fast.session.run import Run
from freeadv_fast.session.selection import exceeds_chance, measure_held_out, score
from freeadv_fast.session.summary import summary


def conclude(run: Run) -> Result:
    """Evaluates the last weights and those that were chosen, and leaves all of it in the folder."""
    world = run.world
    run.learner.forget_recordings()  # the attacks take their memory
    run.guard.forget_recordings()
    drop_half_weights(run.model)
    world.on_main(run.lock.refuse_if_lost)
    checkpoint.average_buffers_(run.model, world)  # no rank trains on
    started = time.perf_counter()
    last = measure(run, "validation")
    average = measured_average(run)
    chosen = chosen_state(run)
    measured = [last] + ([average.measured] if average else [])
    best = None
    if chosen:
        best, of_best = compare(run, last, average, chosen)
        measured.append(of_best)
    result = describe(run, last, average, best, time.perf_counter() - started)
    world.on_main(lambda: leave_behind(run, result, last, average, chosen))
    if run.own_model is not None:
        hand_back(run.model, run.own_model)
    world.on_main(lambda: forget([path for each in measured for path in each.ledgers]))
    for line in summary(result, last):
        run.log.say(line)
    wrote = [run.folder.result, run.folder.plots, run.folder.export]
    wrote += [run.folder.export_average] * (average is not None)
    run.log.say(f"wrote {', '.join(map(str, wrote))}")
    return result


def measure(run: Run, label: str) -> Measured:
    """What the network as it is comes to on the validation images."""
    config, world = run.config, run.world
    model, loader = run.model, run.loaders.val
    if isinstance(model, Detector) and isinstance(loader, DetectionLoader):
        return evaluate_detector(
            model,
            loader,
            run.attacks,
            run.evaluation_threat,
            parse_corruptions(config.eval_corruptions),
            world=world,
            mean=config.pixel_mean,
            std=config.pixel_std,
            seed=config.seed,
            label=label,
            folder=run.folder.root,
        )
    return evaluate(
        model,
        loader,
        run.attacks,
        run.evaluation_threat,
        world=world,
        mean=config.pixel_mean,
        std=config.pixel_std,
        clean_loader=world.together(lambda: whole_val_loader(config, world)),
        seed=config.seed,
        label=label,
        folder=run.folder.root,
    )


@dataclasses.dataclass(frozen=True)
class Average:
    """The averaged weights at a run's end.

    Attributes:
        state: As a checkpoint holds them.
        measured: Their accuracies, on the validation images.
    """

    state: dict[str, Any]
    measured: Measured


def measured_average(run: Run) -> Average | None:
    """The averaged weights and what they come to; None where there are none."""
    state = average_state(run)
    if state is None:
        return None
    with weights_of(run, state):
        return Average(state, measure(run, "averaged weights"))


def chosen_state(run: Run) -> dict[str, Any] | None:
    """What best.pt holds; None where nothing was chosen, and where it cannot be read."""
    path = run.folder.checkpoints / checkpoint.BEST
    if not run.world.on_main(path.exists):
        return None
    try:
        state = run.world.together(lambda: checkpoint.load_checkpoint(path, "--export best"))
    except UserError as error:
        run.log.say(f"left out: {error}")
        return None
    # A run that was stopped early in a phase has selected nothing in it yet, nor has one among the
    # weights that are chosen among since --ema began or dropped an average.
    is_of_phase = state["epoch"] >= run.budget.spans[run.phase].epochs.start
    is_of_kind = state.get("is_averaged", False) == (run.learner.average is not None)
    return state if is_of_phase and is_of_kind else None


def compare(
    run: Run, last: Measured, average: Average | None, chosen: dict[str, Any]
) -> tuple[dict[str, Any], Measured]:
    """What the chosen weights come to: for result.json, and all of it.

    Averaged weights are compared with the last average: plain ones are another kind.

    Args:
        run: With its last weights.
        last: Accuracies of these.
        average: The averaged ones.
        chosen: What best.pt holds; the same weights are not evaluated twice.
    """
    is_averaged, is_better = chosen.get("is_averaged", False), False
    own: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if is_averaged and average is not None:
        own, last = weights_of(run, average.state), average.measured
    with own:
        weights = run.model.state_dict()
        is_last = run.world.on_main(
            lambda: all(torch.equal(weights[name].cpu(), v) for name, v in chosen["model"].items())
        )
        best = last
        if not is_last:
            with weights_of(run, chosen):
                best = measure(run, "best weights")
            is_better = is_beyond_chance(run)
    record = {"epoch": chosen["epoch"], "is_averaged": is_averaged, **findings(best)}
    return record | {"is_last": is_last, "is_better": is_better}, best


def is_beyond_chance(run: Run) -> bool:
    """Whether the chosen weights did better than the network's own on the held-out images."""
    if run.loaders.holdout is None:
        return False
    num_images = run.loaders.holdout.num_images
    scores = run.progress.best_score, score(measure_held_out(run, "held-out"))
    return exceeds_chance(*(Count(round(s * num_images), num_images) for s in scores))


def leave_behind(
    run: Run,
    result: Result,
    measured: Measured,
    average: Average | None,
    chosen: dict[str, Any] | None,
) -> None:
    """Writes the export, result.json, and then what no run may fail for.

    result.json is what says that a run is finished, so a run killed before it is evaluated again.
    """
    remake_folder(run)
    last = contextlib.nullcontext()
    with weights_of(run, chosen) if chosen and result.exported == "best" else last:
        attempt_export(run, result, result.exported or "last")
    if average is not None:
        with weights_of(run, average.state):
            attempt_export(run, result, "average")
    else:  # what a session before this one has exported is of other weights
        folder = run.folder.export_average
        outputs.attempt(
            run, f"not removed, of an earlier session: {folder}", lambda: withdraw(folder)
        )
    write_json(run.folder.result, result.record())
    outputs.attempt(run, "kept as it is: last.pt", lambda: drop_what_is_spent(run))
    outputs.draw(run, measured)
    outputs.attempt(run, f"not written: {run.folder.report}", lambda: outputs.write_report(run))


def attempt_export(run: Run, result: Result, weights: str) -> None:
    """Exports the network as it is, unless something fails that no run may fail for."""
    of_weights = "" if weights == "last" else f" --checkpoint {weights}"
    outputs.attempt(
        run,
        f"not exported, python launch/export.py {run.folder.root}{of_weights} does it later",
        lambda: outputs.write_export(run, result, weights),
    )


def drop_what_is_spent(run: Run) -> None:
    """Drops what a finished run does not need to go on: an older checkpoint, a state to rewind to.

    Half of the folder's bytes; with more --epochs the last state is the first one to rewind to.
    """
    folder = run.folder.checkpoints
    state = checkpoint.load_checkpoint(folder / checkpoint.LAST)
    if state["good"] is not None:
        checkpoint.save_checkpoint(state | {"good": None}, folder)
    (folder / checkpoint.PREVIOUS).unlink(missing_ok=True)


def describe(
    run: Run,
    measured: Measured,
    average: Average | None,
    best: dict[str, Any] | None,
    evaluation_seconds: float,
) -> Result:
    """Gathers the result's fields.

    Args:
        run: At its end.
        measured: Accuracies of the last weights.
        average: The averaged ones.
        best: What the chosen ones come to.
        evaluation_seconds: What these evaluations took.
    """
    config, holdout = run.config, run.loaders.holdout
    return Result(
        **what_was_trained(run),
        **what_it_took(run),
        **findings(measured),
        evaluation_seconds=round(evaluation_seconds, 3),
        attack_step=str(config.eval_step),
        num_eval_images=measured.num_images,
        num_clean_images=measured.num_clean_images if isinstance(measured, Evaluation) else None,
        holdout_images=holdout.num_images if holdout else 0,
        best_epoch=best["epoch"] if best else -1,
        best=best,
        average=of_average(average),
        gradients=gradient_traffic(run),
        decoding=run.decoding.record(run.phase),
        exported=config.export if best else "last",
        collapse=next(reversed(run.guard.history.collapses), None),
        folder=run.folder.root,
        load_model=lambda: with_normalizer(run.model, config.pixel_mean, config.pixel_std).eval(),
    )


def what_was_trained(run: Run) -> dict[str, Any]:
    """The fields of result.json that a run has from its start, and on what it ran."""
    config, processors = run.config, hardware()
    return {
        "recipe": config.recipe,
        "method": config.method,
        "dataset": config.data,
        "arch": config.arch,
        "m": config.m,
        "eps": str(config.eps),
        "seed": config.seed,
        "ranks": run.world.size,
        "precision": str(run.learner.precision).removeprefix("torch."),
        "device": (processors["gpus"] or [processors["cpu"]])[0],
        "versions": versions(),
    }


def what_it_took(run: Run) -> dict[str, Any]:
    """The fields of result.json about epochs, passes and seconds of training."""
    progress = run.progress
    return {
        "epochs": round(progress.epoch + progress.minibatch / run.loaders.train.num_batches, 4),
        "passes": progress.passes,
        "attack_passes": progress.attack_passes,
        "train_seconds": round(progress.train_seconds, 3),
        "warm_up_seconds": round(progress.warm_up_seconds, 3),
        "passes_per_second": round(progress.passes / max(progress.train_seconds, 1e-9), 2),
    }


def of_average(average: Average | None) -> dict[str, Any] | None:
    """What averaged weights come to, for result.json; None where there are none."""
    if average is None:
        return None
    return {"decay": average.state["decay"], **findings(average.measured)}


def findings(measured: Measured) -> dict[str, Any]:
    """What weights come to, for result.json."""
    if isinstance(measured, DetectionEvaluation):
        return {"detection": measured.record()}
    return {
        "clean_accuracy": measured.clean_accuracy,
        "clean_top5_accuracy": measured.clean_top5,
        "robust_accuracy": measured.robust_accuracy,
        "attack_parts": measured.attack_parts,
        "attack_log": measured.log,
    }


def gradient_traffic(run: Run) -> dict[str, Any] | None:
    """What compressed gradients were to the network; None where they were not compressed."""
    learner, size = run.learner, run.world.size
    if learner.compression is None or learner.compressed_updates == 0:
        return None
    num_elements = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    return {
        "codec": run.config.compress,
        "machines": learner.compression.num_machines,
        "bytes_sent": learner.gradient_bytes,
        "bytes_an_update": round(learner.gradient_bytes / learner.compressed_updates),
        "float32_bytes_an_update": 2 * (size - 1) * 4 * num_elements // size,
    }
