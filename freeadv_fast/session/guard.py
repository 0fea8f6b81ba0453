"""The guard: notices catastrophic overfitting while it happens.

Single-step training can lose all its robustness within an epoch while every training number looks
good (Wong et al. 2020; Andriushchenko and Flammarion 2020). So every few minibatches the guard
attacks a slice of the held-out images and measures how far gradients at an image and beside it
agree. The rule, in numbers of held-out images that stand:

- a check's images are pooled with those of the check before, or stand alone;
- the best so far is the highest accuracy of `WINDOW` checks in a row, pooled (of fewer, early on);
- robustness has collapsed when it is below `COLLAPSED_SHARE` of the best, and lower by more than
  `NUM_ERRORS` standard errors of the difference.

Five errors and a window, because the best of a thousand noisy checks is far above their mean: with
three errors and the best single check, every healthy run of 2000 checks raises an alarm when each
check draws 64 new images; with these, about one in a hundred does. The share is below one half
because pairs of checks come that low by chance once robust overfitting has begun its slow decline;
a collapse leaves next to nothing. A fall from 45 % to 5 % is named by the first check after it, or
by the second (tests/unit/test_guard.py).

On a GPU a check runs in the training's precision, where that is bfloat16, and as one recording.
In float32 a pass costs several times as much, and checks would cost more than the hundredth of
training that they are to.

It is the plain weights that are checked, also where an average of them is kept (`step.averaging`):
training goes on from these, and an average still stands when they have fallen.

What is done about a collapse is in `rewind`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from freeadv_fast.config.attack import Attack
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.threat import AnyThreatModel
from freeadv_fast.data.loader import Batch, Loader
from freeadv_fast.distributed.world import World
from freeadv_fast.evaluation.attacks import ascend, cross_entropy, is_correct, random_point
from freeadv_fast.evaluation.evaluate import eval_mode, exact_arithmetic, start_generator
from freeadv_fast.methods.passes import Passes
from freeadv_fast.models.half_weights import refresh_copies
from freeadv_fast.models.normalize import unit_images, with_normalizer
from freeadv_fast.runs.checkpoint import averaged_buffers
from freeadv_fast.step.alignment import misalignment
from freeadv_fast.step.graphs import GraphRunner

# Ten steps tell robust weights from weak ones. The selection of weights at an epoch's end makes the
# same attack, so that it is a check as well, unless it is one among averages.
CHECK_ATTACK = Attack.parse("pgd-10")

COLLAPSED_SHARE = 0.4
NUM_ERRORS = 5.0
WINDOW = 12

# A good state is one whose check reached this share of the best: a run that falls is not good.
GOOD_SHARE = 0.75

# A method that collapses a third time will do so a fourth.
MAX_COLLAPSES = 3

# A forward pass, a backward pass to the input and one to the weights cost about the same, a third
# of a pass each. A check of an image: ten attack steps of two thirds and a last forward pass, and
# two gradients for the alignment.
THIRDS_PER_CHECKED_IMAGE = 2 * CHECK_ATTACK.steps + 1 + 4
LARGEST_SHARE = 0.01


@dataclasses.dataclass(frozen=True)
class Count:
    """Images that stood under attack, of how many."""

    standing: int = 0
    images: int = 0

    @property
    def accuracy(self) -> float:
        """Robust accuracy, a fraction; 0 of no images."""
        return self.standing / max(self.images, 1)


def pooled(counts: Sequence[Count]) -> Count:
    """Several counts as one."""
    return Count(sum(c.standing for c in counts), sum(c.images for c in counts))


def has_fallen(best: Count, now: Count) -> bool:
    """Whether robustness is far below the best, beyond the noise of so few images.

    The standard error is that of the difference of two proportions that are really one (the score
    test): a count of 0 would otherwise look certain.
    """
    both = pooled([best, now]).accuracy
    variance = both * (1 - both) * (1 / max(best.images, 1) + 1 / max(now.images, 1))
    noise = NUM_ERRORS * math.sqrt(variance)
    return now.accuracy < min(COLLAPSED_SHARE * best.accuracy, best.accuracy - noise)


@dataclasses.dataclass
class History:
    """What the checks of a run found: equal on all ranks, and a part of every checkpoint.

    Attributes:
        recent: The last `WINDOW` counts.
        best: The highest accuracy that the window has held.
        minibatches: Minibatches since the last check. thirds: Thirds of an image pass, likewise.
        collapses: One record a collapse, as result.json shows the last of them.
    """

    recent: list[Count] = dataclasses.field(default_factory=list)
    best: Count = Count()
    minibatches: int = 0
    thirds: int = 0
    collapses: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, count: Count) -> bool:
        """Notes a check and says whether robustness has collapsed."""
        self.minibatches = self.thirds = 0
        self.recent = [*self.recent, count][-WINDOW:]
        collapsed = any(has_fallen(self.best, pooled(self.recent[-n:])) for n in (1, 2))
        now = pooled(self.recent)
        if now.accuracy >= self.best.accuracy:
            self.best = now
        return collapsed

    def forget(self) -> None:
        """Starts over with the next check; what collapsed before stays known."""
        self.recent, self.best = [], Count()

    def actions(self, name: str) -> list[dict[str, Any]]:
        """The collapses that were answered so."""
        return [collapse for collapse in self.collapses if collapse["action"] == name]

    @property
    def has_stopped(self) -> bool:
        """Whether a collapse ended the training."""
        return bool(self.actions("stop"))

    def method_config(self, config: TrainConfig) -> TrainConfig:
        """The config of the method that trains now: GradAlign's at the same eps once switched."""
        if not self.actions("gradalign"):
            return config
        return dataclasses.replace(
            config,
            method="gradalign",
            on_collapse="restore",
            m=1,
            attack_steps=1,
            step_size=None,
            awp=0.0,
            reg_lambda=None if config.method == "elle" else config.reg_lambda,
        )

    def slowed(self, lr_at: Callable[[int], float], m: int) -> Callable[[int], float]:
        """The learning rate after what has happened: halved by each restore.

        Args:
            lr_at: The schedule, by update.
            m: Updates that the config's method makes on a minibatch. GradAlign makes one, and goes
                through the schedule m updates at a time.
        """

        def slowed_lr_at(update: int) -> float:
            for switch in self.actions("gradalign"):
                start = switch["rewound_to_update"]
                update = start + (update - start) * m
            return lr_at(update) * 0.5 ** len(self.actions("restore"))

        return slowed_lr_at

    @classmethod
    def of(cls, state: dict[str, Any]) -> History:
        """A history from its `state_dict`."""
        recent = [Count(**count) for count in state["recent"]]
        return cls(**state | {"recent": recent, "best": Count(**state["best"])})

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Check:
    """What a check found, over all ranks.

    Attributes:
        count: Images that stood under PGD-10.
        alignment: Mean cosine of the loss's gradients at an image and at a uniform point of the
            ball around it, -1..1; about 1 for a locally linear loss, about 0 after a collapse.
        seconds: Wall time on rank 0.
    """

    count: Count
    alignment: float
    seconds: float

    @property
    def line(self) -> dict[str, float]:
        """The check's part of a line of log.jsonl."""
        return {
            "guard_robust_accuracy": self.count.accuracy,
            "guard_alignment": self.alignment,
            "guard_seconds": self.seconds,
        }


class Guard:
    """Checks a run's robustness, and remembers what it found and the last good state.

    Nothing that training depends on is touched: batch norm is in eval mode, random starts have a
    generator of their own, no weight's gradient is computed.

    Attributes:
        history: What the checks found.
        good: The last good state, as `rewind.snapshot` took it, or as a checkpoint brought it.

    Args:
        config: The run.
        loader: This rank's share of the slice; None turns the guard off.
        history: Of the checks before.
        world: The ranks.
        runner: Records checks; None where they run as they are.
    """

    def __init__(
        self,
        config: TrainConfig,
        loader: Loader | None,
        history: History,
        world: World,
        runner: GraphRunner | None = None,
    ) -> None:
        """Reads nothing yet."""
        self.config, self.world, self.history = config, world, history
        self.good: dict[str, Any] | None = None
        self.num_images = loader.num_images if loader else 0
        self._slice: tuple[Loader | None, list[Batch]] = (None, [])
        self._runner = runner
        self._network: nn.Sequential | None = None
        # Images, those that stand, sum of the cosines: a recorded check adds to them.
        self._sums = torch.zeros(3, dtype=torch.float64, device=world.device)

    @property
    def is_on(self) -> bool:
        """Whether the run is guarded."""
        return self.num_images > 0

    def advance(self, passes: Passes) -> None:
        """Counts a minibatch towards the next check."""
        self.history.minibatches += 1
        self.history.thirds += 3 * passes.weights + 2 * passes.attack

    @property
    def is_due(self) -> bool:
        """Whether it is time for a check, the same on every rank and in every session.

        Without --guard-every: as soon as a check costs at most `LARGEST_SHARE` of the passes since
        the last one.
        """
        if self.config.guard_every is not None:
            return self.is_on and self.history.minibatches >= self.config.guard_every
        cost = self.num_images * THIRDS_PER_CHECKED_IMAGE
        return self.is_on and cost <= LARGEST_SHARE * self.history.thirds

    def batches(self, loader: Loader | None) -> list[Batch]:
        """The slice on the device, read once; anew when a phase brings another image size."""
        if loader is not None and loader is not self._slice[0]:
            self.forget_recordings()
            self._slice = loader, self.world.together(lambda: list(loader.epoch(0)))
        return self._slice[1]

    def forget_recordings(self) -> None:
        """Gives their memory back."""
        if self._runner is not None:
            self._runner.forget()

    def check(self, model: nn.Module, loader: Loader | None) -> Check:
        """Attacks the slice; all ranks together, one read of the device.

        Args:
            model: Network of normalised images, not wrapped by DDP; its modes are restored.
            loader: This rank's share of the slice in the present phase.
        """
        batches = self.batches(loader)
        config, device = self.config, self.world.device
        refresh_copies(model.parameters())
        wait_for(device)
        started = time.perf_counter()
        if self._network is None or self._network[1] is not model:
            self._network = with_normalizer(model, config.pixel_mean, config.pixel_std)
            self.forget_recordings()
        self._sums.zero_()
        with (
            averaged_buffers(model, self.world),
            eval_mode(self._network),
            exact_arithmetic(device),
            self._autocast(),
        ):
            for batch in batches:
                start = random_start(batch, config.evaluation_threat, seed=config.seed)
                if self._runner is None:
                    self._add_probe(batch.images, batch.labels, start)
                else:
                    self._runner(self._add_probe, batch.images, batch.labels, start)
        images, standing, cosines = self.world.sum_(self._sums.clone()).tolist()
        seconds = time.perf_counter() - started
        return Check(Count(int(standing), int(images)), cosines / images, round(seconds, 4))

    def _add_probe(self, images: Tensor, labels: Tensor, start: Tensor) -> None:
        """Adds some images' probe to the sums; waits for nothing."""
        assert self._network is not None
        self._sums += probe(self._network, images, labels, start, self.config.evaluation_threat)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        """A GPU's bfloat16 where it trains in it; fp16's gradients would need a scale."""
        if self.world.device.type == "cuda" and self.config.precision == "bf16":
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()


def wait_for(device: torch.device) -> None:
    """Lets a GPU finish its queue, so that it is not charged to what is timed next."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_start(batch: Batch, threat: AnyThreatModel, *, seed: int) -> Tensor:
    """(n, 3, H, W) float32, the evaluation's uniform points of the balls around some images."""
    images = unit_images(batch.images)
    generator = start_generator(seed, int(batch.indices[0]), images.device)
    return images + random_point(images, threat, generator)


def probe(
    network: nn.Module,
    images_u8: Tensor,
    labels: Tensor,
    start: Tensor,
    threat: AnyThreatModel,
) -> Tensor:
    """PGD-10 and gradient alignment on some images.

    The point beside an image is the attack's start before it is clipped to the pixel range, as in
    GradAlign's code. An image without a gradient counts as aligned.

    Args:
        network: Network of [0, 1] images, in eval mode.
        images_u8: (n, H, W, 3) uint8, n at least 1. labels: (n,) int64.
        start: (n, 3, H, W) float32, the attack's.
        threat: The evaluation's ball and step.

    Returns:
        (3,) float64: images, images that stand, sum of the cosines.
    """
    images = unit_images(images_u8)
    logits, gradient = logits_and_gradient(network, images, labels)
    _, gradient_beside = logits_and_gradient(network, start, labels)
    points = ascend(network, images, labels, start=start, attack=CHECK_ATTACK, threat=threat)
    with torch.no_grad():
        is_standing = is_correct(logits, labels) & is_correct(network(points), labels)
    cosines = 1 - misalignment(gradient, gradient_beside)
    num_images = torch.full_like(cosines, 1).sum()
    return torch.stack([num_images, is_standing.sum(), cosines.sum()]).to(torch.float64)


def logits_and_gradient(network: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(n, classes) logits at `x`, and a gradient there with the direction of the loss's."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = network(x)
        (gradient,) = torch.autograd.grad(cross_entropy(logits, labels), x)
    return logits.detach(), gradient.nan_to_num_(0, 0, 0)
