"""Threat model: how far and how fast an adversarial perturbation may move.

Users write perturbations as ``4/255``; inside they are counted in levels of 1/255, one grey level
of an 8-bit image, and kept as exact fractions so that "eps is a whole number of steps" is a fact
and not a rounding question.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import TypeAlias

import torch

from freeadv_fast.config.choices import Norm
from freeadv_fast.errors import UserError

INT8_MAX = 127


@dataclasses.dataclass(frozen=True, order=True)
class Perturbation:
    """A distance in pixel space.

    Attributes:
        levels: The distance in grey levels, that is in units of 1/255 of the pixel range.
        chosen_for: Of a step that a recipe chose: radius in grey levels and norm of its ball.
            In another ball `in_ball` makes it another step. None of one that the user wrote.
    """

    levels: Fraction
    chosen_for: tuple[Fraction, Norm] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )

    @classmethod
    def parse(cls, text: str | float | Perturbation, flag: str = "--eps") -> Perturbation:
        """Reads ``4/255`` or a bare fraction of the pixel range such as ``0.0157``.

        Args:
            text: What the user wrote.
            flag: The flag to name when the text is refused.

        Raises:
            UserError: not a number, negative, or a bare number from 1 on (``4`` where ``4/255`` is
                meant, the commonest mistake of this field; ``765/255`` is an L2 radius of 3).
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
        if value >= 1 and "/" not in str(text):
            size = "larger than the whole pixel range" if value > 1 else "the whole pixel range"
            raise UserError(
                f"{flag} {text}: {size}; did you mean {text}/255? "
                f"(an L2 radius is written {float(value * 255):g}/255)"
            )
        return cls(unrounded(value * 255))

    def __str__(self) -> str:
        """The form users write: ``4/255``, or ``2.5/255``."""
        if self.levels.denominator == 1:
            return f"{self.levels.numerator}/255"
        return f"{float(self.levels)!r}/255"

    def scaled(self, share: float) -> Perturbation:
        """A share of the distance; 1 is the same one, exactly."""
        return self if share == 1 else Perturbation(self.levels * Fraction(share))

    def chosen_in(self, eps: Perturbation, norm: Norm) -> Perturbation:
        """The same distance, as the step that was chosen for a ball."""
        return dataclasses.replace(self, chosen_for=(eps.levels, norm))

    def in_ball(self, eps: Perturbation, norm: Norm) -> Perturbation | None:
        """This step where the ball is the one given: in proportion to its radius.

        None where nothing can be said: a step of one norm means nothing in another. A step that
        the user wrote stays what it is, and so does any at radius 0.
        """
        if self.chosen_for in (None, (eps.levels, norm)) or not eps.levels:
            return self
        radius, chosen_norm = self.chosen_for  # type: ignore[misc]  # None is ruled out above
        if norm != chosen_norm:
            return None
        if not radius:
            return self
        return Perturbation(self.levels * eps.levels / radius).chosen_in(eps, norm)

    def __float__(self) -> float:
        """The distance as a fraction of the pixel range, for attacks on images in [0, 1]."""
        return float(self.levels / 255)


def unrounded(levels: Fraction) -> Fraction:
    """The short fraction that a float was computed from: Python's 8/255 is 7.9999999999999995/255.

    Only within the rounding of a double; 0.0157, which somebody wrote so, stays 4.0035/255.
    """
    short = levels.limit_denominator(1000)
    return short if abs(short - levels) <= levels * Fraction(1, 2**51) else levels


@dataclasses.dataclass(frozen=True)
class ThreatModel:
    """An L-infinity ball of radius `eps`, walked in sign steps of size `step`."""

    eps: Perturbation
    step: Perturbation

    def scaled(self, share: float) -> ThreatModel:
        """The same ball and step at a share of their size."""
        return ThreatModel(self.eps.scaled(share), self.step.scaled(share))

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


@dataclasses.dataclass(frozen=True)
class L2ThreatModel:
    """An L2 ball of radius `eps` around a whole image, walked in normalised steps of length `step`.

    Lengths are those of the vector of all of an image's values: 128/255 is the usual radius on
    CIFAR and 3, or 765/255, on ImageNet.
    """

    eps: Perturbation
    step: Perturbation

    def scaled(self, share: float) -> L2ThreatModel:
        """The same ball and step at a share of their size."""
        return L2ThreatModel(self.eps.scaled(share), self.step.scaled(share))

    def uniform_delta(self, images: torch.Tensor) -> torch.Tensor:
        """A uniform point of the ball around each image, clipped to the pixel range.

        A uniformly random direction at the distance eps * u^(1/d), u uniform in 0..1; the clip
        moves points inwards only.

        Args:
            images: (n, H, W, C) uint8.

        Returns:
            (n, H, W, C) float32 in grey levels, drawn from torch's global generator.
        """
        direction = torch.randn(images.shape, device=images.device)
        share = torch.rand(len(images), 1, 1, 1, device=images.device)
        distance = float(self.eps.levels) * share.pow(1 / images[0].numel())
        delta = direction.mul_(distance / row_norms(direction))
        clip_to_pixels_(delta, images)
        return delta

    def ascend_(self, delta: torch.Tensor, gradient: torch.Tensor, nonfinite: torch.Tensor) -> None:
        """One step along each image's gradient, and back into the ball, in place.

        Computes ``delta <- project(delta + step * g / |g|)``. An image whose gradient is zero stays
        where it is. A component that is NaN or infinite counts as zero.

        Args:
            delta: (n, H, W, C) float32 in grey levels; updated. Images moved by it are within the
                pixel range, where every pixel's gradient is its own.
            gradient: (n, C, H, W) gradient with respect to the pixels, float32 or float64; only its
                direction matters.
            nonfinite: One int64 on the device; the number of such components is added to it.
        """
        g = gradient.permute(0, 2, 3, 1)
        is_finite = g.isfinite()
        nonfinite.add_((~is_finite).sum())
        g = g.masked_fill(~is_finite, 0)
        # Squares of gradients below 1e-19 underflow: the largest component becomes 1 beforehand.
        peak = g.abs().amax((1, 2, 3), keepdim=True)
        g = g / peak.masked_fill(peak == 0, 1)
        delta.addcdiv_(g, row_norms(g).clamp_min(1), value=float(self.step.levels))
        delta.view(len(delta), -1).renorm_(2, 0, float(self.eps.levels))


AnyThreatModel: TypeAlias = ThreatModel | L2ThreatModel


def row_norms(images: torch.Tensor) -> torch.Tensor:
    """(n, 1, 1, 1) L2 norms of (n, H, W, C) images, each taken as one vector."""
    norms: torch.Tensor = torch.linalg.vector_norm(images, dim=(1, 2, 3), keepdim=True)
    return norms


def clip_to_pixels_(delta: torch.Tensor, images: torch.Tensor) -> None:
    """Moves a perturbation so that 0 <= images + delta <= 255, in place and without rounding.

    Args:
        delta: (n, H, W, C) float32 in grey levels; updated, never away from zero.
        images: (n, H, W, C) uint8.
    """
    lowest = images.to(delta.dtype).neg_()
    torch.clamp(delta, lowest, lowest + 255, out=delta)
