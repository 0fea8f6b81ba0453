"""One file, the same pixels: each kind that the scan admits, by DALI, by PIL and in smaller copies.

The truth is not read from the files: it is the picture they were made of, and what the kind's
rules make of it (`Kind.truth`). Where a lossless kind is exact, its tolerance is 0 levels.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from freeadv_fast.data import index
from freeadv_fast.data.folder_torchvision import TorchvisionDecoder
from freeadv_fast.data.formats.picture_file import BadImage
from freeadv_fast.data.headers import LONGEST_SIDE, MOST_PIXELS, inspect_image
from freeadv_fast.data.index import index_images
from freeadv_fast.data.pixels import read_rgb
from freeadv_fast.data.plan import Plan
from freeadv_fast.data.resize.copies import Resizing, resize_file
from freeadv_fast.errors import UserError

HEIGHT, WIDTH = 60, 80
TURNED = Image.Exif()
TURNED[0x0112] = 6  # "rotate me": not obeyed, as in torchvision


def picture(channels: int, seed: int = 1) -> np.ndarray:
    """A smooth random picture: (60, 80, channels) uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, channels), dtype=np.uint8)
    bands = [
        Image.fromarray(coarse[:, :, c]).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        for c in range(channels)
    ]
    return np.stack([np.asarray(band) for band in bands], axis=2)


GREY, RGB, RGBA, CMYK = (picture(channels) for channels in (1, 3, 4, 4))
GREY_ALPHA = picture(2)
# All 16 bits are used, so that cutting off the lower eight is not rounding.
GREY16 = GREY.astype(np.uint16) * 256 + np.random.default_rng(2).integers(
    0, 256, GREY.shape, dtype=np.uint16
)
RGB16 = RGB.astype(np.uint16) * 256 + np.random.default_rng(3).integers(
    0, 256, RGB.shape, dtype=np.uint16
)
PALETTE = Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE)


def grey_as_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey.reshape(HEIGHT, WIDTH, 1), 3, axis=2)


def rounded(levels: np.ndarray) -> np.ndarray:
    """16 bits to 8: 65,535 is 255, to the nearest level."""
    return np.rint(levels / 257).astype(np.uint8)


def inked(inks: np.ndarray) -> np.ndarray:
    """CMYK without a profile: light that neither the ink nor black takes."""
    light = 255.0 - inks
    return np.rint(light[:, :, :3] * light[:, :, 3:] / 255).astype(np.uint8)


def saved(pixels: np.ndarray | Image.Image, form: str, mode: str | None = None, **how) -> bytes:
    """The file that PIL writes."""
    if isinstance(pixels, np.ndarray):
        pixels = Image.fromarray(pixels.squeeze(), mode)
    content = io.BytesIO()
    pixels.save(content, form, **how)
    return content.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + check


def png(samples: np.ndarray, depth: int, colour: int, *more: bytes, interlaced=False) -> bytes:
    """A PNG of kinds that PIL does not write; `samples` are packed rows or 16-bit samples."""
    rows = [samples]
    if interlaced:  # Adam7
        passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2))
        passes += ((0, 1, 2, 2), (1, 0, 2, 1))
        rows = [samples[y::down, x::right] for y, x, down, right in passes]
    order = samples.dtype.newbyteorder(">")
    raw = b"".join(b"\0" + row.astype(order).tobytes() for part in rows for row in part)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, colour, 0, 0, interlaced)
    data = chunk(b"IDAT", zlib.compress(raw))
    chunks = (chunk(b"IHDR", header), *more, data, chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def without_segment(jpeg: bytes, marker: int) -> bytes:
    start = jpeg.index(bytes([0xFF, marker]))
    (length,) = struct.unpack(">H", jpeg[start + 2 : start + 4])
    return jpeg[:start] + jpeg[start + 2 + length :]


def with_adobe(jpeg: bytes, transform: int) -> bytes:
    """A JPEG with Adobe's marker: 0 for colours as they are, 2 for YCCK."""
    marker = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])
    return jpeg[:2] + marker + jpeg[2:]


def ycck(inks: np.ndarray) -> bytes:
    """A YCCK JPEG: the inks CMY as YCbCr, beside inverted K."""
    ycc = np.asarray(Image.fromarray(inks[:, :, :3].copy()).convert("YCbCr"))
    # PIL inverts what it is given as CMYK, as Adobe does with K but not with YCC.
    planes = np.dstack([255 - ycc, inks[:, :, 3:]])
    return with_adobe(without_segment(saved(planes, "JPEG", "CMYK", quality=100), 0xEE), 2)


def bmp(bits: int, compression: int, rows: np.ndarray, *, masks=(), height=HEIGHT) -> bytes:
    """A BMP of kinds that PIL does not write; rows as they are stored."""
    data, after = rows.tobytes(), b"".join(struct.pack("<I", mask) for mask in masks)
    start = 14 + 40 + len(after)
    head = struct.pack("<IHHI", start + len(data), 0, 0, start)
    info = struct.pack("<IiiHHII", 40, WIDTH, height, 1, bits, compression, len(data)) + bytes(16)
    return b"BM" + head + info + after + data


def tiff(order: str, tags: dict[int, list[int]], *strips: bytes) -> bytes:
    """An uncompressed TIFF; `tags` beside or instead of those of an RGB picture."""
    room = 600
    starts = [room + sum(map(len, strips[:number])) for number in range(len(strips))]
    tags = {256: [WIDTH], 257: [HEIGHT], 258: [8, 8, 8], 259: [1], 262: [2], 277: [3]} | tags
    tags |= {278: [HEIGHT]} if 322 not in tags else {}
    starts_tag, lengths_tag = (324, 325) if 322 in tags else (273, 279)
    tags |= {starts_tag: starts, lengths_tag: [len(strip) for strip in strips]}
    directory, far = struct.pack(f"{order}H", len(tags)), b""
    far_start = 8 + 2 + 12 * len(tags) + 4
    for tag, values in sorted(tags.items()):
        number, layout = (4, "I") if tag in (starts_tag, lengths_tag) else (3, "H")
        content = struct.pack(f"{order}{len(values)}{layout}", *values)
        if len(content) > 4:
            place = far_start + len(far)
            content, far = struct.pack(f"{order}I", place), far + content
        directory += struct.pack(f"{order}HHI", tag, number, len(values)) + content.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return (head + directory + bytes(4) + far).ljust(room, b"\0") + b"".join(strips)


def tiles(pixels: np.ndarray, side: int = 16) -> list[bytes]:
    padded = np.pad(pixels, ((0, -HEIGHT % side), (0, -WIDTH % side), (0, 0)))
    corners = [(y, x) for y in range(0, HEIGHT, side) for x in range(0, WIDTH, side)]
    return [padded[y : y + side, x : x + side].tobytes() for y, x in corners]


class Kind(NamedTuple):
    """A kind of file, what it shows, and how far a decoder may be off in levels."""

    content: bytes
    truth: np.ndarray
    tolerance: int


BGR = np.ascontiguousarray(RGB[:, :, ::-1])
BGRX = np.dstack([BGR, np.full((HEIGHT, WIDTH), 9, np.uint8)])
MASKS = (0xFF0000, 0xFF00, 0xFF)
# JPEG stores colour at half the resolution and rounds: on smooth pictures of quality 95 it is off
# by 12 levels at most. Decoders may differ among themselves by 2, see DECODERS.
JPEG = 14
DECODERS = 2
# nvJPEG repeats colours where libjpeg interpolates them: off by 31 at most here, on an H200.
JPEG_BY_GPU = 36

ADMITTED = {
    "grey PNG": Kind(saved(GREY, "PNG"), grey_as_rgb(GREY), 0),
    "1-bit PNG": Kind(
        saved(Image.fromarray(GREY.squeeze() > 127), "PNG"),
        grey_as_rgb(np.where(GREY > 127, 255, 0).astype(np.uint8)),
        0,
    ),
    "4-bit grey PNG": Kind(
        png((GREY[:, ::2, 0] // 17 << 4 | GREY[:, 1::2, 0] // 17).astype(np.uint8), 4, 0),
        grey_as_rgb(GREY // 17 * 17),
        0,
    ),
    "16-bit grey PNG": Kind(png(GREY16, 16, 0), grey_as_rgb(rounded(GREY16)), 0),
    "16-bit grey PNG with a transparent level": Kind(
        png(GREY16, 16, 0, chunk(b"tRNS", struct.pack(">H", GREY16[0, 0, 0]))),
        grey_as_rgb(rounded(GREY16)),
        0,
    ),
    "16-bit grey interlaced PNG": Kind(
        png(GREY16, 16, 0, interlaced=True), grey_as_rgb(rounded(GREY16)), 0
    ),
    "grey and alpha PNG": Kind(
        saved(GREY_ALPHA, "PNG", "LA"), grey_as_rgb(GREY_ALPHA[:, :, :1]), 0
    ),
    "RGB PNG": Kind(saved(RGB, "PNG"), RGB, 0),
    "RGB interlaced PNG": Kind(png(RGB, 8, 2, interlaced=True), RGB, 0),
    "RGB PNG with a transparent colour": Kind(saved(RGB, "PNG", transparency=(3, 4, 5)), RGB, 0),
    "RGB PNG of another gamma": Kind(
        png(RGB, 8, 2, chunk(b"gAMA", struct.pack(">I", 100_000))), RGB, 0
    ),
    "RGB PNG to be turned": Kind(saved(RGB, "PNG", exif=TURNED), RGB, 0),
    "animated PNG": Kind(
        saved(RGB, "PNG", save_all=True, append_images=[Image.fromarray(255 - RGB)]), RGB, 0
    ),
    # PIL drops the lower eight bits of colours, DALI rounds.
    "16-bit RGB PNG": Kind(png(RGB16, 16, 2), rounded(RGB16), 1),
    "RGBA PNG": Kind(saved(RGBA, "PNG"), RGBA[:, :, :3], 0),
    "palette PNG": Kind(saved(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB")), 0),
    "palette PNG with a transparent colour": Kind(
        saved(PALETTE, "PNG", transparency=bytes(range(256))), np.asarray(PALETTE.convert("RGB")), 0
    ),
    "baseline JPEG": Kind(saved(RGB, "JPEG", quality=95), RGB, JPEG),
    "JPEG without subsampling": Kind(saved(RGB, "JPEG", quality=95, subsampling=0), RGB, JPEG),
    "progressive JPEG": Kind(saved(RGB, "JPEG", quality=95, progressive=True), RGB, JPEG),
    "grey JPEG": Kind(saved(GREY, "JPEG", quality=95), grey_as_rgb(GREY), JPEG),
    "JPEG to be turned": Kind(saved(RGB, "JPEG", quality=95, exif=TURNED), RGB, JPEG),
    "YCbCr JPEG by Adobe": Kind(
        with_adobe(without_segment(saved(RGB, "JPEG", quality=95), 0xE0), 1), RGB, JPEG
    ),
    "JPEG with a second picture": Kind(
        saved(RGB, "MPO", quality=95, save_all=True, append_images=[Image.fromarray(255 - RGB)]),
        RGB,
        JPEG,
    ),
    "CMYK JPEG by Adobe": Kind(saved(CMYK, "JPEG", "CMYK", quality=95), inked(CMYK), JPEG),
    "progressive CMYK JPEG by Adobe": Kind(
        saved(CMYK, "JPEG", "CMYK", quality=95, progressive=True), inked(CMYK), JPEG
    ),
    "YCCK JPEG": Kind(ycck(CMYK), inked(CMYK), JPEG),
    "lossless WebP": Kind(saved(RGB, "WEBP", lossless=True), RGB, 0),
    "lossless WebP with alpha": Kind(
        saved(RGBA, "WEBP", lossless=True, exact=True), RGBA[:, :, :3], 0
    ),
    "lossy WebP": Kind(saved(RGB, "WEBP", quality=95), RGB, 30),
    "WebP to be turned": Kind(saved(RGB, "WEBP", quality=95, exif=TURNED), RGB, 30),
    "grey BMP": Kind(saved(GREY, "BMP"), grey_as_rgb(GREY), 0),
    "1-bit BMP": Kind(
        saved(Image.fromarray(GREY.squeeze() > 127), "BMP"),
        grey_as_rgb(np.where(GREY > 127, 255, 0).astype(np.uint8)),
        0,
    ),
    "palette BMP": Kind(saved(PALETTE, "BMP"), np.asarray(PALETTE.convert("RGB")), 0),
    "RGB BMP": Kind(saved(RGB, "BMP"), RGB, 0),
    "RGB BMP from the top": Kind(bmp(24, 0, BGR, height=-HEIGHT), RGB, 0),
    "32-bit BMP": Kind(bmp(32, 0, BGRX[::-1]), RGB, 0),
    "32-bit BMP by masks": Kind(bmp(32, 3, BGRX[::-1], masks=MASKS), RGB, 0),
    "RGBA BMP": Kind(saved(RGBA, "BMP"), RGBA[:, :, :3], 0),
    "grey TIFF": Kind(saved(GREY, "TIFF"), grey_as_rgb(GREY), 0),
    "RGB TIFF": Kind(saved(RGB, "TIFF"), RGB, 0),
    "RGB TIFF in strips": Kind(saved(RGB, "TIFF", strip_size=3000), RGB, 0),
    "RGB TIFF in tiles": Kind(tiff("<", {322: [16], 323: [16]}, *tiles(RGB)), RGB, 0),
    "big-endian RGB TIFF": Kind(tiff(">", {}, RGB.tobytes()), RGB, 0),
    "RGBA TIFF": Kind(saved(RGBA, "TIFF"), RGBA[:, :, :3], 0),
    "LZW TIFF": Kind(saved(RGB, "TIFF", compression="tiff_lzw"), RGB, 0),
    "Deflate TIFF": Kind(saved(RGB, "TIFF", compression="tiff_adobe_deflate"), RGB, 0),
    "PackBits TIFF": Kind(saved(RGB, "TIFF", compression="packbits"), RGB, 0),
    "TIFF of two pictures": Kind(
        saved(RGB, "TIFF", save_all=True, append_images=[Image.fromarray(255 - RGB)]), RGB, 0
    ),
    "PPM": Kind(saved(RGB, "PPM"), RGB, 0),
    "PPM with a comment": Kind(b"P6\n# by hand\n80 60\n255\n" + RGB.tobytes(), RGB, 0),
    "PGM": Kind(saved(GREY, "PPM"), grey_as_rgb(GREY), 0),
}


def riff_with_hidden_exif() -> bytes:
    """A WebP whose picture chunk is of odd length, and EXIF after it."""
    for seed in range(20):
        content = saved(picture(3, seed), "WEBP", lossless=True, exif=TURNED)
        (length,) = struct.unpack("<I", content[34:38])
        if content[30:34] == b"VP8L" and length % 2:
            return content
    raise AssertionError("no chunk of odd length")


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says so of itself; its pixels are never looked at."""
    size = struct.pack(">II", WIDTH, HEIGHT)
    return png(RGB, 8, 2).replace(size, struct.pack(">II", width, height), 1)


REFUSED = {
    "CMYK JPEG without a marker": (
        without_segment(saved(CMYK, "JPEG", "CMYK"), 0xEE),
        "does not say whether its inks are inverted",
    ),
    "RGB JPEG by Adobe": (saved(RGB, "JPEG", keep_rgb=True), "stores RGB and not YCbCr"),
    "RGB JPEG by its components": (
        without_segment(saved(RGB, "JPEG", keep_rgb=True), 0xEE),
        "stores RGB and not YCbCr",
    ),
    "RGB JPEG behind a marker that is not JFIF's": (
        with_adobe(saved(RGB, "JPEG", keep_rgb=True), 0).replace(
            b"\xff\xd8", b"\xff\xd8\xff\xe0\x00\x06AVI1", 1
        ),
        "stores RGB and not YCbCr",
    ),
    "JPEG of two components": (
        saved(RGB, "JPEG").replace(
            b"\xff\xc0\x00\x11\x08\x00\x3c\x00\x50\x03", b"\xff\xc0\x00\x11\x08\x00\x3c\x00\x50\x02"
        ),
        "2 components",
    ),
    "GIF": (saved(PALETTE, "GIF"), "neither a JPEG nor a PNG, WebP, BMP, TIFF, PGM or PPM"),
    "animated WebP": (
        saved(RGB, "WEBP", save_all=True, append_images=[Image.fromarray(255 - RGB)]),
        "animated WebP",
    ),
    "WebP with EXIF where DALI is lost": (riff_with_hidden_exif(), "where DALI does not find it"),
    "half a WebP": (saved(RGB, "WEBP")[:-100], "truncated WebP"),
    "16-bit BMP": (bmp(16, 0, np.zeros((HEIGHT, WIDTH), np.uint16)), "BMP of 16 bits a pixel"),
    "compressed BMP": (bmp(8, 1, np.zeros((HEIGHT, WIDTH), np.uint8)), "compression 1"),
    "BMP of other masks": (bmp(32, 3, BGRX, masks=MASKS[::-1]), "compression 3"),
    "half a BMP": (saved(RGB, "BMP")[:-100], "truncated BMP"),
    "16-bit grey TIFF": (saved(GREY16, "TIFF"), "TIFF of 16 bits a sample"),
    "1-bit TIFF": (saved(Image.fromarray(GREY.squeeze() > 9), "TIFF"), "TIFF of 1 bits a sample"),
    "palette TIFF": (saved(PALETTE, "TIFF"), "neither grey, RGB nor RGBA"),
    "CMYK TIFF": (saved(CMYK, "TIFF", "CMYK"), "neither grey, RGB nor RGBA"),
    "grey and alpha TIFF": (saved(GREY_ALPHA, "TIFF", "LA"), "neither grey, RGB nor RGBA"),
    "TIFF with alpha multiplied in": (
        tiff("<", {258: [8] * 4, 277: [4], 338: [1]}, RGBA.tobytes()),
        "neither grey, RGB nor RGBA",
    ),
    "JPEG in a TIFF": (saved(RGB, "TIFF", compression="jpeg"), "TIFF"),
    "TIFF in planes": (tiff("<", {284: [2]}, RGB.tobytes()), "a plane for each colour"),
    "TIFF to be turned": (saved(RGB, "TIFF", tiffinfo={274: 6}), "to be turned"),
    "half a TIFF": (tiff("<", {}, RGB.tobytes())[:-100], "truncated TIFF"),
    "PPM as text": (b"P3 1 1 255\n1 2 3\n", "written as text"),
    "PPM of 100 levels": (b"P6 1 1 100\n123", "other levels"),
    "half a PPM": (saved(RGB, "PPM")[:-100], "truncated PNM"),
    "a PNG too wide": (png_of_size(LONGEST_SIDE + 1, 4), "a side of more than 65,500"),
    "a PNG too large": (
        png_of_size(60_000, MOST_PIXELS // 60_000 + 1),
        "more than 178,956,970",
    ),
}


@pytest.fixture
def as_file(tmp_path) -> Callable[[bytes], Path]:
    """Writes a training set of one file, whose name says nothing of its kind."""

    def write(content: bytes, name: str = "a.jpg") -> Path:
        path = tmp_path / "tree" / "train" / "only" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return write


def whole_picture() -> Plan:
    """A plan that cuts the left square out, without resampling."""
    return Plan(
        rows=np.zeros(1, np.int64),
        windows=np.array([[0, 0, HEIGHT, HEIGHT]]),
        resized=np.array([[HEIGHT, HEIGHT]]),
        corners=np.zeros((1, 2), np.int64),
        flips=np.zeros(1, np.bool_),
    )


def decoded(decoder_class, path: Path, device: str = "cpu") -> np.ndarray:
    """The left square of the only picture, through a decoder of ours."""
    files = index_images(str(path.parents[1]), 0, pytest.fail)
    decoder = decoder_class(
        files, image_size=HEIGHT, batch_size=1, num_workers=1, device=torch.device(device)
    )
    (images,) = decoder.decode(iter([whole_picture()]))
    return images[0].cpu().numpy()


def assert_near(pixels: np.ndarray, truth: np.ndarray, tolerance: int) -> None:
    difference = np.abs(pixels.astype(int) - truth)
    assert difference.max() <= tolerance, f"off by {difference.max()}, {difference.mean():.2f} mean"


@pytest.mark.parametrize("name", ADMITTED)
def test_what_is_admitted_is_decoded_alike(name, as_file, tmp_path, monkeypatch):
    dali = pytest.importorskip("freeadv_fast.data.folder_dali")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kind = ADMITTED[name]
    path = as_file(kind.content)
    assert inspect_image(str(path)) == (HEIGHT, WIDTH)
    truth = kind.truth[:, :HEIGHT]
    by_pil = decoded(TorchvisionDecoder, path)
    assert_near(by_pil, truth, kind.tolerance)
    by_dali = decoded(dali.DaliDecoder, path)
    assert_near(by_dali, truth, kind.tolerance)
    assert_near(by_dali, by_pil, min(kind.tolerance, DECODERS))


@pytest.mark.parametrize("name", ADMITTED)
def test_smaller_copies_show_the_same(name, as_file, tmp_path):
    kind = ADMITTED[name]
    path = as_file(kind.content)
    (tmp_path / "small" / "train" / "only").mkdir(parents=True)
    resizing = Resizing(tmp_path / "tree", tmp_path / "small", 30, 100)
    assert resize_file(resizing, "train/only/a.jpg") == "resized"
    copy = read_rgb(str(tmp_path / "small" / "train" / "only" / "a.jpg"))
    wanted = Image.fromarray(kind.truth).resize((40, 30), Image.Resampling.BILINEAR)
    # Brightness alone: JPEGs store colour at half the resolution.
    bright = np.asarray(copy.convert("L"), int), np.asarray(wanted.convert("L"))
    assert_near(*bright, kind.tolerance + 6)
    assert path.exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ADMITTED)
def test_a_gpu_decodes_alike(name, as_file, tmp_path, monkeypatch):
    dali = pytest.importorskip("freeadv_fast.data.folder_dali")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kind = ADMITTED[name]
    by_gpu = decoded(dali.DaliDecoder, as_file(kind.content), "cuda")
    tolerance = JPEG_BY_GPU if kind.tolerance == JPEG else kind.tolerance
    assert_near(by_gpu, kind.truth[:, :HEIGHT], tolerance)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(name, as_file):
    content, reason = REFUSED[name]
    with pytest.raises(BadImage, match=reason):
        inspect_image(str(as_file(content)))


def test_verdicts_of_older_rules_are_forgotten(as_file, tmp_path, monkeypatch):
    """A picture that was refused before is looked at again, and one that was admitted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = str(as_file(ADMITTED["lossless WebP"].content).parents[1])
    as_file(ADMITTED["RGB PNG"].content, "b.png")

    def refuse(path):
        raise BadImage("neither a JPEG nor a PNG by its first bytes")

    with monkeypatch.context() as older:
        older.setattr(index, "RULES", 1)
        older.setattr(index, "inspect_image", refuse)
        with pytest.raises(UserError, match="2 of 2 files"):
            index_images(folder, 0, pytest.fail)
    assert len(index_images(folder, 0, pytest.fail).files) == 2
