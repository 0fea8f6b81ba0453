"""Evaluates a run on corrupted or shifted images: launch/robustness.py runs/x --on-the-fly."""

import sys

import tyro

from freeadv_fast.cli import run_tool
from freeadv_fast.evaluation.shifts.robustness import evaluate_robustness


def main(
    run: tyro.conf.Positional[str],
    imagenet_c: str | None = None,
    imagenet_r: str | None = None,
    stylized: str | None = None,
    on_the_fly: bool = False,
    data: str | None = None,
    eval_images: int | None = None,
    checkpoint: str = "last",
) -> int:
    """Prints tables, writes robustness-*.json and plots/robustness-*.png into the run's folder.

    Args:
        run: The run's output folder.
        imagenet_c: Folder of CORRUPTION/SEVERITY/CLASS/, also inside noise/, blur/, and so on.
        imagenet_r: Folder of CLASS/; only the logits of these classes compete.
        stylized: Stylized-ImageNet: folder of CLASS/ or val/CLASS/; all logits compete.
        on_the_fly: Corrupt validation images in memory; compares with no published number.
        data: Validation images to corrupt on the fly. Default: the run's own.
        eval_images: Images a set, or a corruption and severity. Default: all; 400 without a GPU.
        checkpoint: last (the run's result), best (by held-out images), average, or a path.
    """
    folders = {"imagenet_c": imagenet_c, "imagenet_r": imagenet_r, "stylized": stylized}
    sample = {"data": data, "num_images": eval_images, "checkpoint": checkpoint}
    evaluate_robustness(run, **folders, on_the_fly=on_the_fly, **sample)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
