"""WebP (RFC 9649): lossy and lossless, with or without alpha; no animations."""

from __future__ import annotations

from collections.abc import Iterator

from freeadv_fast.data.formats.picture_file import BadImage, PictureFile

IS_ANIMATED = 0x02


def is_webp(head: bytes) -> bool:
    """Whether a file begins as a WebP does."""
    return head[:4] == b"RIFF" and head[8:12] == b"WEBP"


def read_size(file: PictureFile) -> tuple[int, int]:
    """Height and width in pixels, from the first chunk.

    Raises:
        BadImage: truncated, damaged, or of a kind on which the decoders do not agree.
    """
    (num_bytes,) = file.unpack("<I", 4)
    file.refuse_end_before(8 + num_bytes)
    chunks = list(_chunks(file, 8 + num_bytes))
    _refuse_hidden_exif(chunks)
    name, start, _ = chunks[0] if chunks else (b"", 0, 0)
    if name == b"VP8 ":
        width, height = file.unpack("<HH", start + 6)
        return height & 0x3FFF, width & 0x3FFF
    if name == b"VP8L":
        (bits,) = file.unpack("<I", start + 1)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if name == b"VP8X":
        (flags,) = file.unpack("<B", start)
        if flags & IS_ANIMATED:
            raise BadImage("animated WebP")
        width, width_high, height, height_high = file.unpack("<HBHB", start + 4)
        return (height_high << 16 | height) + 1, (width_high << 16 | width) + 1
    raise BadImage("damaged WebP header")


def _chunks(file: PictureFile, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Each chunk's name, where its content starts, and how long it is."""
    position = 12
    while position + 8 <= end:
        (length,) = file.unpack("<I", position + 4)
        yield file.read(position, 4), position + 8, length
        position += 8 + length + length % 2


def _refuse_hidden_exif(chunks: list[tuple[bytes, int, int]]) -> None:
    """Raises BadImage for EXIF behind a chunk of odd length.

    DALI 2.4 forgets the byte that fills such a chunk up, loses its way and reads nothing.
    """
    names = [name for name, _, _ in chunks]
    before = chunks[: names.index(b"EXIF")] if b"EXIF" in names else []
    if any(length % 2 for _, _, length in before):
        raise BadImage("WebP with EXIF where DALI does not find it (behind a chunk of odd length)")
