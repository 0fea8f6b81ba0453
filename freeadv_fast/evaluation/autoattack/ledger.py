"""What the attacks have found so far, on disk: a killed evaluation goes on at its last batch.

A line of JSON a batch and part, appended and synced. An image goes by its row, the checksum of its
pixels and its label, so that it is recognised whatever else is attacked with it, on however many
ranks. What else decides its fate is in the file name: a digest of weights, ball, seed, package.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from freeadv_fast.config.threat import AnyThreatModel
from freeadv_fast.models.digest import digest_weights

DIGEST_LENGTH = 12


def digest_of(network: nn.Module, threat: AnyThreatModel, seed: int, package: str) -> str:
    """Stands for all but the images and the attack that the fate of an image hangs on.

    Of a network it knows what it prints and its weights, not the code of its forward pass.

    Args:
        network: With its normaliser.
        threat: The ball.
        seed: Of the attacks.
        package: Name and version.
    """
    said = repr(network), type(threat).__name__, str(threat.eps), str(seed), package
    hashed = hashlib.blake2b("\0".join(said).encode())
    hashed.update(digest_weights(network))
    return hashed.hexdigest()[:DIGEST_LENGTH]


def keys_of(images: Tensor, labels: Tensor, indices: Tensor) -> list[str]:
    """What each image goes by.

    Args:
        images: (n, H, W, 3) uint8. labels: (n,) int64. indices: (n,) int64 rows in the split.
    """
    sums = [zlib.crc32(image) for image in images.cpu().contiguous().numpy()]
    names = zip(indices.tolist(), sums, labels.tolist(), strict=True)
    return [f"{row}-{checksum:08x}-{label}" for row, checksum, label in names]


class Ledger:
    """The file of one rank, and what all ranks' files of earlier starts hold.

    Args:
        folder: Where the files are; None keeps nothing.
        digest: Of `digest_of`. rank: This process among the others.
        say: Is told where nothing can be kept, once.
    """

    def __init__(
        self, folder: Path | None, digest: str, rank: int, say: Callable[[str], None]
    ) -> None:
        """Reads what is there; a line that a kill cut short is left out."""
        self.say = say
        self.folder, self.digest = folder, digest
        self.path = folder and folder / f"autoattack-{digest}-rank{rank}.jsonl"
        self.found: dict[tuple[str, str], dict[str, bool]] = {}
        for path in self.paths:
            for line in path.read_text(encoding="utf-8").split("\n"):
                self._take(line)

    @property
    def paths(self) -> list[Path]:
        """The files of all ranks, as far as they are there."""
        return sorted(self.pattern.parent.glob(self.pattern.name)) if self.pattern else []

    @property
    def pattern(self) -> Path | None:
        """What the names of these files have in common; None where nothing is kept."""
        return self.folder and self.folder / f"autoattack-{self.digest}-*.jsonl"

    def _take(self, line: str) -> None:
        """Adds a line's images to what was found."""
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            return
        known = self.found.setdefault((record["attack"], record["part"]), {})
        known |= dict.fromkeys(record["stand"], True) | dict.fromkeys(record["fell"], False)

    def add(self, attack: str, part: str, keys: Sequence[str], stands: Sequence[bool]) -> None:
        """Appends what came of a batch; when this returns it is on disk.

        Args:
            attack: Its name. part: Which of its parts.
            keys: Of the images. stands: Whether each of them was not fooled.
        """
        if self.path is None:
            return
        sides = {
            name: [key for key, stood in zip(keys, stands, strict=True) if stood == wanted]
            for name, wanted in (("stand", True), ("fell", False))
        }
        line = json.dumps({"attack": attack, "part": part} | sides)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                # The line break comes first: a line cut short by a kill spoils no other.
                file.write(f"\n{line}\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self.say(f"AutoAttack cannot be resumed: {self.path}: {error.strerror or error}")
            self.path = None


def forget(paths: Sequence[Path]) -> None:
    """Removes ledgers; an evaluation that is written needs them no longer."""
    for path in paths:
        path.unlink(missing_ok=True)
