"""An open file of a picture, and what is said where it cannot be trained on."""

from __future__ import annotations

import os
import struct

# Enough for the header of most files, so that these cost one read.
HEAD_BYTES = 4096
TAIL_BYTES = 1024


class BadImage(Exception):
    """A file that cannot be trained on; the message is the reason, a few words long."""


class PictureFile:
    """An open file, read at any place.

    Attributes:
        num_bytes: Size of the file.
        head: Its first bytes.
    """

    def __init__(self, handle: int, kind: str = "") -> None:
        """Reads the head.

        Args:
            handle: The open file.
            kind: What it is called where it ends too early, such as ``JPEG``.
        """
        self.handle = handle
        self.kind = kind
        self.num_bytes = os.fstat(handle).st_size
        self.head = os.pread(handle, HEAD_BYTES, 0)

    def read(self, start: int, count: int) -> bytes:
        """The bytes from `start` on: `count`, or fewer at the file's end."""
        if start + count <= len(self.head):
            return self.head[start : start + count]
        return os.pread(self.handle, count, start)

    def unpack(self, layout: str, start: int) -> tuple[int, ...]:
        """The numbers at `start`, laid out as `struct` says.

        Raises:
            BadImage: the file ends before them.
        """
        content = self.read(start, struct.calcsize(layout))
        if len(content) < struct.calcsize(layout):
            raise BadImage(f"truncated {self.kind}: the file ends inside its header")
        return struct.unpack(layout, content)

    def refuse_end_before(self, end: int) -> None:
        """Raises BadImage where the file does not reach `end`."""
        if self.num_bytes < end:
            raise BadImage(f"truncated {self.kind}: {self.num_bytes:,} of its {end:,} bytes")

    def holds_after(self, start: int, mark: bytes) -> bool:
        """Whether `mark` follows byte `start`: near the file's end, or before trailing bytes."""
        tail_start = max(start, self.num_bytes - TAIL_BYTES)
        if mark in os.pread(self.handle, self.num_bytes - tail_start, tail_start):
            return True
        return mark in os.pread(self.handle, self.num_bytes - start, start)
