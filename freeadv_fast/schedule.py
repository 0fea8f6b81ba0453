"""Learning-rate schedules: a pure function of the update's index."""

from __future__ import annotations

import dataclasses
import math

from freeadv_fast.errors import UserError


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the learning rate moves over a run.

    Attributes:
        kind: ``every`` (drop by 10 each so many epochs of the natural budget), ``at`` (drop by 10
            at these epochs of the natural budget), ``steps`` (drop by 10 at these updates),
            ``linear`` (rise to a peak, fall to zero) or ``constant``.
        values: Epochs between drops; epochs; update indices; or the peak's place in (0, 1).
    """

    kind: str
    values: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str | Schedule) -> Schedule:
        """Reads ``every:30``, ``at:30,60,90``, ``steps:40000,60000``, ``linear:0.4``, ``constant``.

        Raises:
            UserError: any other form.
        """
        if isinstance(text, Schedule):
            return text
        kind, _, rest = text.partition(":")
        try:
            values = tuple(float(value) for value in rest.split(",")) if rest else ()
        except ValueError:
            values = (math.nan,)
        is_valid = {
            "every": len(values) == 1 and values[0] > 0,
            "at": len(values) >= 1 and all(v > 0 for v in values),
            "steps": len(values) >= 1 and all(v > 0 for v in values),
            "linear": len(values) == 1 and 0 < values[0] < 1,
            "constant": not rest,
        }
        if not is_valid.get(kind, False):
            raise UserError(
                f"--schedule {text}: write every:30, at:30,60,90, steps:40000,60000, linear:0.4 "
                "or constant"
            )
        return cls(kind, values)

    def __str__(self) -> str:
        """The form users write."""
        values = ",".join(f"{value:.12g}" for value in self.values)
        return f"{self.kind}:{values}" if values else self.kind

    def factor(
        self, update: int, *, total_updates: int, updates_per_epoch: int, cost: float
    ) -> float:
        """The factor on the peak learning rate for one optimizer update.

        Args:
            update: Index of the update, from 0.
            total_updates: Updates of the whole run.
            updates_per_epoch: Updates of one pass over the data, all m replays counted.
            cost: Epochs of the natural budget that one pass over the data takes, such as m.

        Source: ``every`` follows the reference code of Free AT, lib/utils.py line 31: the period
        is ceil(epochs / m) data epochs, so that m = 4 drops at 8 and 16 of 23. ``at`` follows Fast
        AdvProp's: 30, 60, 90, 100 at cost 1.2 are data epochs 25, 50, 75, 83.
        """
        data_epoch = update // updates_per_epoch  # and 1e-9 below: 30 / 1.2 is 25, to the last bit
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
        return 1.0
