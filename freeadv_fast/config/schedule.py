"""Learning-rate schedules: a pure function of an update's index and its place in the data."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable

import numpy as np

from freeadv_fast.errors import UserError

_KNOTS = re.compile(r"[^=,]+=[^=,]+(,[^=,]+=[^=,]+)*")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the learning rate moves over a run.

    Source: ``every`` follows the reference code of Free AT, lib/utils.py line 31: the period is
    ceil(epochs / m) data epochs, so that m = 4 drops at 8 and 16 of 23. ``at`` follows Fast
    AdvProp's: 30, 60, 90, 100 at cost 1.2 are data epochs 25, 50, 75, 83. ``piecewise`` follows
    Wong et al.'s code for ImageNet, main_fast.py: an update's rate is that of the place in the data
    where it ends. ``onecycle`` is torch's OneCycleLR, whose momentum stays, by default stepped
    after each update; the FastAT Benchmark's code (Pan and Yao 2026, main.py) steps it after each
    pass over the data.

    Attributes:
        kind: ``every`` (drop by 10 each so many epochs of the natural budget), ``at`` (drop by 10
            at these epochs of the natural budget), ``steps`` (drop by 10 at these updates),
            ``linear`` (rise to a peak, fall to zero), ``onecycle`` (rise and fall along cosines, by
            updates), ``onecycle-epochs`` (the same, by data epochs), ``piecewise`` (straight lines
            between given factors at given epochs of the natural budget) or ``constant``.
        values: Epochs between drops; epochs; update indices; the peak's place in (0, 1); or epochs
            and factors by turns.
    """

    kind: str
    values: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str | Schedule) -> Schedule:
        """Reads ``every:30``, ``at:30,60,90``, ``steps:40000,60000``, ``linear:0.4`` and the rest.

        The rest: ``onecycle:0.3``, ``onecycle-epochs:0.3``, ``piecewise:0=0,1=1,6=0.1``
        (epoch=factor, epochs rising from 0), ``constant``.

        Raises:
            UserError: any other form.
        """
        if isinstance(text, Schedule):
            return text
        kind, _, rest = text.partition(":")
        separators = "[,=]" if kind == "piecewise" else ","
        try:
            values = tuple(float(value) for value in re.split(separators, rest)) if rest else ()
        except ValueError:
            values = (math.nan,)
        knots, factors = values[::2], values[1::2]
        is_valid = {
            "every": len(values) == 1 and values[0] > 0,
            "at": len(values) >= 1 and all(v > 0 for v in values),
            "steps": len(values) >= 1 and all(v > 0 for v in values),
            **dict.fromkeys(
                ("linear", "onecycle", "onecycle-epochs"),
                len(values) == 1 and 0 < values[0] < 1,
            ),
            "piecewise": (
                _KNOTS.fullmatch(rest) is not None
                and knots[0] == 0
                and all(a < b < math.inf for a, b in itertools.pairwise(knots))
                and all(0 <= factor < math.inf for factor in factors)
            ),
            "constant": not rest,
        }
        if not is_valid.get(kind, False):
            raise UserError(
                f"--schedule {text}: write every:30, at:30,60,90, steps:40000,60000, linear:0.4, "
                "onecycle:0.3, onecycle-epochs:0.3, piecewise:0=0,1=1,6=0.1 or constant"
            )
        return cls(kind, values)

    def __str__(self) -> str:
        """The form users write."""
        words = [f"{value:.12g}" for value in self.values]
        if self.kind == "piecewise":
            words = [f"{a}={b}" for a, b in zip(words[::2], words[1::2], strict=True)]
        values = ",".join(words)
        return f"{self.kind}:{values}" if values else self.kind

    def factor(
        self,
        update: int,
        *,
        total_updates: int,
        data_epochs_before: Callable[[int], float],
        cost: float,
    ) -> float:
        """The factor on the peak learning rate for one optimizer update.

        Args:
            update: Index of the update, from 0.
            total_updates: Updates of the whole run.
            data_epochs_before: Passes over the data done before an update, fractions counted;
                within 1e-9 of a whole number for the first update of a data epoch.
            cost: Epochs of the natural budget that one pass over the data takes, such as m.
        """
        # 1e-9, here and below: 30 / 1.2 is 25, and 8 passes after a warm-up of 5 / 7 are 8, to the
        # last bit.
        data_epoch = int(data_epochs_before(update) + 1e-9)
        if self.kind == "every":
            return float(0.1 ** (data_epoch // math.ceil(self.values[0] / cost - 1e-9)))
        if self.kind == "at":
            return float(0.1 ** sum(data_epoch >= int(v / cost + 1e-9) for v in self.values))
        if self.kind == "steps":
            return float(0.1 ** sum(update >= value for value in self.values))
        if self.kind == "linear":
            peak = self.values[0] * total_updates
            rising = (update + 1) / peak  # the first update already moves the weights
            falling = (total_updates - update) / (total_updates - peak)
            return max(0.0, min(rising, falling))
        if self.kind == "onecycle":
            return one_cycle(update, total_updates, self.values[0])
        if self.kind == "onecycle-epochs":
            total_epochs = math.ceil(data_epochs_before(total_updates) - 1e-9)
            return one_cycle(data_epoch, total_epochs, self.values[0])
        if self.kind == "piecewise":
            epoch = cost * data_epochs_before(update + 1)
            return float(np.interp(epoch, self.values[::2], self.values[1::2]))
        return 1.0


def one_cycle(step: int, total_steps: int, share: float) -> float:
    """The factor on the peak rate of torch's OneCycleLR with its defaults, but for the share.

    From 1/25 along half a cosine to 1, and from there to 1/250,000 in the last step.

    Args:
        step: From 0. total_steps: Of the whole cycle.
        share: Of the steps, in (0, 1), that rise: torch's ``pct_start``, 0.3 by default.

    Source: Smith and Topin, "Super-Convergence", 2018; torch/optim/lr_scheduler.py.
    """
    first, last, peak = 1 / 25, 1 / 25 / 1e4, share * total_steps - 1
    if step < peak:
        start, end, way = first, 1.0, step / peak
    else:
        start, end, way = 1.0, last, (step - peak) / (total_steps - 1 - peak)
    return end + (start - end) / 2 * (math.cos(math.pi * way) + 1)
