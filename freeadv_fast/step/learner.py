"""The network and everything that turns a loss into its next weights.

Methods speak to a `Learner` in the words of their papers: network input, loss, backward, step.
Precision, gradient scaling, data parallelism, the learning rate and the meters live behind them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from freeadv_fast import ops
from freeadv_fast.config.threat import AnyThreatModel, L2ThreatModel, clip_to_pixels_
from freeadv_fast.distributed.compress import GradientCompression
from freeadv_fast.distributed.heartbeat import arrive
from freeadv_fast.models.batch_norm import Branch, DualNetwork
from freeadv_fast.models.half_weights import half_copy
from freeadv_fast.step.averaging import WeightAverage
from freeadv_fast.step.graphs import GraphRunner, Step
from freeadv_fast.step.meters import Meters, Role
from freeadv_fast.step.mixing import Labels
from freeadv_fast.step.parts import WHOLE, InParts
from freeadv_fast.step.sgd import MasterSgd
from freeadv_fast.step.task import Classification, Task, steepest


@dataclasses.dataclass(frozen=True)
class Pixels:
    """How pixels become the network's input.

    Attributes:
        mean: (3,) float32 on the device, subtracted from pixels in [0, 1].
        std: (3,) float32 on the device, the divisor.
        dtype: The network input's dtype.
        space_to_depth: Whether the input is in the layout of `models.stem.SpaceToDepthConv2d`,
            (n, 16, H/2 + 3, W/2 + 3), instead of (n, 3, H, W). Its gradient is, too.
    """

    mean: Tensor
    std: Tensor
    dtype: torch.dtype
    space_to_depth: bool = False


class Learner:
    """A network in training.

    Args:
        net: The network, wrapped for data parallelism when there are several ranks; a
            `DualNetwork` inside for methods that name a batch-norm branch.
        optimizer: Its optimizer.
        lr_at: Learning rate of an update, by its index.
        pixels: Input statistics and dtype.
        precision: bfloat16 and float16 run the network under autocast; float16 adds a gradient
            scaler. The input's dtype by default.
        num_ranks: Ranks over which gradients are averaged.
        attack_scale_at: Share of its full length at which an attack steps, by the index of the
            update; methods that warm their attack up multiply by it.
        compression: What averages gradients over the ranks in place of an all-reduce.
        task: What the network is trained to do; to classify by default.

    Attributes:
        minibatch_size: Images that go through the network together, at most; an update on more is
            made in parts and adds their gradients up. None for all of them.
        part: Of the update in progress.
        method_state: What the method in training keeps between updates, as it saves it.
        average: Of the weights, over the updates; None where none is kept.
        compressed_updates: Updates whose gradients travelled compressed, in all sessions of the
            run: all, unless it has had one rank for a while.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_at: Callable[[int], float],
        pixels: Pixels,
        precision: torch.dtype | None = None,
        num_ranks: int = 1,
        attack_scale_at: Callable[[int], float] = lambda update: 1.0,
        compression: GradientCompression | None = None,
        task: Task | None = None,
    ) -> None:
        """Starts at update 0."""
        device = pixels.mean.device
        self.net = net
        self.optimizer = optimizer
        self.lr_at = lr_at
        self.pixels = pixels
        self.precision = precision or pixels.dtype
        self.num_ranks = num_ranks
        self.attack_scale_at = attack_scale_at
        self.compression = compression
        self.task = task or Classification()
        self._bytes_before = 0
        self.compressed_updates = 0
        self.updates = 0
        self.average: WeightAverage | None = None
        self.minibatch_size: int | None = None
        self.part = WHOLE
        self.method_state: Callable[[], dict[str, Any]] = dict
        self.runner: GraphRunner | None = None
        self._rate: Tensor | None = None
        self.meters = Meters(device)
        # Compressed gradients that are not finite end as NaN on every rank. The scaler skips such
        # an update in any precision, at a scale of 1 where fp16 needs none.
        is_half, is_compressed = self.precision is torch.float16, compression is not None
        self.loss_scale = 1.0 if is_compressed and not is_half else None
        self.scaler = torch.amp.grad_scaler.GradScaler(
            device.type,
            init_scale=self.loss_scale or 2.0**16,
            enabled=is_half or is_compressed,
        )

    def network_input(
        self, images: Tensor, delta: Tensor | None = None, unit: float = 1.0
    ) -> Tensor:
        """The normalised network input at images + delta.

        Args:
            images: (n, H, W, 3) uint8, or float16 grey levels of images perturbed before.
            delta: (n, H, W, 3) perturbation in `unit` grey levels; None for none.
            unit: Grey levels that one unit of `delta` stands for.

        Returns:
            (n, 3, H, W) in the network's input dtype, channels_last, a leaf; in the stem's layout
            where `pixels` says so.
        """
        return ops.perturb_normalize(
            images,
            delta,
            self.pixels.mean,
            self.pixels.std,
            unit=unit,
            dtype=self.pixels.dtype,
            space_to_depth=self.pixels.space_to_depth,
        )

    @property
    def attack_scale(self) -> float:
        """Share of its full length at which an attack of this update steps, in 0..1."""
        return self.attack_scale_at(self.updates)

    @property
    def label_smoothing(self) -> float:
        """Share of a classifier's label that is spread over all classes, in [0, 1)."""
        assert isinstance(self.task, Classification)
        return self.task.label_smoothing

    @property
    def gradient_bytes(self) -> int:
        """Bytes of compressed gradients that have left this rank, in all sessions of the run."""
        own = self.compression.bytes_sent if self.compression is not None else 0
        return self._bytes_before + own

    @property
    def module(self) -> nn.Module:
        """The network inside data parallelism; attack passes go through it."""
        if isinstance(self.net, DistributedDataParallel):
            return cast(nn.Module, self.net.module)
        return self.net

    @property
    def network(self) -> nn.Module:
        """The network inside data parallelism and branches: what is saved and evaluated."""
        module = self.module
        return module.model if isinstance(module, DualNetwork) else module

    def autocast(self) -> torch.autocast:
        """The context in which layers run: autocast in half precision, else nothing."""
        is_half = self.precision in (torch.bfloat16, torch.float16)
        device = self.pixels.mean.device.type
        return torch.autocast(device, self.precision if is_half else None, enabled=is_half)

    @functools.cached_property
    def evaluating(self) -> nn.Module:
        """The network in eval mode, for attacks that leave batch norm's statistics alone.

        A module tree of its own over the same tensors: nothing is toggled between passes.
        """
        return evaluating_tree(self.module)

    def forward(
        self,
        x: Tensor,
        branch: Branch | None = None,
        *,
        attack: bool = False,
        evaluating: bool = False,
    ) -> Any:
        """The network's outputs at its input `x`, autocast in half precision.

        Args:
            x: (n, 3, H, W) network input.
            branch: Batch-norm branch of a `DualNetwork`; None for a network without branches.
            attack: Whether no weight's gradient will be asked for, so that data parallelism has
                nothing to prepare.
            evaluating: Whether the network is in eval mode; for attacks as well.

        Returns:
            (n, classes) logits of a classifier, in float32 or float64; what a detector's task
            takes.
        """
        net = self.module if attack else self.net
        net = self.evaluating if evaluating else net
        with self.autocast():
            outputs = net(x) if branch is None else net(x, branch)
        if not isinstance(outputs, Tensor):
            return outputs
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))

    def loss(
        self,
        x: Tensor,
        labels: Labels,
        global_size: float,
        *,
        role: Role,
        branch: Branch | None = None,
        weight: float = 1.0,
    ) -> Tensor:
        """The task's loss at network input `x`: this rank's weighted sum over the global size.

        Data parallelism averages gradients over the ranks, hence the factor `num_ranks`: the
        update is the gradient of the global mean also when ranks hold different counts.

        Args:
            x: (n, 3, H, W) network input.
            labels: (n,) int64, or mixed ones; a detector's `step.objects`.
            global_size: Images of the minibatch over all ranks, each counted with its weight.
            role: What the pass is for; the meters keep roles apart.
            branch: Batch-norm branch of a `DualNetwork`; None for a network without branches.
            weight: Of each of these images in the minibatch.
        """
        outputs = self.forward(self.task.seen(x, labels), branch)
        return self.share(self.loss_sum(outputs, labels, role=role), global_size, weight)

    def loss_sum(self, outputs: Any, labels: Labels, *, role: Role) -> Tensor:
        """The loss that trains weights, summed over the images of a pass, which the meters count.

        Args:
            outputs: The network's. labels: A row an image.
            role: What the pass is for.
        """
        return self.task.loss_sum(outputs, labels, self.meters.of(role))

    def share(self, loss_sum: Tensor, global_size: float, weight: float = 1.0) -> Tensor:
        """A sum over this rank's images as its share of the mean over all ranks; see `loss`."""
        return loss_sum * (weight * self.num_ranks / global_size)

    def input_gradient(
        self,
        x: Tensor,
        labels: Tensor,
        branch: Branch | None = None,
        *,
        towards: bool = False,
        smoothed: bool = False,
    ) -> Tensor:
        """Gradient of the task's mean loss at network input `x`, and of nothing else.

        No weight's gradient is computed, which saves a third of a backward pass's products. fp16's
        loss scale stays in it: only its sign and its direction mean anything. The mean, because
        that scale is fitted to the mean training loss: at 2^17, where it arrives after 2,000 good
        steps, all gradients of a sum over 256 images overflowed.

        Args:
            x: (n, 3, H, W) network input, a leaf; its own gradient is not set.
            labels: A row an image.
            branch: Batch-norm branch of a `DualNetwork`; None for a network without branches.
            towards: Whether ascent should lead towards `labels` (a targeted attack) instead of
                away from them.
            smoothed: Whether the loss is the one that trains weights, with smoothed labels.
        """
        x = x.detach().requires_grad_()
        outputs = self.forward(self.task.seen(x, labels), branch, attack=True)
        losses = self.task.attack_losses(outputs, labels, smoothed=smoothed)
        scaled = [self.scaler.scale((-loss if towards else loss) / len(x)) for loss in losses]
        gradients = [
            torch.autograd.grad(loss, x, retain_graph=loss is not scaled[-1])[0] for loss in scaled
        ]
        return gradients[0] if len(gradients) == 1 else steepest(gradients, self.pixels.std)

    def ascend_(
        self, delta: Tensor, gradient: Tensor, images: Tensor, threat: AnyThreatModel
    ) -> None:
        """One attack step, in place: up the loss, into the ball, then into the pixel range.

        The step is along the gradient's sign, or along the gradient in an L2 ball. Clipped images
        never leave the pixel range, so that no pixel loses its gradient in the next step, as in the
        PGD of Madry et al. (Free training's step, `ops.sign_ascent_`, does not clip.)

        Args:
            delta: (n, H, W, 3) float32 in grey levels, within the pixel range; updated.
            gradient: (n, 3, H, W) at the network's input, as `input_gradient` returns it.
            images: (n, H, W, 3) uint8.
            threat: The ball and the step's length.
        """
        nonfinite = self.meters.nonfinite_gradients
        if isinstance(threat, L2ThreatModel):
            # x = (pixel - mean) / std: the chain rule, where a sign needs none.
            threat.ascend_(delta, gradient / self.pixels.std.view(-1, 1, 1), nonfinite)
        else:
            step, eps = float(threat.step.levels), float(threat.eps.levels)
            ops.sign_ascent_(delta, gradient, images, nonfinite, step=step, eps=eps)
        clip_to_pixels_(delta, images)

    def ascend_to_next_input_(
        self, delta: Tensor, x: Tensor, images: Tensor, *, step: float, eps: float, unit: float
    ) -> None:
        """Free training's step on delta along `x`'s gradient; `x` becomes the input at the new one.

        One kernel reads the gradient, moves delta and writes the next network input.

        Args:
            delta: (n, H, W, 3) perturbation in `unit` grey levels; updated.
            x: Network input at images + delta, a leaf with a gradient; updated, its gradient gone.
            images: (n, H, W, 3) uint8.
            step: Length of the step in grey levels. eps: Radius. unit: Of delta.
        """
        assert x.grad is not None  # backward has set it
        ops.ascend_normalize_(
            delta,
            x,
            x.grad,
            images,
            self.pixels.mean,
            self.pixels.std,
            self.meters.nonfinite_gradients,
            step=step,
            eps=eps,
            unit=unit,
        )
        x.grad = None

    def zero_grad(self) -> None:
        """Drops the last update's gradients, before the first part of this one.

        Just before the new ones come: dropped right after the update, their pages went back to the
        system and were faulted in again, 9 % of a step on a CPU (ResNet-18 at 32 px, 16 images).
        """
        if self.part.is_first:
            self.optimizer.zero_grad(set_to_none=True)

    def add_gradients(self, loss: Tensor) -> None:
        """One backward pass on top of the gradients that are there.

        The sign of every gradient is that of the unscaled loss.
        """
        self.scaler.scale(loss).backward()

    def backward(self, loss: Tensor) -> None:
        """A step's only backward pass: nothing of the last update is left in the gradients."""
        self.zero_grad()
        self.add_gradients(loss)

    @contextlib.contextmanager
    def without_reduction(self) -> Iterator[None]:
        """Passes in here add to this rank's gradients; the next pass outside sums them all.

        So several backward passes cost one all-reduce. Forward passes belong in here too.
        """
        if isinstance(self.net, DistributedDataParallel):
            with self.net.no_sync():
                yield
        else:
            yield

    def scale_gradients(self, parameters: Sequence[nn.Parameter], factor: float) -> None:
        """Multiplies the gradients of some parameters, after the last backward pass."""
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)

    def update(self, step: Step, *inputs: Any) -> None:
        """One update: the host's half here, the device's in `step`, as one launch where possible.

        Args:
            step: Does a whole update, up to `apply_gradients`, and leaves the host nothing to do.
                Of more images than `minibatch_size` it is given one part after the other, see
                `parts.InParts`.
            *inputs: Its tensors and numbers, all that differs between two updates. Tensors have a
                row an image, the first of them is one.
        """
        arrive()  # where ranks wait for each other's gradients next
        self._set_rate()
        if self.average is not None:
            self.average.begin_update()
        if isinstance(self.optimizer, MasterSgd):
            self.optimizer.refresh_copies()
        if self.compression is not None:
            self.compression.begin_update(self.updates)
            self.compressed_updates += 1
        step = self._in_parts(step, len(inputs[0]))
        if self.runner is None:
            step(*inputs)
        else:
            self.runner(step, *inputs)
        self.updates += 1

    def _in_parts(self, step: Step, num_images: int) -> Step:
        """A step on so many images as the network can take it."""
        size = self.minibatch_size or num_images
        # No part of one image: batch norm cannot train on it.
        num_parts = min(math.ceil(num_images / size), num_images // 2)
        return InParts(self, step, num_parts) if num_parts > 1 else step

    def slots(self, images: Tensor) -> slice:
        """Batch slots of the images that a step is given: what it keeps for them lies there."""
        return slice(self.part.first_slot, self.part.first_slot + len(images))

    def apply_gradients(self) -> None:
        """The optimizer's half of an update on the device, once all parts' gradients are there.

        fp16 overflows in any of them skip it, as do compressed gradients that are not finite. The
        average takes the weights in that it led to.
        """
        if not self.part.is_last:
            return
        self.scaler.step(self.optimizer)
        if self.scaler.is_enabled():
            (is_skipped,) = self.scaler._found_inf_per_device(self.optimizer).values()
            self.meters.skipped_updates += is_skipped.to(torch.int64)
        self.scaler.update(self.loss_scale)
        if self.average is not None:
            self.average.update()

    def record_with(self, runner: GraphRunner) -> None:
        """Lets `runner` record updates; the learning rate then lives on the device."""
        self.runner = runner
        self._rate = torch.zeros((), device=self.pixels.mean.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate

    def changing_tensors(self) -> dict[str, list[Tensor]]:
        """All tensors that an update changes and a later one reads, by what they are."""
        buffers, parameters = list(self.module.buffers()), list(self.module.parameters())
        kinds: dict[str, list[Tensor]] = {
            "weights": [*parameters],
            "averages": self.average.tensors if self.average is not None else [],
            "rounded weights": [half.tensor for p in parameters if (half := half_copy(p))],
            "running statistics": [b for b in buffers if b.is_floating_point()],
            "counts of updates": [b for b in buffers if not b.is_floating_point()],
            "optimizer's sums": _tensors_in(self.optimizer.state),
            "loss scale": _tensors_in(vars(self.scaler)),
            "metrics": _tensors_in(vars(self.meters)),
            "attacks": _tensors_in(self.method_state()),
        }
        return {kind: tensors for kind, tensors in kinds.items() if tensors}

    @property
    def is_warm(self) -> bool:
        """Whether updates are made as they will be from now on: recorded, where they can be."""
        return self.runner is None or self.runner.is_warm

    def forget_recordings(self) -> None:
        """Gives their memory back, the gradients that lie in it included."""
        if self.runner is not None:
            self.zero_grad()
            self.runner.forget()

    def _set_rate(self) -> None:
        """This update's learning rate, where the optimizer reads it; waits for nothing."""
        rate = self.lr_at(self.updates)
        if self._rate is not None:
            self._rate.fill_(rate)
            return
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @torch.no_grad()
    def clean_hits(self, images: Tensor, labels: Tensor) -> Tensor:
        """How many clean images the network classifies right now, in eval mode; a () tensor.

        Changes nothing: batch-norm statistics stay as they are.
        """
        was_training = self.module.training
        self.module.eval()
        minibatches = images.split(self.minibatch_size or len(images))
        logits = [self.forward(self.network_input(part), attack=True) for part in minibatches]
        self.module.train(was_training)
        return (torch.cat(logits).argmax(1) == labels).sum()

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, scaler and counters; weights and meters are saved apart."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "updates": self.updates,
            "gradient_bytes": self.gradient_bytes,
            "compressed_updates": self.compressed_updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved state."""
        own = [(group["fused"], group["lr"]) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, (is_fused, rate) in zip(self.optimizer.param_groups, own, strict=True):
            # This device's, not those of the machine that saved.
            group["fused"], group["lr"] = is_fused, rate
        self.forget_recordings()  # the optimizer's tensors are others now
        if state["scaler"]:  # one rank had none, where several with --compress go on
            self.scaler.load_state_dict(state["scaler"])
        self.updates = int(state["updates"])
        self.compressed_updates = int(state.get("compressed_updates", 0))
        sent = self.compression.bytes_sent if self.compression is not None else 0
        self._bytes_before = int(state.get("gradient_bytes", 0)) - sent  # also after a rewind


def _tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested dicts."""
    if isinstance(value, Mapping):
        return [tensor for entry in value.values() for tensor in _tensors_in(entry)]
    return [value] if isinstance(value, Tensor) else []


def evaluating_tree(module: nn.Module) -> nn.Module:
    """A tree of modules in eval mode over the same tensors."""
    twin = copy.copy(module)
    twin.training = False
    twin._modules = {
        name: child and evaluating_tree(child) for name, child in module._modules.items()
    }
    return twin
