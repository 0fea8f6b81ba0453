"""What a run will cost, counted before it starts as its method counts while it trains."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

from freeadv_fast.config.budget import Budget
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.build import Loaders
from freeadv_fast.methods.passes import Passes


@dataclasses.dataclass(frozen=True)
class Cost:
    """What some minibatches cost, those of a phase or the first of them.

    Attributes:
        config: The phase as a run of its own.
        num_images: Training images of a data epoch. num_batches: Its minibatches.
        global_batch: Images of a whole minibatch, over all ranks.
        first_update: Index of the phase's first update.
        minibatches: Minibatches that are trained on.
    """

    config: TrainConfig
    num_images: int
    num_batches: int
    global_batch: int
    first_update: int
    minibatches: int

    @property
    def updates(self) -> int:
        """Optimizer updates; a minibatch is replayed to its end."""
        return self.minibatches * self.config.m

    @property
    def passes(self) -> Passes:
        """Image passes for the weights and for attacks alone, over all ranks."""
        config, images = self.config, self._images
        attacked = Fraction(config.num_adversarial, config.batch_size) * images
        match config.method:
            case "fast-advprop":
                return Passes(int(images + config.attack_steps * attacked))
            case "dat" if config.dat_attack == "fgsm":
                attack = images
            case "pgd" | "trades" | "advprop" | "dat":
                attack = int(config.attack_steps * attacked)
                if config.awp:  # the loss once more, at the weights
                    attack += int(config.weight_passes) * images
            case "fgsm" | "fgsm-rs" | "n-fgsm" | "elle":
                attack = images
            case "gradalign":
                attack = images + self._aligned_images
            case _:
                attack = 0
        return Passes(int(config.weight_passes) * images, attack)

    def first(self, minibatches: int) -> Cost:
        """What the first of these minibatches cost."""
        return dataclasses.replace(self, minibatches=minibatches)

    @property
    def _last_batch(self) -> int:
        """Images of a data epoch's last minibatch, which may be short."""
        before = (self.num_batches - 1) * self.global_batch
        return min(self.num_images - before, self.global_batch)

    @property
    def _images(self) -> int:
        """Images of all these minibatches."""
        num_last = self.minibatches // self.num_batches
        return (self.minibatches - num_last) * self.global_batch + num_last * self._last_batch

    @property
    def _aligned_images(self) -> int:
        """Images of the updates that have GradAlign's term: every so many, over all phases."""
        every = self.config.reg_every
        aligned = range(-self.first_update % every, self.updates, every)
        num_last = sum((update + 1) % self.num_batches == 0 for update in aligned)
        return (len(aligned) - num_last) * self.global_batch + num_last * self._last_batch


def costs_of(
    config: TrainConfig, budget: Budget, phase_loaders: Sequence[Loaders], num_ranks: int
) -> list[Cost]:
    """What each phase of a run costs if nothing ends it early."""
    return [
        Cost(
            config=phase,
            num_images=loaders.train.num_images,
            num_batches=loaders.train.num_batches,
            global_batch=phase.update_size * num_ranks,
            first_update=span.updates.start,
            minibatches=math.ceil(len(span.updates) / config.m),
        )
        for phase, loaders, span in zip(
            config.phase_configs, phase_loaders, budget.spans, strict=True
        )
    ]


def until(max_passes: int | None, costs: Sequence[Cost]) -> list[Cost]:
    """What a run costs that ends at the first minibatch boundary after so many passes."""
    left = math.inf if max_passes is None else max_passes
    done: list[Cost] = []
    for cost in costs:
        if cost.passes.weights >= left:
            numbers = range(cost.minibatches)
            enough = bisect.bisect_left(numbers, left, key=lambda n: cost.first(n).passes.weights)
            return [*done, cost.first(enough)]
        left -= cost.passes.weights
        done.append(cost)
    return done
