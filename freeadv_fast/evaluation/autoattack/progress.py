"""How long the attacks will still take: a bar on a terminal, elsewhere a line every minute."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from freeadv_fast.runs.log import SECONDS_BETWEEN_LINES, SECONDS_OF_RATE, duration


class Progress:
    """Forward passes of images on one rank: those made, and those still to make at most.

    At most, because an image that falls takes no further part; so the time left only shrinks.

    Args:
        label: Text before the bar.
        num_images: Images to attack, over all ranks.
        is_shown: Whether anything is shown at all: on rank 0.
    """

    def __init__(self, label: str, num_images: int, is_shown: bool) -> None:
        """Draws nothing yet."""
        self.num_images = num_images
        self.is_shown = is_shown
        self.made = self.left = 0
        self.rest = 0.0
        self.began = self.said_at = time.monotonic()
        self.is_estimated = False
        self.doing = ""
        has_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            desc=label, leave=False, unit=" passes", unit_scale=True, dynamic_ncols=True,
            disable=not (is_shown and has_terminal),
        )  # fmt: skip

    def expect(self, doing: str, left: float) -> None:
        """Says what is done now.

        Args:
            doing: Such as ``fab-t, 240 of 500 images stand``.
            left: Forward passes to make from here on, at most.
        """
        self.doing, self.left = doing, max(0, round(left))
        self.bar.total = self.made + self.left
        self.bar.set_postfix_str(doing, refresh=False)

    def count(self, passes: int) -> None:
        """Adds passes that were made."""
        self.made += passes
        self.left = max(0, self.left - passes)
        self.bar.update(passes)
        now = time.monotonic()
        if self.is_estimated and self.bar.disable and now - self.said_at >= SECONDS_BETWEEN_LINES:
            self.say(f"{self.doing}, {self.time_left}")

    def batch_is_done(self) -> None:
        """Says how long it takes, once the first batch shows it; not where that is soon."""
        if not self.is_estimated:
            self.is_estimated = True
            if self.seconds_left >= SECONDS_OF_RATE:
                self.say(f"attacking {self.num_images:,} images: {self.time_left}")

    @property
    def seconds_left(self) -> float:
        """Seconds from here on, at most, at the rate until now."""
        return self.left * (time.monotonic() - self.began) / max(self.made, 1)

    @property
    def time_left(self) -> str:
        """The same as text."""
        return f"at most {duration(self.seconds_left)} left"

    def say(self, text: str) -> None:
        """Prints a line without tearing the bar."""
        if self.is_shown:
            self.said_at = time.monotonic()
            tqdm.write(f"AutoAttack: {text}", file=sys.stdout)
            sys.stdout.flush()
