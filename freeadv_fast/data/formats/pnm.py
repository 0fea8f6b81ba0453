"""PGM and PPM in binary form, of 255 levels."""

from __future__ import annotations

import re

from freeadv_fast.data.formats.picture_file import BadImage, PictureFile

SAMPLES = {b"P5": 1, b"P6": 3}
TEXT_MAGICS = (b"P2", b"P3")
SPACE = rb"(?:\s|#[^\r\n]*[\r\n])+"
HEADER = re.compile(rb"P[56]" + SPACE + rb"(\d+)" + SPACE + rb"(\d+)" + SPACE + rb"(\d+)\s")


def is_pnm(head: bytes) -> bool:
    """Whether a file begins as a PGM or PPM does."""
    return head[:2] in (*SAMPLES, *TEXT_MAGICS) and head[2:3] in (b" ", b"\t", b"\r", b"\n", b"#")


def read_size(file: PictureFile) -> tuple[int, int]:
    """Height and width in pixels.

    Raises:
        BadImage: truncated, damaged, or of a kind on which the decoders do not agree.
    """
    if file.head[:2] in TEXT_MAGICS:
        raise BadImage("PGM or PPM written as text: binary ones are read")
    header = HEADER.match(file.head)
    if header is None:
        raise BadImage(f"damaged {file.kind} header")
    width, height, levels = (int(number) for number in header.groups())
    if levels != 255:
        raise BadImage(f"{file.kind} of other levels than 0 to 255")
    file.refuse_end_before(header.end() + height * width * SAMPLES[file.head[:2]])
    return height, width
