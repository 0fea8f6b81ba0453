"""A run in progress: how far it is, how long it took, what the training loop moves forward."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from torch import nn

from freeadv_fast.config.attack import Attack
from freeadv_fast.config.budget import Budget
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.threat import AnyThreatModel
from freeadv_fast.data.build import Loaders
from freeadv_fast.distributed.world import World
from freeadv_fast.methods.build import TrainingMethod
from freeadv_fast.runs.checkpoint import Saver
from freeadv_fast.runs.lock import FolderLock
from freeadv_fast.runs.log import RunFolder, RunLog
from freeadv_fast.session.decoding import Decoding
from freeadv_fast.session.guard import Guard
from freeadv_fast.step.learner import Learner


@dataclasses.dataclass
class Progress:
    """How far a run is; saved with every checkpoint.

    Attributes:
        epoch: Data epochs finished. minibatch: Minibatches of the current one finished.
        passes: Images forwarded and backwarded for the weights, over all ranks.
        attack_passes: Images forwarded and backwarded for a perturbation alone.
        train_seconds: Seconds in the training loop, checkpoints included, evaluation excluded.
        warm_up_seconds: Those of them before a session's rate was steady, over all sessions.
        best_score: Held-out accuracy of best.pt. best_epoch: The epoch it is from.
        last_line: The latest training metrics.
    """

    epoch: int = 0
    minibatch: int = 0
    passes: int = 0
    attack_passes: int = 0
    train_seconds: float = 0.0
    warm_up_seconds: float = 0.0
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
        self._cold_since: float | None = seconds

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

    def cold_seconds(self, is_over: bool) -> float:
        """Seconds since the last call, until one says that the warm-up is over; then none."""
        if self._cold_since is None:
            return 0.0
        seconds, before = self.seconds, self._cold_since
        self._cold_since = None if is_over else seconds
        return seconds - before


@dataclasses.dataclass
class Run:
    """A run in progress: what the training loop reads and moves forward.

    Attributes:
        config: As the present ranks need it. recorded: As it is saved, with the minibatches of the
            ranks that the run was `made_for`.
        model: The network in training. own_model: The caller's module, of which it is a copy; None
            where the config names the network.
        lock: Of the folder; held by rank 0.
        saved_at: When the last checkpoint was made, in seconds of `time.monotonic`.
        saver: Of rank 0, writes them.
    """

    config: TrainConfig
    world: World
    folder: RunFolder
    phase_loaders: tuple[Loaders, ...]
    budget: Budget
    model: nn.Module
    learner: Learner
    method: TrainingMethod
    guard: Guard
    decoding: Decoding
    progress: Progress
    clock: Clock
    log: RunLog
    lock: FolderLock
    recorded: TrainConfig
    made_for: int
    saved_at: float
    own_model: nn.Module | None = None
    saver: Saver = dataclasses.field(default_factory=Saver)

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


def say(world: World, text: str) -> None:
    """Prints a line, once for all ranks."""
    if world.is_main:
        print(text, flush=True)
