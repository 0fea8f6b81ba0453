"""Is this file a whole image, and how large? Answered from its first and last bytes.

What is admitted both decoders turn into the same pixels (`tests/data/test_decoders_agree.py` has
the table); what only one of them reads, or each in its own way, is refused with that reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from freeadv_fast.data.formats import bmp, jpeg, png, pnm, tiff, webp
from freeadv_fast.data.formats.picture_file import BadImage, PictureFile

# Goes up with every change of what is admitted: a verdict of older rules is not remembered.
RULES = 3
# How the reasons begin that may be gone tomorrow although the file has not changed.
PASSING = "cannot be"

# libjpeg's JPEG_MAX_DIMENSION: beyond it nothing is decoded, and no smaller copy written.
LONGEST_SIDE = 65_500
# Twice PIL.Image.MAX_IMAGE_PIXELS, where PIL refuses to decode (DecompressionBombError).
MOST_PIXELS = 2 * (1024**3 // 4 // 3)

ReadSize = Callable[[PictureFile], tuple[int, int]]


def inspect_image(path: str) -> tuple[int, int]:
    """Checks type, header and end of an image file without decoding it.

    EXIF orientation is not looked at, as in torchvision.

    Args:
        path: The file.

    Returns:
        Height and width in pixels.

    Raises:
        BadImage: empty, truncated, unreadable, or of a kind on which the decoders do not agree.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise BadImage(f"{PASSING} opened: {error.strerror}") from None
    try:
        return _inspect(PictureFile(handle))
    except OSError as error:
        raise BadImage(f"{PASSING} read: {error.strerror}") from None
    finally:
        os.close(handle)


def _inspect(file: PictureFile) -> tuple[int, int]:
    """As `inspect_image`, on an open file."""
    if file.num_bytes == 0:
        raise BadImage("empty file")
    file.kind, read_size = _kind(file.head)
    height, width = read_size(file)
    if min(height, width) == 0:
        raise BadImage("image of zero height or width")
    if max(height, width) > LONGEST_SIDE:
        raise BadImage(f"{width} x {height} pixels: a side of more than {LONGEST_SIDE:,}")
    if height * width > MOST_PIXELS:
        raise BadImage(f"{width} x {height} pixels: more than {MOST_PIXELS:,}")
    return height, width


def _kind(head: bytes) -> tuple[str, ReadSize]:
    """What a file is by its first bytes, whatever its name says, and who reads its size."""
    if head.startswith(jpeg.MAGIC):
        return "JPEG", jpeg.read_size
    if head.startswith(png.MAGIC):
        return "PNG", png.read_size
    if webp.is_webp(head):
        return "WebP", webp.read_size
    if head.startswith((tiff.LITTLE_ENDIAN, tiff.BIG_ENDIAN)):
        return "TIFF", tiff.read_size
    if pnm.is_pnm(head):
        return "PNM", pnm.read_size
    if head.startswith(bmp.MAGIC):
        return "BMP", bmp.read_size
    raise BadImage("neither a JPEG nor a PNG, WebP, BMP, TIFF, PGM or PPM by its first bytes")
