"""The roll of a split: which images it holds, by name, whatever folder they lie in.

Ranks call it at the start of a run, so that all of them train on the same images, and a checkpoint
keeps it, so that a resumed run can say which images left and which came.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import zlib
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from freeadv_fast.data.index import shortened
from freeadv_fast.data.stream import Ints

Stamps = NDArray[np.uint32]

# Level 1: ImageNet's 1.28 million names and sizes are 8.3 MB after 0.7 s. Level 6 saves 9 % of that
# and takes four times as long.
COMPRESSION = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Roll:
    """The images of a split.

    Attributes:
        classes: Class names; a label is an index into them.
        names: (N) what the images are called.
        stamps: (N,) uint32 that tell a changed image from the one before.
        stamp: What they are: the size of a file, or a checksum of pixels and label.
        bad: Files left out, by what they are called, and why.
    """

    classes: list[str]
    names: list[str]
    stamps: Stamps
    stamp: Literal["bytes", "checksum"]
    bad: dict[str, str]

    @property
    def digest(self) -> str:
        """Equal for two rolls of the same images under the same labels."""
        hashed = hashlib.sha256()
        for part in (_joined(self.classes), _joined(self.names), self.stamps.tobytes()):
            hashed.update(hashlib.sha256(part).digest())
        return hashed.hexdigest()

    def of(self, rows: Ints) -> Roll:
        """The roll of some of its rows."""
        names = [self.names[row] for row in rows]
        return dataclasses.replace(self, names=names, stamps=self.stamps[rows])

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint."""
        return {
            "classes": self.classes,
            "names": _packed(_joined(self.names)),
            "stamps": _packed(self.stamps.tobytes()),
            "stamp": self.stamp,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Roll:
        """A roll from its `state_dict`."""
        names = os.fsdecode(_unpacked(state["names"])).split("\0")
        stamps = np.frombuffer(_unpacked(state["stamps"]), np.uint32)
        return cls(state["classes"], names, stamps, state["stamp"], bad={})


@dataclasses.dataclass(frozen=True)
class Changes:
    """What makes one roll of another; all empty where they are the same.

    Attributes:
        left: Names that the second lacks. came: Names that the first lacks.
        altered: Names of both whose stamps differ.
    """

    left: list[str]
    came: list[str]
    altered: list[str]

    @classmethod
    def between(cls, before: Roll, now: Roll) -> Changes:
        """What became of `before`."""
        if before.names == now.names and np.array_equal(before.stamps, now.stamps):
            return cls([], [], [])
        old, new = (dict(zip(r.names, r.stamps.tolist(), strict=True)) for r in (before, now))
        return cls(
            left=[name for name in old if name not in new],
            came=[name for name in new if name not in old],
            altered=[name for name, stamp in old.items() if new.get(name, stamp) != stamp],
        )

    def __bool__(self) -> bool:
        """Whether anything changed."""
        return bool(self.left or self.came or self.altered)

    def __str__(self) -> str:
        """How many left, came and changed, and the first of each."""
        kinds = {"left": self.left, "came": self.came, "changed": self.altered}
        return ", ".join(
            f"{len(names):,} {verb} ({shortened(names)})" for verb, names in kinds.items() if names
        )


def _joined(names: list[str]) -> bytes:
    """Names as bytes, which need not be UTF-8, with a byte between them that no name holds."""
    return os.fsencode("\0".join(names))


def _packed(content: bytes) -> torch.Tensor:
    """Bytes as a compressed uint8 tensor."""
    compressed = bytearray(zlib.compress(content, COMPRESSION))
    return torch.frombuffer(compressed, dtype=torch.uint8)


def _unpacked(tensor: torch.Tensor) -> bytes:
    """The bytes of `_packed`."""
    return zlib.decompress(tensor.numpy().tobytes())
