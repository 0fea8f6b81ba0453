"""What the AutoAttack package says of a network, and what came of each batch: a file to show."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path


class PackageLog:
    """A logger as the package wants one: `logging`'s names, or `log` in the repository's version.

    Args:
        path: File to append to; None keeps nothing.
        say: Is told each kind of warning once.
    """

    def __init__(self, path: Path | None, say: Callable[[str], None]) -> None:
        """Writes nothing yet."""
        self.path = path
        self.say = say
        self.said: set[str] = set()

    def log(self, text: str) -> None:
        """Keeps a line; the repository's version marks its warnings by a word."""
        if text.startswith("Warning: "):
            self.warning(text.removeprefix("Warning: "))
        else:
            self._write(text)

    debug = info = log

    def warning(self, text: str) -> None:
        """Keeps a warning, and says it unless one like it was said."""
        self._write(f"WARNING {text}")
        kind = re.sub(r"[\d.%]+", "N", text)
        if kind not in self.said:
            self.said.add(kind)
            # The package's own page, which is in its repository and nowhere here.
            self.say(f"AutoAttack warns: {text.replace(' See flags_doc.md for details.', '')}")

    def _write(self, text: str) -> None:
        """Appends a line with the time of day; the file is whole after each, whatever happens."""
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        except OSError as error:  # a full disk ends no evaluation
            self.say(f"AutoAttack's log ends: {self.path}: {error.strerror or error}")
            self.path = None
