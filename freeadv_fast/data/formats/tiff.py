"""TIFF 6.0 of 8-bit grey, RGB or RGBA samples, uncompressed, LZW, Deflate or PackBits."""

from __future__ import annotations

import struct

from freeadv_fast.data.formats.picture_file import BadImage, PictureFile

LITTLE_ENDIAN = b"II*\0"
BIG_ENDIAN = b"MM\0*"

# Tags, and what stands for some where they are absent.
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
ORIENTATION, SAMPLES, PLANAR, EXTRA, SAMPLE_FORMAT = 274, 277, 284, 338, 339
STRIP_STARTS, STRIP_LENGTHS, TILE_STARTS, TILE_LENGTHS = 273, 279, 324, 325
DEFAULTS = {
    BITS: (1,),
    COMPRESSION: (1,),
    ORIENTATION: (1,),
    SAMPLES: (1,),
    PLANAR: (1,),
    SAMPLE_FORMAT: (1,),
}
# Types of a field by number: BYTE, SHORT and LONG, as `struct` calls them.
LAYOUTS = {1: "B", 3: "H", 4: "I"}
SHORT = 3
# TIFF 6.0 has SHORT alone for these; DALI reads nothing else.
SHORTS = (BITS, COMPRESSION, PHOTOMETRIC, ORIENTATION, SAMPLES, PLANAR, EXTRA, SAMPLE_FORMAT)
ENTRY_BYTES = 12

COMPRESSIONS = (1, 5, 8, 32773, 32946)  # none, LZW, Deflate, PackBits, Deflate's old number
BLACK_IS_ZERO, RGB = 1, 2
# Samples a pixel by photometric interpretation.
COLOURS = {BLACK_IS_ZERO: (1,), RGB: (3, 4)}
PREMULTIPLIED = (1,)

Fields = dict[int, tuple[int, ...]]


def read_size(file: PictureFile) -> tuple[int, int]:
    """Height and width in pixels of the first picture.

    Raises:
        BadImage: truncated, damaged, or of a kind on which the decoders do not agree.
    """
    fields = DEFAULTS | _fields(file)
    if not {WIDTH, HEIGHT, PHOTOMETRIC} <= fields.keys():
        raise BadImage("damaged TIFF header")
    _refuse_other_kinds(fields)
    is_tiled = TILE_STARTS in fields
    starts = fields.get(TILE_STARTS if is_tiled else STRIP_STARTS, ())
    lengths = fields.get(TILE_LENGTHS if is_tiled else STRIP_LENGTHS, ())
    if not starts or len(starts) != len(lengths):
        raise BadImage("damaged TIFF header")
    file.refuse_end_before(max(map(sum, zip(starts, lengths, strict=True))))
    return fields[HEIGHT][0], fields[WIDTH][0]


def _fields(file: PictureFile) -> Fields:
    """The whole numbers of the first directory, by tag."""
    order = "<" if file.head.startswith(LITTLE_ENDIAN) else ">"
    (directory,) = file.unpack(f"{order}I", 4)
    (count,) = file.unpack(f"{order}H", directory)
    fields: Fields = {}
    for entry in range(directory + 2, directory + 2 + count * ENTRY_BYTES, ENTRY_BYTES):
        tag, number, length = file.unpack(f"{order}HHI", entry)
        if number not in LAYOUTS or not 0 < length <= file.num_bytes:
            continue  # texts and fractions say nothing of the pixels' layout
        if tag in SHORTS and number != SHORT:
            raise BadImage("damaged TIFF header")
        layout = f"{order}{length}{LAYOUTS[number]}"
        start = entry + 8
        if struct.calcsize(layout) > 4:
            (start,) = file.unpack(f"{order}I", start)
        fields[tag] = file.unpack(layout, start)
    return fields


def _refuse_other_kinds(fields: Fields) -> None:
    """Raises BadImage for what one decoder reads otherwise than the other, or not at all."""
    photometric, samples = fields[PHOTOMETRIC][0], fields[SAMPLES][0]
    if set(fields[BITS]) != {8} or set(fields[SAMPLE_FORMAT]) != {1}:
        raise BadImage(f"TIFF of {fields[BITS][0]} bits a sample: 8-bit ones are read")
    is_coloured = samples in COLOURS.get(photometric, ()) and samples == len(fields[BITS])
    if not is_coloured or fields.get(EXTRA) == PREMULTIPLIED:
        raise BadImage("TIFF whose colours are neither grey, RGB nor RGBA")
    if fields[COMPRESSION][0] not in COMPRESSIONS:
        raise BadImage("TIFF that is compressed by other means than LZW, Deflate and PackBits")
    if fields[PLANAR][0] != 1:
        raise BadImage("TIFF that holds a plane for each colour")
    if fields[ORIENTATION][0] != 1:
        raise BadImage("TIFF that is to be turned, which one decoder does and the other does not")
