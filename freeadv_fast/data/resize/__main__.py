"""Makes a smaller copy of an image folder, for the phases of small images.

python -m freeadv_fast.data.resize /imagenet /imagenet-160 --size 160
"""

from pathlib import Path

import tyro

from freeadv_fast.data.resize.copies import BAD_LIST, resize_folder


def main(
    source: tyro.conf.Positional[str],
    target: tyro.conf.Positional[str],
    size: int,
    workers: int | None = None,
    quality: int = 95,
) -> int:
    """Makes a smaller copy of an ImageFolder; the same command goes on after an interruption.

    Args:
        source: Folder that holds train/ and val/ with one folder a class in each.
        target: Folder of the copy.
        size: Shorter side of the copies in pixels: 160 to train at 128 px, 352 for 224 px.
        workers: Processes that resize. Default: one a processor.
        quality: JPEG quality of the copies, 1 to 100.
    """
    report = resize_folder(source, target, size=size, quality=quality, workers=workers)
    outcomes = [f"{count:,} {outcome}" for outcome, count in sorted(report.counts.items())]
    bad_list = f" (left out, listed in {Path(target) / BAD_LIST})" if report.bad else ""
    print(f"{target}: {', '.join(outcomes) or 'no images'}{bad_list}")
    return 0


if __name__ == "__main__":  # workers import this file, and no command line with it
    from freeadv_fast.cli import run_tool

    raise SystemExit(run_tool(main))
