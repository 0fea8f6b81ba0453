"""The pictures of a run's folder inside its page."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from freeadv_fast.evaluation.page.files import reason

# Of a page of 3 MB, in base64: the curves of 30 runs and the text take less than the rest.
LARGEST_SUM = 2_300_000
# What a reduced picture is at most wide, and how much narrower each further time, in pixels.
WIDEST, SHRINKAGE = 1600, 0.7
NARROWEST = 200
QUALITY = 88

CAPTIONS = {
    "training": "Loss, accuracies, learning rate and speed while it trained.",
    "perturbations": "Validation images, their perturbations, magnified, and the adversarial "
    "images, each with what the network takes it for.",
    "boxes": "Validation images, their objects, and what is found on them clean, corrupted and "
    "attacked.",
    "corruptions": "Average precision under each corruption, a bar a severity; dashed, on clean "
    "images.",
    "loss-surface": "The loss around an image, along the sign of its gradient and a random "
    "direction, as in figure 3 of Free AT. A robust network's is flat and smooth; a rugged one "
    "hides the gradient.",
    "large-eps": "Adversarial images within a large radius, as in figure 2 of Free AT: those of a "
    "robust network come to look like another class.",
    "saliency": "Gradient of the loss at the image: that of a robust network follows the object.",
    "robustness-curves": "Accuracy against the radius and against the attack's steps. It must fall "
    "to nothing within a large radius; one that keeps falling with more steps warns of masked "
    "gradients.",
}
SHIFT_CAPTION = "Errors on corrupted images, a bar a severity, and the mean of each corruption."


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture that travels inside the page.

    Attributes:
        name: Its file in plots/. caption: What it shows.
        source: A data URI. width: In pixels, of what is shown. height: Likewise.
        is_reduced: Whether the file holds more than the page.
    """

    name: str
    caption: str
    source: str
    width: int
    height: int
    is_reduced: bool


@dataclasses.dataclass
class _Bytes:
    """An encoded picture."""

    kind: str
    data: bytes
    size: tuple[int, int]
    is_reduced: bool = False

    @property
    def width(self) -> int:
        """In pixels."""
        return self.size[0]


def embed(paths: Sequence[Path], damage: dict[str, str]) -> list[Picture]:
    """Pictures as data URIs; the largest are reduced until all of them fit.

    Args:
        paths: PNG files.
        damage: Takes the reason why one is left out, by its name.
    """
    held: dict[Path, _Bytes] = {}
    for path in paths:
        try:
            held[path] = whole(path)
        except Exception as error:  # whatever a decoder says of a damaged file
            damage[f"plots/{path.name}"] = reason(error)
    while sum(map(encoded_size, held.values())) > LARGEST_SUM:
        path = max(held, key=lambda name: encoded_size(held[name]))
        if held[path].width <= NARROWEST:
            damage[f"plots/{path.name}"] = "too large for this page"
            del held[path]
        else:
            held[path] = reduced(path, held[path])
    return [
        Picture(
            path.name,
            caption_of(path.stem),
            f"data:image/{own.kind};base64,{base64.b64encode(own.data).decode()}",
            *own.size,
            own.is_reduced,
        )
        for path, own in held.items()
    ]


def caption_of(stem: str) -> str:
    """What a picture of ours shows; the name of another."""
    if stem in CAPTIONS:
        return CAPTIONS[stem]
    return SHIFT_CAPTION if stem.startswith("robustness-") else stem


def whole(path: Path) -> _Bytes:
    """A picture's file as it is.

    Raises:
        Exception: it is no whole PNG.
    """
    data = path.read_bytes()
    with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
        size = picture.size
        picture.verify()
    return _Bytes("png", data, size)


def reduced(path: Path, now: _Bytes) -> _Bytes:
    """A picture in fewer bytes: as WebP, and narrower each time that it comes here."""
    width = min(WIDEST, now.width) if not now.is_reduced else int(now.width * SHRINKAGE)
    with Image.open(path) as picture:
        height = max(1, round(picture.height * width / picture.width))
        small = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=QUALITY, method=2)
    return _Bytes("webp", buffer.getvalue(), small.size, is_reduced=True)


def encoded_size(picture: _Bytes) -> int:
    """Bytes of a picture in base64."""
    return 4 * -(-len(picture.data) // 3)
