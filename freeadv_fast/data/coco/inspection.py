"""Are the files that an evaluation will read whole images, and those that were annotated?

Asked before training: the evaluation comes hours later. Files are looked at as a classifier's are
(`headers`), so damage between a file's first and last bytes is not seen.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Sequence

from freeadv_fast.data.coco.annotations import Annotations
from freeadv_fast.data.formats.picture_file import BadImage
from freeadv_fast.data.headers import inspect_image
from freeadv_fast.data.index import NUM_SCAN_THREADS, shortened
from freeadv_fast.data.pixels import read_rgb
from freeadv_fast.errors import UserError


def refuse_unusable(annotations: Annotations, rows: Sequence[int]) -> None:
    """Looks at the files of some rows; COCO's 5,000 for validation take less than a second.

    Args:
        annotations: The split. rows: Which of its images; may be none.

    Raises:
        UserError: some are no whole images, or of another size than annotated.
    """
    with concurrent.futures.ThreadPoolExecutor(NUM_SCAN_THREADS) as threads:
        found = list(threads.map(lambda row: _fault(annotations, row), rows))
    bad = [
        f"{annotations.files[row]} ({fault})"
        for row, fault in zip(rows, found, strict=True)
        if fault is not None
    ]
    if bad:
        raise UserError(
            f"--data: {len(bad):,} of the images in {annotations.folder} that the evaluation reads "
            f"cannot be used: {shortened(bad)}; get them again, or take them out of the annotations"
        )


def _fault(annotations: Annotations, row: int) -> str | None:
    """Why an image cannot be evaluated on, in a few words; None where nothing speaks against it."""
    path = annotations.path(row)
    try:
        height, width = inspect_image(path)
    except BadImage as doubt:
        # It admits what PIL and DALI agree on. Here only PIL decodes, so that PIL has the last
        # word: a GIF is none of the former.
        try:
            width, height = read_rgb(path).size
        except Exception:  # whatever PIL raises at a damaged file
            return str(doubt)
    annotated_height, annotated_width = annotations.sizes[row].tolist()
    if (height, width) == (annotated_height, annotated_width):
        return None
    return (
        f"{width} x {height} pixels, its annotations are for {annotated_width} x {annotated_height}"
    )
