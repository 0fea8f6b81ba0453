"""Phases of a run: small images in large minibatches first, large images in small ones last."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from freeadv_fast.errors import UserError

EXAMPLE = "0-6:128:512,6-12:224:224,12-15:288:128"

_PHASE = re.compile(r"([\d.]+)-([\d.]+):(\d+):(\d+)")


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a run with its own image and batch size.

    Attributes:
        start: Epoch of the natural budget at which it begins. end: At which the next one begins.
        image_size: Side of the square images that the network sees, in pixels.
        batch_size: Images per minibatch on each rank; in a recipe, over all ranks.
    """

    start: float
    end: float
    image_size: int
    batch_size: int

    def __str__(self) -> str:
        """The form users write."""
        return f"{self.start:.12g}-{self.end:.12g}:{self.image_size}:{self.batch_size}"


@dataclasses.dataclass(frozen=True)
class Phases:
    """The phases of a run in their order; none for a run of one image and batch size.

    Raises:
        UserError: phases leave a gap, overlap, are empty or do not begin at epoch 0.

    Source: Wong, Rice and Kolter 2020, "Fast is better than free": ImageNet in three phases of
    128, 224 and 288 px, after the DAWNBench entries that resized images progressively.
    """

    phases: tuple[Phase, ...] = ()

    def __post_init__(self) -> None:
        """Checks that each phase begins where the one before it ends, and is of some size."""
        end = 0.0
        for phase in self.phases:
            if phase.start != end:
                before = f"epoch {end:g}, where the one before it ends" if end else "epoch 0"
                raise UserError(f"--phases {self}: {phase} must begin at {before}")
            if phase.end <= phase.start:
                raise UserError(f"--phases {self}: {phase} ends before it begins")
            if phase.image_size < 8:
                raise UserError(f"--phases {self}: images of {phase} must have at least 8 pixels")
            if phase.batch_size < 2:
                raise UserError(f"--phases {self}: batch norm needs at least 2 images in {phase}")
            end = phase.end

    @classmethod
    def parse(cls, text: str | Phases) -> Phases:
        """Reads ``0-6:128:512,6-12:224:224`` (epochs : image side : batch) or ``none``.

        Raises:
            UserError: any other form, or phases that do not follow each other.
        """
        if isinstance(text, Phases):
            return text
        if text == "none":
            return cls()
        phases = []
        for part in text.split(","):
            match = _PHASE.fullmatch(part)
            try:
                start, end, image_size, batch_size = match.groups() if match else ()
                phases.append(Phase(float(start), float(end), int(image_size), int(batch_size)))
            except ValueError:  # not four numbers, or a number such as 1.2.3
                raise UserError(
                    f"--phases {text}: write epochs:side:batch of each phase, such as {EXAMPLE}, "
                    "or none"
                ) from None
        return cls(tuple(phases))

    def __str__(self) -> str:
        """The form users write."""
        return ",".join(map(str, self.phases)) or "none"

    def __len__(self) -> int:
        """Number of phases; a run without any is falsy."""
        return len(self.phases)

    def __iter__(self) -> Iterator[Phase]:
        """Yields the phases in their order."""
        return iter(self.phases)

    def __getitem__(self, index: int) -> Phase:
        """One of them."""
        return self.phases[index]

    def divided(self, num_ranks: int) -> Phases:
        """The same phases with their batches divided among ranks, 2 images a rank at least."""
        return Phases(
            tuple(
                dataclasses.replace(phase, batch_size=max(2, phase.batch_size // num_ranks))
                for phase in self.phases
            )
        )
