"""The method and the guard of the phase that a run is in."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.build import Loaders
from freeadv_fast.distributed.world import World
from freeadv_fast.methods.build import TrainingMethod, build_method
from freeadv_fast.methods.fast_advprop import Exchange
from freeadv_fast.session.guard import Guard, History
from freeadv_fast.session.run import Run, say
from freeadv_fast.step.graphs import CudaRecorder, GraphRunner
from freeadv_fast.step.learner import Learner


@dataclasses.dataclass(frozen=True)
class RankShuffle:
    """Moves images between batch-norm groups and ranks, for Fast AdvProp.

    Attributes:
        world: The ranks. seed: Of the run.
    """

    world: World
    seed: int

    def order(self, num_images: int, update: int) -> Tensor:
        """The order of an update's exchange, as a tensor on the device."""
        return self.world.shuffle_order(num_images, seed=self.seed, step=update)

    def __call__(self, images: Tensor, labels: Tensor, order: int | Tensor) -> Exchange:
        """Sends images and labels away in such an order, or in that of an update."""
        if isinstance(order, Tensor):
            return self.world.shuffle_in_order(images, labels, order)
        return self.world.shuffle(images, labels, seed=self.seed, step=order)


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
    method_config = history.method_config(config.phase_configs[phase])
    shuffle = RankShuffle(world, config.seed)
    method = build_method(method_config, learner, world.device, num_classes, shuffle)
    learner.method_state = method.state_dict
    return method


def build_own_method(run: Run) -> None:
    """Gives a run the method of its place and history, the perturbation at the start."""
    num_classes = len(run.loaders.train.classes)
    run.learner.forget_recordings()  # of another method's steps
    run.guard.forget_recordings()  # perhaps of another image size
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
    config: TrainConfig,
    loaders: Loaders,
    method: TrainingMethod,
    history: History,
    world: World,
    *,
    is_recorded: bool,
) -> Guard:
    """The run's guard; it is off where nothing needs it, and where no images are held out.

    A detector holds none out: no image of it is right or wrong.

    Args:
        config: The run. loaders: Of its phase.
        method: That of the phase.
        history: Of the checks before.
        world: This process among the others.
        is_recorded: Whether updates are, so that checks can be.
    """
    is_needed = method.seeks_robustness and config.task == "classification"
    if not is_needed or config.guard_every == 0:
        return Guard(config, None, history, world)
    if loaders.guard is None:
        say(world, "guard: off, for no training images are held out (--holdout-images 0)")
    runner = None
    if is_recorded:  # apart from the updates, which go on recorded where a check cannot be
        runner = GraphRunner(lambda line: say(world, f"guard: {line}"), CudaRecorder(), warm_up=1)
    return Guard(config, loaders.guard, history, world, runner)
