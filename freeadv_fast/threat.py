"""Threat model: how far and how fast an adversarial perturbation may move.

Users write perturbations as ``4/255``; inside they are counted in levels of 1/255, one grey level
of an 8-bit image, and kept as exact fractions so that "eps is a whole number of steps" is a fact
and not a rounding question.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import torch

from freeadv_fast.errors import UserError

INT8_MAX = 127


@dataclasses.dataclass(frozen=True, order=True)
class Perturbation:
    """A distance in pixel space.

    Attributes:
        levels: The distance in grey levels, that is in units of 1/255 of the pixel range.
    """

    levels: Fraction

    @classmethod
    def parse(cls, text: str | float | Perturbation, flag: str = "--eps") -> Perturbation:
        """Reads ``4/255`` or a bare fraction of the pixel range such as ``0.0157``.

        Args:
            text: What the user wrote.
            flag: The flag to name when the text is refused.

        Raises:
            UserError: not a number, negative, or a bare number above 1 (``4`` where ``4/255`` is
                meant, the commonest mistake of this field).
        """
        if isinstance(text, Perturbation):
            return text
        try:
            numerator, _, denominator = str(text).partition("/")
            value = Fraction(numerator) / Fraction(denominator or "1")
        except (ValueError, ZeroDivisionError):
            raise UserError(f"{flag} {text}: not a perturbation; write it as 4/255") from None
        if value < 0:
            raise UserError(f"{flag} {text}: a perturbation cannot be negative; write it as 4/255")
        if value > 1:
            hint = "" if "/" in str(text) else f"; did you mean {text}/255?"
            raise UserError(f"{flag} {text}: larger than the whole pixel range{hint}")
        return cls(value * 255)

    def __str__(self) -> str:
        """The form users write: ``4/255``, or ``2.5/255``."""
        if self.levels.denominator == 1:
            return f"{self.levels.numerator}/255"
        return f"{float(self.levels)!r}/255"

    def __float__(self) -> float:
        """The distance as a fraction of the pixel range, for attacks on images in [0, 1]."""
        return float(self.levels / 255)


@dataclasses.dataclass(frozen=True)
class ThreatModel:
    """An L-infinity ball of radius `eps`, walked in sign steps of size `step`."""

    eps: Perturbation
    step: Perturbation

    @property
    def is_integral(self) -> bool:
        """Whether a perturbation that starts at zero is always k * step with \\|k\\| <= 127.

        True when eps is a whole number of steps: sign steps and the clip at +-eps then never
        leave the grid, and int8 holds k exactly.
        """
        if self.step.levels == 0:
            return False
        ratio = self.eps.levels / self.step.levels
        return ratio.denominator == 1 and 1 <= ratio <= INT8_MAX

    @property
    def delta_dtype(self) -> torch.dtype:
        """int8 (counting steps) where that is exact, else float32 (counting grey levels)."""
        return torch.int8 if self.is_integral else torch.float32

    @property
    def delta_unit(self) -> float:
        """Grey levels that one unit of the stored perturbation stands for."""
        return float(self.step.levels) if self.is_integral else 1.0

    @property
    def is_whole(self) -> bool:
        """Whether images moved from a zero start keep whole grey levels, so that uint8 is exact."""
        return self.eps.levels.denominator == 1 and self.step.levels.denominator == 1

    def uniform_delta(self, images: torch.Tensor) -> torch.Tensor:
        """A uniform point of the ball around each image, clipped to the pixel range.

        Args:
            images: (n, H, W, C) uint8.

        Returns:
            (n, H, W, C) float32 in grey levels, drawn from torch's global generator.
        """
        radius = float(self.eps.levels)
        noise = torch.empty(images.shape, device=images.device).uniform_(-radius, radius)
        return noise.add_(images).clamp_(0, 255).sub_(images)

    def zero_delta(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """The zero perturbation, (N, H, W, C) in `delta_dtype`.

        Args:
            shape: (N, H, W, C): minibatch size, height, width, channels.
            device: Where training runs.
        """
        return torch.zeros(shape, dtype=self.delta_dtype, device=device)
