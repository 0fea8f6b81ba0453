"""Evaluates a finished run again, under other attacks, at another eps, on more images.

python launch/evaluate.py runs/x --attacks pgd-50,cw-50 --eps 4/255 --step 1/255
"""

import sys

import tyro

from freeadv_fast.cli import run_tool
from freeadv_fast.evaluation.subject import evaluate


def main(
    run: tyro.conf.Positional[str],
    attacks: str | None = None,
    eps: str | None = None,
    step: str | None = None,
    eval_images: int | None = None,
    data: str | None = None,
    checkpoint: str = "last",
) -> int:
    """Evaluates a run and writes evaluation-*.json into its folder.

    Args:
        run: The run's output folder.
        attacks: Such as pgd-50,cw-50 or pgd-20-10 (10 restarts). Default: the run's.
        eps: Radius of the perturbation, such as 4/255. Default: the run's.
        step: Step of the attacks, such as 1/255. Default: the run's, in proportion to eps.
        eval_images: Validation images to attack. Default: as the run.
        data: Other validation images, as the training script's --data.
        checkpoint: last (the run's result), best (by held-out images), or a path.
    """
    threat = {"eps": eps, "step": step, "attacks": attacks}
    evaluate(run, data=data, num_images=eval_images, checkpoint=checkpoint, **threat)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
