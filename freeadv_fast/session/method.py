"""The method and the guard of the phase that a run is in."""

from __future__ import annotations

from torch import Tensor

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.build import Loaders
from freeadv_fast.distributed.world import World
from freeadv_fast.methods.build import TrainingMethod, build_method
from freeadv_fast.methods.fast_advprop import Exchange
from freeadv_fast.session.guard import Guard, History
from freeadv_fast.session.run import Run, say
from freeadv_fast.step.learner import Learner


def build_phase_method(
    config: TrainConfig,
    phase: int,
    learner: Learner,
    world: World,
    num_classes: int,
    history: History,
) -> TrainingMethod:
    """The method for one phase's minibatches, its perturbation at the start.

    Args:
        config: The run. phase: From 0.
        learner: The network in training.
        world: This process among the others.
        num_classes: Of the data.
        history: Of the guard, after which the method may be another one.
    """

    def shuffle(images: Tensor, labels: Tensor, step: int) -> Exchange:
        return world.shuffle(images, labels, seed=config.seed, step=step)

    method_config = history.method_config(config.phase_configs[phase])
    return build_method(method_config, learner, world.device, num_classes, shuffle)


def build_own_method(run: Run) -> None:
    """Gives a run the method of its place and history, the perturbation at the start."""
    num_classes = len(run.loaders.train.classes)
    run.learner.forget_recordings()  # of another method's steps
    run.method = build_phase_method(
        run.config, run.phase, run.learner, run.world, num_classes, run.guard.history
    )


def enter_phase(run: Run) -> None:
    """Begins the phase that the run has come to: a method for its image size, a new selection.

    The perturbation starts anew because its shape changes (Wong et al. start each phase as a
    process of its own). Weights, momentum, running statistics and generators go on. Held-out
    accuracies at different image sizes do not compare, so that best.pt is replaced at the end of
    the phase's first epoch, however good it was.
    """
    build_own_method(run)
    run.progress.best_score = -1.0
    run.log.say(f"phase {run.config.phases[run.phase]}: {run.loaders.train.num_batches:,} "
                "minibatches an epoch")  # fmt: skip


def build_guard(
    config: TrainConfig, loaders: Loaders, method: TrainingMethod, history: History, world: World
) -> Guard:
    """The run's guard; it is off where nothing needs it, and where no images are held out."""
    if not method.seeks_robustness or config.guard_every == 0:
        return Guard(config, None, history, world)
    if loaders.guard is None:
        say(world, "guard: off, for no training images are held out (--holdout-images 0)")
    return Guard(config, loaders.guard, history, world)
