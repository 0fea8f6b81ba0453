"""Held-out images choose weights, and say whether these are better than the last ones.

The result of a run is that of its last weights, as in the papers. The weights that did best on the
held-out images are kept beside them, but the best of many noisy measurements is above its mean:
`exceeds_chance` asks for more than that.
"""

from __future__ import annotations

import math

from freeadv_fast.evaluation.evaluate import Evaluation, evaluate
from freeadv_fast.session.guard import CHECK_ATTACK, Count, pooled
from freeadv_fast.session.run import Run

# Of thirty epochs that are all alike, measured on 400 or on 1000 other images each, the best is
# this many standard errors above the last in one run of forty; of a hundred epochs in one of
# eighteen. Two errors would be one run of four. (Here the images are the same ones: less noise.)
NUM_ERRORS = 3.0


def measure_held_out(run: Run, label: str) -> Evaluation:
    """Accuracies on the held-out images, under attack where the method seeks robustness.

    Args:
        run: It holds images out. Its running statistics are the ranks' mean.
        label: Text before the progress bar.
    """
    assert run.loaders.holdout is not None
    config = run.config
    return evaluate(
        run.model,
        run.loaders.holdout,
        (CHECK_ATTACK,) if run.method.seeks_robustness else (),
        run.evaluation_threat,
        world=run.world,
        mean=config.pixel_mean,
        std=config.pixel_std,
        seed=config.seed,
        label=label,
    )


def score(measured: Evaluation) -> float:
    """What weights are chosen by: robust accuracy where it was measured, or clean accuracy.

    Natural training's robust accuracy is highest before it has learnt anything.
    """
    return measured.robust_accuracy.get(str(CHECK_ATTACK), measured.clean_accuracy)


def exceeds_chance(best: Count, last: Count) -> bool:
    """Whether the best are better than the last by more than the noise of so few images.

    The score test for two proportions that are really one, as in `guard.has_fallen`.
    """
    both = pooled([best, last]).accuracy
    variance = both * (1 - both) * (1 / max(best.images, 1) + 1 / max(last.images, 1))
    return best.accuracy - last.accuracy > NUM_ERRORS * math.sqrt(variance)
