"""JPEG (ITU-T T.81): baseline, extended and progressive, of one, three or four components."""

from __future__ import annotations

from collections.abc import Iterator

from freeadv_fast.data.formats.picture_file import BadImage, PictureFile

MAGIC = b"\xff\xd8\xff"
END_OF_IMAGE = b"\xff\xd9"

# Start-of-frame markers: baseline, extended and progressive Huffman JPEGs are what every decoder
# reads; the others are lossless, hierarchical or arithmetic-coded.
READABLE_FRAMES = range(0xC0, 0xC3)
ALL_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Markers without a length: TEM, the restarts and the start of the image.
BARE_MARKERS = frozenset({0x01, *range(0xD0, 0xD9)})
FILL_BYTE = 0xFF
JFIF_MARKER = 0xE0
ADOBE_MARKER = 0xEE
ENDS_OF_HEADER = (0xD9, 0xDA)


def read_size(file: PictureFile) -> tuple[int, int]:
    """Height and width in pixels as stored: EXIF orientation is not looked at.

    Raises:
        BadImage: truncated, damaged, or of a kind on which the decoders do not agree.
    """
    code, frame = next((s for s in _segments(file) if s[0] in ALL_FRAMES), (0, 0))
    if not frame:
        raise BadImage("JPEG without a frame header")
    bits, height, width, components = file.unpack(">BHHB", frame + 4)
    if code not in READABLE_FRAMES or bits != 8:
        raise BadImage("JPEG of a kind that common decoders do not read")
    if components not in (1, 3, 4):
        raise BadImage(f"JPEG of {components} components, which are no colours")
    if components == 4 and not _has_adobe_marker(file):
        # PIL takes such inks for inverted ones, as Adobe stores them; DALI does not.
        raise BadImage("CMYK JPEG that does not say whether its inks are inverted (Adobe's marker)")
    if components == 3 and _stores_rgb(file, frame):
        # libjpeg reads it; nvJPEG takes it for YCbCr: off by 77 levels on an H200.
        raise BadImage("JPEG that stores RGB and not YCbCr, which a GPU decodes as other colours")
    if not file.holds_after(frame, END_OF_IMAGE):
        raise BadImage("truncated JPEG: no end-of-image marker")
    return height, width


def _segments(file: PictureFile) -> Iterator[tuple[int, int]]:
    """The code of each segment before the pixels, and where it starts in the file."""
    position = 2
    while True:
        first, code, length = file.unpack(">BBH", position)
        if first != 0xFF:
            raise BadImage("damaged JPEG header")
        if code in ENDS_OF_HEADER:
            return
        if code == FILL_BYTE:
            position += 1
        elif code in BARE_MARKERS:
            position += 2
        else:
            yield code, position
            position += 2 + length


def _has_adobe_marker(file: PictureFile) -> bool:
    """Whether a program that follows Adobe's rules wrote the file."""
    return _adobe_transform(file) is not None


def _adobe_transform(file: PictureFile) -> int | None:
    """What Adobe's marker says of the colours: 0 as they are, 1 YCbCr, 2 YCCK; None for none."""
    for code, position in _segments(file):
        if code == ADOBE_MARKER and file.read(position + 4, 5) == b"Adobe":
            (transform,) = file.unpack(">B", position + 15)
            return int(transform)
    return None


def _stores_rgb(file: PictureFile, frame: int) -> bool:
    """Whether three components are red, green and blue, by libjpeg's rules."""
    if any(
        code == JFIF_MARKER and file.read(at + 4, 5) == b"JFIF\0" for code, at in _segments(file)
    ):
        return False
    transform = _adobe_transform(file)
    names = bytes(file.unpack(">B", frame + 10 + 3 * i)[0] for i in range(3))
    return transform == 0 or (transform is None and names == b"RGB")
