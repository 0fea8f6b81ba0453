"""What a finished run leaves behind: the final evaluation, result.json, pictures, the export."""

from __future__ import annotations

import dataclasses

from freeadv_fast.data.build import build_val_loader
from freeadv_fast.evaluation import report
from freeadv_fast.evaluation.evaluate import Evaluation, evaluate
from freeadv_fast.models.normalize import with_normalizer
from freeadv_fast.models.own import hand_back
from freeadv_fast.runs import checkpoint, export
from freeadv_fast.runs.environment import hardware, versions
from freeadv_fast.runs.log import read_log, write_json
from freeadv_fast.session.result import Result
from freeadv_fast.session.run import Run

NUM_PICTURED = 6


def conclude(run: Run) -> Result:
    """Evaluates the selected weights, draws, exports, and writes result.json last of all.

    result.json is what says that a run is finished, so a run killed before it is evaluated again.
    """
    config, world = run.config, run.world
    run.learner.forget_recordings()  # the attacks take their memory
    best, best_epoch = run.folder.checkpoints / checkpoint.BEST, -1
    if world.on_main(best.exists):
        state = checkpoint.load_checkpoint(best)
        # A run that was stopped early in a phase has selected nothing in it yet.
        if state["epoch"] >= run.budget.spans[run.phase].epochs.start:
            checkpoint.load_weights(run.model, state, config.arch, str(best))
            best_epoch = state["epoch"]
    checkpoint.average_buffers_(run.model, world)  # no rank trains on
    measured = evaluate(
        run.model,
        run.loaders.val,
        run.attacks,
        run.evaluation_threat,
        world=world,
        mean=config.pixel_mean,
        std=config.pixel_std,
        seed=config.seed,
        label="validation",
    )
    result = describe(run, measured, best_epoch)
    world.on_main(lambda: leave_behind(run, result))
    if run.own_model is not None:
        hand_back(run.model, run.own_model)
    for line in summary(result):
        run.log.say(line)
    run.log.say(f"wrote {run.folder.result}, {run.folder.plots}, {run.folder.export}")
    return result


def leave_behind(run: Run, result: Result) -> None:
    """Writes pictures, export and, last of all, result.json."""
    draw(run)
    write_export(run)
    write_json(run.folder.result, result.record())


def describe(run: Run, measured: Evaluation, best_epoch: int) -> Result:
    """Gathers the result's fields."""
    config, progress = run.config, run.progress
    holdout = run.loaders.holdout
    processors = hardware()
    return Result(
        recipe=config.recipe,
        method=config.method,
        dataset=config.data,
        arch=config.arch,
        m=config.m,
        eps=str(config.eps),
        epochs=round(progress.epoch + progress.minibatch / run.loaders.train.num_batches, 4),
        passes=progress.passes,
        attack_passes=progress.attack_passes,
        train_seconds=round(progress.train_seconds, 3),
        passes_per_second=round(progress.passes / max(progress.train_seconds, 1e-9), 2),
        clean_accuracy=measured.clean_accuracy,
        clean_top5_accuracy=measured.clean_top5,
        robust_accuracy=measured.robust_accuracy,
        attack_step=str(config.eval_step),
        num_eval_images=measured.num_images,
        holdout_images=holdout.num_images if holdout else 0,
        best_epoch=best_epoch,
        collapse=next(reversed(run.guard.history.collapses), None),
        seed=config.seed,
        ranks=run.world.size,
        precision=str(run.learner.precision).removeprefix("torch."),
        device=(processors["gpus"] or [processors["cpu"]])[0],
        versions=versions(),
        folder=run.folder.root,
        load_model=lambda: with_normalizer(run.model, config.pixel_mean, config.pixel_std).eval(),
    )


def draw(run: Run) -> None:
    """Draws the training curves and a grid of validation images under the first attack."""
    config = run.config
    run.folder.plots.mkdir(exist_ok=True)
    report.plot_training(read_log(run.folder.log), run.folder.plots / "training.png")
    if run.attacks:
        alone = dataclasses.replace(run.world, rank=0, size=1)
        batch = next(iter(build_val_loader(config, alone, NUM_PICTURED).epoch(0)))
        report.plot_perturbations(
            with_normalizer(run.model, config.pixel_mean, config.pixel_std),
            batch.images,
            batch.labels,
            run.loaders.val.classes,
            run.attacks[0],
            run.evaluation_threat,
            run.folder.plots / "perturbations.png",
            num_columns=NUM_PICTURED,
        )


def write_export(run: Run) -> None:
    """Writes the evaluated weights for use elsewhere."""
    config = run.config
    export.export_model(
        run.model,
        run.folder.export,
        arch=config.arch,
        classes=run.loaders.train.classes,
        mean=config.pixel_mean,
        std=config.pixel_std,
        image_size=config.image_size,
        resize_size=config.evaluation_resize,
    )


def summary(result: Result) -> list[str]:
    """The result as lines for the terminal."""
    lines = [
        f"{result.method} {result.arch}: {result.passes:,} passes in {result.train_seconds:.1f} s "
        f"({result.passes_per_second:.0f} passes/s)",
        f"clean accuracy {result.clean_accuracy:.1%} on {result.num_eval_images} images",
    ]
    for name, accuracy in result.robust_accuracy.items():
        lines.append(f"{name} accuracy {accuracy:.1%} at eps {result.eps}")
    return lines
