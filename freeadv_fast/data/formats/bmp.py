"""BMP, uncompressed, of 1, 4, 8, 24 or 32 bits a pixel."""

from __future__ import annotations

from freeadv_fast.data.formats.picture_file import BadImage, PictureFile

MAGIC = b"BM"
# BITMAPCOREHEADER holds 16-bit sizes; BITMAPINFOHEADER and its longer kin begin alike.
CORE_HEADER = 12
INFO_HEADERS = (40, 52, 56, 64, 108, 124)
UNCOMPRESSED, BY_MASKS = 0, 3
BITS = (1, 4, 8, 24, 32)
RED_GREEN_BLUE = (0xFF0000, 0x00FF00, 0x0000FF)
READ = "uncompressed ones of 1, 4, 8, 24 and 32 bits are read"


def read_size(file: PictureFile) -> tuple[int, int]:
    """Height and width in pixels.

    Raises:
        BadImage: truncated, damaged, or of a kind on which the decoders do not agree.
    """
    pixels, header = file.unpack("<II", 10)
    if header == CORE_HEADER:
        width, height, _, bits = file.unpack("<HHHH", 18)
        compression = UNCOMPRESSED
    elif header in INFO_HEADERS:
        width, height, _, bits, compression = file.unpack("<iiHHI", 18)
        height = abs(height)  # negative where the first row is the upper one
    else:
        raise BadImage("damaged BMP header")
    is_plain = compression == UNCOMPRESSED and bits in BITS
    is_masked = compression == BY_MASKS and bits == 32
    if not is_plain and not (is_masked and file.unpack("<III", 54) == RED_GREEN_BLUE):
        raise BadImage(f"BMP of {bits} bits a pixel, compression {compression}: {READ}")
    if width < 0:
        raise BadImage("damaged BMP header")
    row_bytes = (width * bits + 31) // 32 * 4
    file.refuse_end_before(pixels + row_bytes * height)
    return height, width
