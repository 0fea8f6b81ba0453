"""Draws the papers' pictures of a run, or of several side by side.

python launch/pictures.py runs/free runs/natural
"""

import sys

import tyro

from freeadv_fast.cli import run_tool
from freeadv_fast.evaluation.page import refresh_page
from freeadv_fast.evaluation.pictures.draw import draw_pictures


def main(
    run: tyro.conf.Positional[list[str]], eval_images: int | None = None, checkpoint: str = "last"
) -> int:
    """Draws loss surface, large-eps images, saliency and robustness curves into RUN/plots/.

    Args:
        run: The output folders of finished runs of the same data; the first one's plots/ is drawn
            into, the others stand beside it.
        eval_images: Validation images of the curves. Default: 500; 32 without a GPU, or 8 above 64
            pixels.
        checkpoint: last (each run's result), best (by held-out images), average, or a path.
    """
    draw_pictures(run, checkpoint=checkpoint, num_images=eval_images)
    refresh_page(run[0])
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
