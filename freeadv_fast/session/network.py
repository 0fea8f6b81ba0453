"""The network and its learner, as a config asks for them and the device allows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from freeadv_fast.config.budget import Budget
from freeadv_fast.config.method_names import SUMMING
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.distributed.compress import GradientCompression
from freeadv_fast.distributed.world import World, is_main_rank
from freeadv_fast.errors import UserError, blaming
from freeadv_fast.models.batch_norm import (
    DualNetwork,
    add_auxiliary_bn,
    apply_bn_groups,
)
from freeadv_fast.models.fused.fuse import fuse_batch_norms
from freeadv_fast.models.half_weights import use_half_weights
from freeadv_fast.models.one_pixel import use_products_for_one_pixel
from freeadv_fast.models.own import adopt, is_own
from freeadv_fast.models.retinanet import Detector, build_detector
from freeadv_fast.models.stem import use_space_to_depth
from freeadv_fast.models.zoo import build_model, check_image_size
from freeadv_fast.ops import dispatch
from freeadv_fast.runs import checkpoint
from freeadv_fast.runs.backbone import load_into_detector
from freeadv_fast.session.run import say
from freeadv_fast.step.averaging import WeightAverage
from freeadv_fast.step.detection import Detection
from freeadv_fast.step.graphs import WARM_UP, WARM_UP_OF_RANKS, CudaRecorder, GraphRunner
from freeadv_fast.step.learner import Learner, Pixels
from freeadv_fast.step.optim import build_optimizer, is_capturable
from freeadv_fast.step.task import Classification, Task
from freeadv_fast.step.trial import Trial

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_network(
    config: TrainConfig, classes: list[str], *, is_fresh: bool, own: nn.Module | None = None
) -> nn.Module:
    """The network that the config names, or a copy of the caller's own.

    Args:
        config: The run. classes: Of its data.
        is_fresh: Whether no checkpoint brings the weights.
        own: The caller's network, in place of the one that ``config.arch`` names.
    """
    if config.task == "detection":
        return build_own_detector(config, classes, is_fresh=is_fresh)
    options: dict[str, Any] = {
        "per_image_standardize": config.normalization == "per-image",
        "bn_group": config.bn_group,
    }
    if own is not None:
        sizes = [phase.image_size for phase in config.phase_configs]
        model = adopt(own, len(classes), image_sizes=sizes, **options)
    else:
        model = build_model(config.arch, len(classes), image_size=config.image_size, **options)
        for phase in config.phases:
            with blaming(f"--phases {phase}"):
                check_image_size(model, config.arch, len(classes), phase.image_size)
    if config.init_from is not None and is_fresh:
        state = checkpoint.load_checkpoint(Path(config.init_from), "--init-from")
        origin = f"--init-from {config.init_from}"
        tell(checkpoint.load_weights(model, state, config.arch, origin, is_fine_tuned=True))
    return model


def build_own_detector(config: TrainConfig, classes: list[str], *, is_fresh: bool) -> Detector:
    """The detector that the config names, its backbone or all of it from ``--init-from``.

    Arguments are those of `build_network`.
    """
    model = build_detector(config.arch, len(classes))
    if config.bn_group is not None:
        apply_bn_groups(model, config.bn_group)
    if not is_fresh:
        return model
    if config.init_from is None:
        if config.data.startswith("coco:"):
            tell(["backbone: random weights; the papers' starts from ImageNet (--init-from FILE)"])
        return model
    state = checkpoint.load_checkpoint(Path(config.init_from), "--init-from")
    tell(load_into_detector(model, state, config.arch, f"--init-from {config.init_from}"))
    return model


def tell(remarks: list[str]) -> None:
    """Prints what the user should know, once for all ranks."""
    if remarks and is_main_rank():
        print(*remarks, sep="\n", flush=True)


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
    if world.device.type == "cpu":
        use_products_for_one_pixel(model)
    precision = PRECISIONS[resolve_precision(config.precision, world.device)]
    if wants_half_weights(config, world):
        is_sum = adds_gradients_up(config, world)
        use_half_weights(model, precision, has_half_gradients=not is_sum)
    # Together, for apex may be missing on one node of several.
    optimizer = world.together(
        lambda: build_optimizer(
            model,
            name=config.optimizer,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            decay=config.decay,
            lalr_min=config.lalr_min,
            lalr_max=config.lalr_max,
            lalr_exempt=config.lalr_exempt,
        )
    )
    obstacle = obstacle_to_graphs(config, world, optimizer)
    if config.graphs == "on" and obstacle:
        raise UserError(f"--graphs on: {obstacle}; use --graphs auto")
    if obstacle and config.graphs == "auto" and world.device.type == "cuda":
        say(world, f"graphs: off, {obstacle}")
    recorder = None if obstacle else CudaRecorder()
    net = DualNetwork(model) if config.has_branches else model
    # On the stream of the recordings, because data parallelism's hooks run where it was built.
    with recorder.warming_up() if recorder else contextlib.nullcontext():
        net, compression = over_ranks(net, config, world)
    pixels = Pixels(
        torch.tensor(config.pixel_mean, device=world.device),
        torch.tensor(config.pixel_std, device=world.device),
        # Pixels that the network itself standardises are not yet centred: bf16 would round them
        # by half a grey level.
        torch.float32 if config.normalization == "per-image" else precision,
        has_packed_input,
    )

    def attack_scale_at(update: int) -> float:
        if config.attack_warmup == 0:
            return 1.0
        return min(1.0, budget.data_epochs_before(update) * config.cost / config.attack_warmup)

    learner = Learner(
        net,
        optimizer,
        learning_rates(config, budget),
        pixels,
        precision,
        num_ranks=world.size,
        attack_scale_at=attack_scale_at,
        compression=compression,
        task=build_task(config, model),
    )
    if config.ema is not None:
        learner.average = WeightAverage(learner.network, config.ema)
    if recorder is not None:
        warm_up, trial = WARM_UP, None
        if world.size > 1:
            warm_up = WARM_UP_OF_RANKS
            trial = Trial(learner.changing_tensors, world, recorder)
        learner.record_with(GraphRunner(lambda line: say(world, line), recorder, warm_up, trial))
    return learner


def build_task(config: TrainConfig, model: nn.Module) -> Task:
    """What the network is trained to do."""
    if isinstance(model, Detector):
        return Detection(model, config.attack_loss)
    return Classification(config.label_smoothing)


def over_ranks(
    net: nn.Module, config: TrainConfig, world: World
) -> tuple[nn.Module, GradientCompression | None]:
    """The network with gradients that are averaged over the ranks, and what compresses them.

    Each rank keeps its own running statistics (checkpoint.averaged_buffers); broadcasting them at
    every forward would also break two forwards before one backward.
    """
    if world.size == 1:
        return net, None
    parallel = DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)
    # Else it times its collectives in every hundredth pass, and waits for the device; a pass that
    # is being recorded may not (torch 2.11, c10d/logger.cpp, set_runtime_stats_and_log).
    parallel._set_ddp_runtime_logging_sample_rate(2**31 - 1)
    if config.compress == "none":
        return parallel, None
    compression = GradientCompression(
        config.compress,
        rank=world.rank,
        size=world.size,
        seed=config.seed,
        device=world.device,
        group=world.new_group(),
        machines=world.new_machine_groups(),
    )
    compression.attach(parallel)
    return parallel, compression


def learning_rates(config: TrainConfig, budget: Budget) -> Callable[[int], float]:
    """The learning rate of an update, by its index: the warm-up, then the schedule from its start.

    A run of 5 + 100 epochs drops by 10 where one of 100 does, 5 epochs later (Zhang et al., UAI
    2022, main.py: the warm-up's epochs come on top, and its last update is at the full rate).

    Raises:
        UserError: the schedule moves once a data epoch, and there is one at most.
    """
    warm_epochs = config.warmup_epochs / config.cost
    warm_updates = budget.updates_before(warm_epochs)
    left = math.ceil(budget.data_epochs_before(budget.total_updates) - warm_epochs - 1e-9)
    if config.schedule.kind == "onecycle-epochs" and left < 2:  # a cycle's last step moves nothing
        by_updates = str(config.schedule).replace("-epochs", "")
        raise UserError(
            f"--schedule {config.schedule}: one pass over the data, after the warm-up, has no "
            f"cycle; use {by_updates}, which moves with each update"
        )

    def lr_at(update: int) -> float:
        if update < warm_updates:
            return config.lr * (update + 1) / warm_updates
        return config.lr * config.schedule.factor(
            update - warm_updates,
            total_updates=budget.total_updates - warm_updates,
            data_epochs_before=lambda u: budget.data_epochs_before(warm_updates + u) - warm_epochs,
            cost=config.cost,
        )

    return lr_at


def has_fused_norms(config: TrainConfig, world: World) -> bool:
    """Whether batch norms are fused: by default where that is a kernel, on a GPU."""
    if config.fuse == "auto":
        return dispatch.backend(world.device) == "triton" and not config.is_second_order
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


def wants_half_weights(config: TrainConfig, world: World) -> bool:
    """Whether layers read copies of their weights in half precision, which the optimizer writes.

    A network of the user's own may change its weights in ways that leave no trace
    (`models.half_weights`), GradAlign's term wants autograd alone, and a detector's head adds the
    gradients of five maps up in one weight.
    """
    return (
        "half-weights" in dispatch.FAST_PATHS
        and dispatch.backend(world.device) == "triton"
        and has_fused_norms(config, world)
        and resolve_precision(config.precision, world.device) != "fp32"
        and config.optimizer == "sgd"
        and not config.is_second_order
        and not is_own(config.arch)
        and config.task == "classification"
    )


def adds_gradients_up(config: TrainConfig, world: World) -> bool:
    """Whether an update's gradients are sums over ranks, parts or passes: made in float32, then."""
    return world.size > 1 or config.update_size > config.batch_size or config.method in SUMMING


def obstacle_to_graphs(
    config: TrainConfig, world: World, optimizer: torch.optim.Optimizer
) -> str | None:
    """Why updates are not recorded as CUDA graphs; None where they are."""
    if config.graphs == "off":
        return "switched off"
    if world.device.type != "cuda":
        return "there is no GPU"
    if not config.is_recordable:
        return "--mix is not recorded"
    if not is_capturable(optimizer):
        return f"--optimizer {config.optimizer} reads the learning rate on the host"
    if world.size > 1 and config.compress != "none" and config.graphs == "auto":
        return "gradients travel compressed (--graphs on records them too)"
    return None


def resolve_precision(precision: str, device: torch.device) -> str:
    """What ``auto`` means here: bf16 on GPUs that have it, fp16 on older ones, fp32 on a CPU."""
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
