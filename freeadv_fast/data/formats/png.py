"""PNG of every colour type and depth; of an animated one, its default picture."""

from __future__ import annotations

from freeadv_fast.data.formats.picture_file import BadImage, PictureFile

MAGIC = b"\x89PNG\r\n\x1a\n"


def read_size(file: PictureFile) -> tuple[int, int]:
    """Height and width in pixels, from the IHDR chunk, which must come first.

    Raises:
        BadImage: truncated or damaged.
    """
    if len(file.head) < 24 or file.head[12:16] != b"IHDR":
        raise BadImage("damaged PNG header")
    width, height = file.unpack(">II", 16)
    if not file.holds_after(len(MAGIC), b"IEND"):
        raise BadImage("truncated PNG: no IEND chunk")
    return height, width
