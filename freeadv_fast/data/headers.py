"""Is this file a whole image, and how large? Answered from its first and last bytes."""

from __future__ import annotations

import os
import struct

JPEG_MAGIC = b"\xff\xd8\xff"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
END_OF_IMAGE = b"\xff\xd9"
HEAD_BYTES = 4096
# How the reasons begin that may be gone tomorrow although the file has not changed.
PASSING = "cannot be"
TAIL_BYTES = 1024

# Start-of-frame markers: baseline, extended and progressive Huffman JPEGs are what every decoder
# reads; the others are lossless, hierarchical or arithmetic-coded.
READABLE_FRAMES = range(0xC0, 0xC3)
ALL_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Markers without a length: TEM, the restarts and the start of the image.
BARE_MARKERS = frozenset({0x01, *range(0xD0, 0xD9)})


class BadImage(Exception):
    """A file that cannot be trained on; the message is the reason, a few words long."""


def inspect_image(path: str) -> tuple[int, int]:
    """Checks type, header and end mark of an image file without decoding it.

    EXIF orientation is not looked at, as in torchvision.

    Args:
        path: The file.

    Returns:
        Height and width in pixels.

    Raises:
        BadImage: empty, truncated, unreadable, or neither a JPEG nor a PNG.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise BadImage(f"{PASSING} opened: {error.strerror}") from None
    try:
        return _inspect(handle, os.fstat(handle).st_size)
    except OSError as error:
        raise BadImage(f"{PASSING} read: {error.strerror}") from None
    finally:
        os.close(handle)


def _inspect(handle: int, num_bytes: int) -> tuple[int, int]:
    """As `inspect_image`, on an open file of `num_bytes` bytes."""
    if num_bytes == 0:
        raise BadImage("empty file")
    head = os.pread(handle, HEAD_BYTES, 0)
    if head.startswith(JPEG_MAGIC):
        frame, size = _jpeg_frame(handle, head)
        if not _holds_after(handle, frame, num_bytes, END_OF_IMAGE):
            raise BadImage("truncated JPEG: no end-of-image marker")
    elif head.startswith(PNG_MAGIC):
        size = _png_size(head)
        if not _holds_after(handle, len(PNG_MAGIC), num_bytes, b"IEND"):
            raise BadImage("truncated PNG: no IEND chunk")
    else:
        raise BadImage("neither a JPEG nor a PNG by its first bytes")
    if min(size) == 0:
        raise BadImage("image of zero height or width")
    return size


def _jpeg_frame(handle: int, head: bytes) -> tuple[int, tuple[int, int]]:
    """Walks the segments of a JPEG to its frame header.

    Returns:
        Where the frame header starts in the file, and (height, width).
    """
    start, position = 0, 2
    while True:
        if position + 9 > start + len(head):
            start, head = position, os.pread(handle, HEAD_BYTES, position)
            if len(head) < 9:
                raise BadImage("truncated JPEG: the file ends inside its header")
        marker = head[position - start : position - start + 9]
        if marker[0] != 0xFF:
            raise BadImage("damaged JPEG header")
        code = marker[1]
        if code == 0xFF:  # a fill byte
            position += 1
        elif code in BARE_MARKERS:
            position += 2
        elif code in ALL_FRAMES:
            if code not in READABLE_FRAMES or marker[4] != 8:
                raise BadImage("JPEG of a kind that common decoders do not read")
            height, width = struct.unpack(">HH", marker[5:9])
            return position, (height, width)
        elif code in (0xD9, 0xDA):
            raise BadImage("JPEG without a frame header")
        else:
            position += 2 + int.from_bytes(marker[2:4], "big")


def _png_size(head: bytes) -> tuple[int, int]:
    """(height, width) from the IHDR chunk, which must come first."""
    if len(head) < 24 or head[12:16] != b"IHDR":
        raise BadImage("damaged PNG header")
    width, height = struct.unpack(">II", head[16:24])
    return height, width


def _holds_after(handle: int, start: int, num_bytes: int, mark: bytes) -> bool:
    """Whether `mark` follows byte `start`: near the file's end, or before trailing bytes."""
    tail_start = max(start, num_bytes - TAIL_BYTES)
    if mark in os.pread(handle, num_bytes - tail_start, tail_start):
        return True
    return mark in os.pread(handle, num_bytes - start, start)
