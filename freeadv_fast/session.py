"""Everything a run needs before its first minibatch: folder, data, network, restored state."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from freeadv_fast import checkpoint, ops
from freeadv_fast.attacks import Attack
from freeadv_fast.budget import Budget
from freeadv_fast.config import TrainConfig
from freeadv_fast.config_file import config_to_dict, save_config
from freeadv_fast.data import Loaders, build_phase_loaders
from freeadv_fast.distributed import World
from freeadv_fast.environment import environment
from freeadv_fast.errors import UserError, blaming
from freeadv_fast.graphs import WARM_UP, WARM_UP_OF_RANKS, CudaRecorder, GraphRunner
from freeadv_fast.guard import Guard, History
from freeadv_fast.learner import Learner, Pixels
from freeadv_fast.methods import TrainingMethod, build_method
from freeadv_fast.methods.fast_advprop import Exchange
from freeadv_fast.models.batch_norm import DualNetwork, add_auxiliary_bn
from freeadv_fast.models.fused import fuse_batch_norms
from freeadv_fast.models.stem import use_space_to_depth
from freeadv_fast.models.zoo import build_model, check_image_size
from freeadv_fast.optim import build_sgd, is_capturable
from freeadv_fast.runlog import RunFolder, RunLog, read_json, write_json
from freeadv_fast.threat import AnyThreatModel

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Fields that a resumed run may change: none of them touches a weight.
FREE_TO_CHANGE = {
    "checkpoint_every",
    "eval_attacks",
    "eval_images",
    "eval_step",
    "graphs",
    "log_every",
    "max_bad_fraction",
    "max_passes",
    "output_dir",
    "recipe",
    "resume",
    "workers",
}

# Same machine, versions, ranks and threads: what bit-identical resumption rests on.
REPRODUCIBLE_WITH = ("hardware", "versions", "threads", "ranks")


@dataclasses.dataclass
class Progress:
    """How far a run is; saved with every checkpoint.

    Attributes:
        epoch: Data epochs finished. minibatch: Minibatches of the current one finished.
        passes: Images forwarded and backwarded for the weights, over all ranks.
        attack_passes: Images forwarded and backwarded for a perturbation alone.
        train_seconds: Seconds in the training loop, checkpoints included, evaluation excluded.
        best_score: Held-out accuracy of best.pt. best_epoch: The epoch it is from.
        last_line: The latest training metrics.
    """

    epoch: int = 0
    minibatch: int = 0
    passes: int = 0
    attack_passes: int = 0
    train_seconds: float = 0.0
    best_score: float = -1.0
    best_epoch: int = -1
    last_line: dict[str, Any] = dataclasses.field(default_factory=dict)


class Clock:
    """Seconds spent training, over all sessions of a run."""

    def __init__(self, seconds: float, passes: int) -> None:
        """Continues from earlier sessions' seconds, paused."""
        self._before = seconds
        self._started: float | None = None
        self._lap = (seconds, passes)

    def start(self) -> None:
        """Starts counting."""
        self._started = time.monotonic()

    def pause(self) -> None:
        """Stops counting."""
        self._before, self._started = self.seconds, None

    @property
    def seconds(self) -> float:
        """Seconds counted so far."""
        running = 0.0 if self._started is None else time.monotonic() - self._started
        return self._before + running

    def lap(self, passes: int) -> float:
        """Passes a second since the last lap, given the passes done by now."""
        (seconds_before, passes_before), seconds = self._lap, self.seconds
        self._lap = (seconds, passes)
        return (passes - passes_before) / max(seconds - seconds_before, 1e-9)


@dataclasses.dataclass
class Run:
    """A run in progress: what the training loop reads and moves forward."""

    config: TrainConfig
    world: World
    folder: RunFolder
    phase_loaders: tuple[Loaders, ...]
    budget: Budget
    model: nn.Module
    learner: Learner
    method: TrainingMethod
    guard: Guard
    progress: Progress
    clock: Clock
    log: RunLog
    saved_at: float

    @property
    def phase(self) -> int:
        """The phase that the run is in, from 0; it follows from the data epoch."""
        return self.budget.phase_of(self.progress.epoch)

    @property
    def loaders(self) -> Loaders:
        """The data of the phase that the run is in."""
        return self.phase_loaders[self.phase]

    @property
    def attacks(self) -> tuple[Attack, ...]:
        """The final attacks; none at radius 0."""
        names = self.config.eval_attacks if self.config.eps.levels else ()
        return tuple(Attack.parse(name) for name in names)

    @property
    def evaluation_threat(self) -> AnyThreatModel:
        """Radius and step of validation and of the final attacks."""
        return self.config.evaluation_threat

    @property
    def is_budget_spent(self) -> bool:
        """Whether --max-passes or the update budget is reached."""
        limit = self.config.max_passes
        return (limit is not None and self.progress.passes >= limit) or (
            self.learner.updates >= self.budget.total_updates
        )

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to train."""
        return (
            self.progress.epoch >= self.budget.data_epochs
            or self.is_budget_spent
            or self.guard.history.has_stopped
        )


def prepare(config: TrainConfig, world: World, own_model: nn.Module | None = None) -> Run | None:
    """Builds a run, restored from its checkpoint when it is resumed.

    Args:
        config: The run.
        world: This process among the others.
        own_model: The caller's network; the config names one otherwise.

    Returns:
        None when the run in the folder is finished and there is nothing to do.

    Raises:
        UserError: data, folder, network or checkpoint cannot be used.
    """
    refuse_different_configs(config, world)
    refuse_empty_exchange(config, world)
    folder = RunFolder(Path(config.run_folder))
    precision = resolve_precision(config.precision, world.device)
    config = dataclasses.replace(config, precision=precision)  # type: ignore[arg-type]
    if config.resume and world.on_main(folder.result.exists):
        say(world, f"{folder.root} is finished; its result is in {folder.result}")
        return None
    phase_loaders = world.together(lambda: build_phase_loaders(config, world))
    for line in describe_data(phase_loaders):
        say(world, line)
    classes = phase_loaders[-1].train.classes
    budget = Budget.of(config, [loaders.train.num_batches for loaders in phase_loaders])
    state = find_checkpoint(config, world, folder) if config.resume else None
    torch.manual_seed(config.seed)
    model = own_model or world.together(
        lambda: build_network(config, classes, is_fresh=state is None)
    )
    learner = build_learner(model, config, world, budget)
    model = learner.network
    phase = budget.phase_of(state["progress"]["epoch"]) if state else 0
    history = History.of(state["guard"]) if state else History()
    learner.lr_at = history.slowed(learner.lr_at, config.m)
    method = build_phase_method(config, phase, learner, world, len(classes), history)
    guard = build_guard(config, phase_loaders[phase], method, history, world)
    torch.manual_seed(config.seed + 1_000_003 * world.rank)  # no dropout mask on two ranks
    progress, log_bytes = Progress(), 0
    world.on_main(lambda: folder.claim(config.resume))
    if state is not None:
        progress = restore(state, config, world, model, learner, method)
        log_bytes = int(state["log_bytes"])
        guard.good = state["good"]
    record = environment(ranks=world.size)
    if state is not None:
        warn_about_changes(folder, record, world)
    world.on_main(lambda: write_description(folder, config, record))
    total = num_passes(config, budget, phase_loaders, world)
    total = min(total, config.max_passes or total)
    log = RunLog(folder, total, log_bytes, progress.passes, world.is_main)
    clock = Clock(progress.train_seconds, progress.passes)
    return Run(
        config, world, folder, phase_loaders, budget, model, learner, method, guard, progress,
        clock, log, saved_at=time.monotonic(),
    )  # fmt: skip


def describe_data(phase_loaders: tuple[Loaders, ...]) -> list[str]:
    """Lines for the user about the data of all phases, none twice."""
    return list(dict.fromkeys(line for loaders in phase_loaders for line in loaders.describe()))


def num_passes(
    config: TrainConfig, budget: Budget, phase_loaders: tuple[Loaders, ...], world: World
) -> int:
    """Image passes for the weights that the whole run will make, over all ranks."""
    num_images = 0
    for phase, loaders, span in zip(config.phase_configs, phase_loaders, budget.spans, strict=True):
        num_minibatches = len(span.updates) // config.m
        num_images += min(
            len(span.epochs) * loaders.train.num_images,
            num_minibatches * phase.batch_size * world.size,
        )
    return round(num_images * config.weight_passes)


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


def build_network(config: TrainConfig, classes: list[str], is_fresh: bool) -> nn.Module:
    """The network that the config names, with its first weights unless a checkpoint brings them."""
    model = build_model(
        config.arch,
        len(classes),
        image_size=config.image_size,
        per_image_standardize=config.normalization == "per-image",
        bn_group=config.bn_group,
    )
    for phase in config.phases:
        with blaming(f"--phases {phase}"):
            check_image_size(model, config.arch, len(classes), phase.image_size)
    if config.init_from is not None and is_fresh:
        state = checkpoint.load_checkpoint(Path(config.init_from), "--init-from")
        checkpoint.load_weights(model, state, config.arch, f"--init-from {config.init_from}")
    return model


def build_learner(model: nn.Module, config: TrainConfig, world: World, budget: Budget) -> Learner:
    """The learner around a network, which moves to the training device."""
    # Two minibatch shapes a phase, so that every convolution is timed once and well chosen after.
    torch.backends.cudnn.benchmark = True
    if config.has_branches:
        add_auxiliary_bn(model, config.aux_bn_group)
    model.to(world.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if has_fused_norms(config, world):
        model, left = fuse_batch_norms(model)
        if left:
            say(world, f"fused batch norm: left as they are: {', '.join(left)}")
    has_packed_input = wants_packed_input(config, world) and use_space_to_depth(model)
    # Together, for apex may be missing on one node of several.
    optimizer = world.together(
        lambda: build_sgd(
            model,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            decay=config.decay,
            name=config.optimizer,
        )
    )
    obstacle = obstacle_to_graphs(config, world, optimizer)
    if config.graphs == "on" and obstacle:
        raise UserError(f"--graphs on: {obstacle}; use --graphs auto")
    if obstacle and config.graphs == "auto" and world.device.type == "cuda":
        say(world, f"graphs: off, {obstacle}")
    recorder = None if obstacle else CudaRecorder()
    net = DualNetwork(model) if config.has_branches else model
    if world.size > 1:
        # On the stream of the recordings, because its hooks run where it was built. Each rank keeps
        # its own running statistics (checkpoint.averaged_buffers); broadcasting them at every
        # forward would also break two forwards before one backward.
        with recorder.warming_up() if recorder else contextlib.nullcontext():
            net = DistributedDataParallel(
                net, broadcast_buffers=False, gradient_as_bucket_view=True
            )
    precision = PRECISIONS[resolve_precision(config.precision, world.device)]
    pixels = Pixels(
        torch.tensor(config.pixel_mean, device=world.device),
        torch.tensor(config.pixel_std, device=world.device),
        # Pixels that the network itself standardises are not yet centred: bf16 would round them
        # by half a grey level.
        torch.float32 if config.normalization == "per-image" else precision,
        has_packed_input,
    )

    def lr_at(update: int) -> float:
        return config.lr * config.schedule.factor(
            update,
            total_updates=budget.total_updates,
            data_epochs_before=budget.data_epochs_before,
            cost=config.cost,
        )

    def attack_scale_at(update: int) -> float:
        if config.attack_warmup == 0:
            return 1.0
        return min(1.0, budget.data_epochs_before(update) * config.cost / config.attack_warmup)

    learner = Learner(net, optimizer, lr_at, pixels, precision, world.size, attack_scale_at)
    if recorder is not None:
        warm_up = WARM_UP if world.size == 1 else WARM_UP_OF_RANKS
        learner.record_with(GraphRunner(lambda line: say(world, line), recorder, warm_up))
    return learner


def has_fused_norms(config: TrainConfig, world: World) -> bool:
    """Whether batch norms are fused: by default where that is a kernel, on a GPU."""
    if config.fuse == "auto":
        return ops.backend(world.device) == "triton" and not config.is_second_order
    return config.fuse == "on"


def wants_packed_input(config: TrainConfig, world: World) -> bool:
    """Whether the stem takes its input in space-to-depth layout, if it can.

    On a CPU that pays where every pass takes the input's gradient, in free training. The stem
    alone, 8 images at 224 px on one thread: 91 ms against 131 with that gradient, 60 against 40
    without (bench/results/cpu/stem.json).
    """
    if config.fuse == "auto" and world.device.type == "cpu":
        is_chosen = config.method == "free" and not config.is_second_order
    else:
        is_chosen = has_fused_norms(config, world)
    return is_chosen and config.can_pack_input


def obstacle_to_graphs(
    config: TrainConfig, world: World, optimizer: torch.optim.Optimizer
) -> str | None:
    """Why updates are not recorded as CUDA graphs; None where they are."""
    if config.graphs == "off":
        return "switched off"
    if world.device.type != "cuda":
        return "there is no GPU"
    if not config.is_recordable:
        return f"updates of {config.method} are not all alike"
    if not is_capturable(optimizer):
        return f"--optimizer {config.optimizer} reads the learning rate on the host"
    if world.size > 1 and config.graphs == "auto":
        return "several ranks (--graphs on records them too; no such machine has tried it)"
    return None


def build_guard(
    config: TrainConfig, loaders: Loaders, method: TrainingMethod, history: History, world: World
) -> Guard:
    """The run's guard; it is off where nothing needs it, and where no images are held out."""
    if not method.seeks_robustness or config.guard_every == 0:
        return Guard(config, None, history, world)
    if loaders.guard is None:
        say(world, "guard: off, for no training images are held out (--holdout-images 0)")
    return Guard(config, loaders.guard, history, world)


def resolve_precision(precision: str, device: torch.device) -> str:
    """What ``auto`` means here: bf16 on GPUs that have it, fp16 on older ones, fp32 on a CPU."""
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


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
    saved, current = state["config"], config_to_dict(config)
    for name in sorted(set(saved) - FREE_TO_CHANGE):
        if saved[name] != current.get(name):
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} {current.get(name)}: the run in {folder.root} was made with "
                f"{flag} {saved[name]}; resume it with that, or choose another --output-dir"
            )
    if len(state["ranks"]) != world.size:
        raise UserError(
            f"--nproc-per-node {world.size}: the run in {folder.root} was made with "
            f"{len(state['ranks'])} ranks; resume it with as many"
        )
    return state


def rank_state(run: Run) -> dict[str, Any]:
    """What each rank has of its own: perturbation, sums, generators, running statistics."""
    return {
        "method": run.method.state_dict(),
        "meters": run.learner.meters.state_dict(),
        "random": checkpoint.random_state(run.world.device),
        "buffers": checkpoint.batch_norm_buffers(run.model),
    }


def restore(
    state: dict[str, Any],
    config: TrainConfig,
    world: World,
    model: nn.Module,
    learner: Learner,
    method: TrainingMethod,
) -> Progress:
    """Puts every part back where the checkpoint left it."""
    checkpoint.load_weights(model, state, config.arch, "--resume")
    own = state["ranks"][world.rank]
    for name, buffer in checkpoint.batch_norm_buffers(model).items():
        buffer.copy_(own["buffers"][name])
    learner.load_state_dict(state["learner"])
    learner.meters.load_state_dict(own["meters"])
    method.load_state_dict(own["method"])
    checkpoint.restore_random_state(own["random"], world.device)
    return Progress(**state["progress"])


def warn_about_changes(folder: RunFolder, record: dict[str, Any], world: World) -> None:
    """Says what differs from the session before: the rest will then not be bit-identical."""
    if not world.is_main or not folder.environment.exists():
        return
    before = read_json(folder.environment)
    changed = [key for key in REPRODUCIBLE_WITH if before.get(key) != record.get(key)]
    if changed:
        say(world, f"warning: {', '.join(changed)} changed since the checkpoint (see "
            f"{folder.environment}); the rest of the run will not be bit-identical")  # fmt: skip


def write_description(folder: RunFolder, config: TrainConfig, record: dict[str, Any]) -> None:
    """Writes config.yaml and env.json."""
    save_config(config, folder.config)
    write_json(folder.environment, record)


def to_cpu(value: Any) -> Any:
    """The same nested state with every tensor on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: to_cpu(entry) for key, entry in value.items()}
    return value


def say(world: World, text: str) -> None:
    """Prints a line, once for all ranks."""
    if world.is_main:
        print(text, flush=True)
