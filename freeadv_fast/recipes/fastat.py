"""The FastAT Benchmark's setting on CIFAR-10 (Pan and Yao 2026, arXiv 2604.22853).

One network (`models.cifar_resnet`), 49,000 training images and 1,000 held out, batch 128, crops and
flips, pixels in [0, 1], SGD with rate 0.1 and decay 5e-4 under torch's OneCycleLR stepped once an
epoch, labels smoothed by 0.4, weights averaged by 0.9995, eps 8/255; attacked with PGD-50 in steps
of 2/255 and AutoAttack (here ``--eval-attacks pgd-50,autoattack``). Read at fzjcdt/FastAT_Benchmark
b99c0de (main.py, fast_at/, configs/cifar10/).

Free-m is not on that board. What it calls Free-AT starts its perturbation anew at every minibatch;
and its OneCycleLR has 200 steps, of which 50 are taken, so that the rate rises to 0.093 and never
falls: at the end the plain weights of its first seed withstand PGD-10 on 29.8 % of the held-out
images, the averaged ones on 48.9 %. Here the perturbation carries over, as in Shafahi et al. 2019,
and the cycle ends with the run. The budget is theirs, 200 passes over the data, as many as fgsm-rs
makes forwards and backwards in 100 epochs: 50 data epochs at m 4, 25 at m 8.

Where we differ from that code, here and in all rows:
- OneCycleLR swings the momentum between 0.95 and 0.85, a default of torch's; here it is 0.9, as
  their README says.
- Its averages start from the first weights, and batch norm's statistics are averaged with them;
  what ours do, `step.averaging` tells.
- Its numbers are of the best epoch's weights, plain or averaged, by PGD-10 on the held-out images;
  ours are the last weights', with the average's and the best ones' beside them.
- Its held-out images are the last 1,000 of the file; ours are drawn.
- PGD attacks in eval mode there, in training mode here, as Madry et al. do.
- GradAlign's second point is clipped to the pixel range there; the original does not, nor we.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.schedule import Schedule
from freeadv_fast.recipes.free import CIFAR10, smoothed_and_averaged
from freeadv_fast.recipes.pgd import pgd_fields

FASTAT_CIFAR10 = smoothed_and_averaged(
    replace(
        CIFAR10,
        crop_padding=4,
        holdout_images=1000,
        arch="cifar-resnet18",
        normalization="none",
        steps=None,
        epochs=100,
        m=1,
        schedule=Schedule.parse("onecycle-epochs:0.3"),
        weight_decay=5e-4,
        decay="all",
        eval_attacks=("pgd-50",),
    )
)


def rows() -> dict[str, TrainConfig]:
    """Free-m, which is not on the board, and some of its rows."""
    base = FASTAT_CIFAR10
    pgd = replace(base, **pgd_fields(10, Fraction(2), "uniform"))
    return {
        "fastat-free-4": replace(base, m=4, epochs=200),
        "fastat-free-8": replace(base, m=8, epochs=200),
        "fastat-fgsm-rs": replace(base, method="fgsm-rs"),
        "fastat-n-fgsm": replace(base, method="n-fgsm"),
        "fastat-gradalign": replace(base, method="gradalign", reg_every=1, reg_lambda=0.2),
        "fastat-pgd": pgd,
        "fastat-pgd-plain": replace(pgd, ema=None),
    }
