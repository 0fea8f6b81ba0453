"""Numbers behind a field's word, or a field that was not set, and where they are from."""

from __future__ import annotations

import math

# Without a GPU a full evaluation takes hours; 400 images and 20 steps take minutes. The clean
# pass reads all images up to this side: CIFAR's 10,000 are 10,000 passes forwards, where 20 steps
# on 400 images are 8,000 forwards and backwards; ImageNet's 50,000 at 224 pixels would be hours.
CPU_EVAL_ATTACKS = ("pgd-20",)
CPU_EVAL_IMAGES = 400
CPU_CLEAN_SIDE = 64

# Per-channel mean and standard deviation of the training pixels in [0, 1].
PIXEL_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    # Pixels in [-1, 1]: AdvProp's code.
    "symmetric": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    # The network standardises each image itself (models.zoo), under autograd.
    "per-image": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}

# lambda = at_zero * growth^(eps / 8), eps in grey levels (1/255): the authors' values for
# CIFAR-10, 0.02 * 10^(eps/8), and SVHN, 6.25/4 * 1.6^(eps/8).
LAMBDA_PRESETS = {"cifar10": (0.02, 10.0), "svhn": (6.25 / 4, 1.6)}


def preset_lambda(dataset: str, eps_levels: float) -> float:
    """The authors' weight of the regulariser.

    Args:
        dataset: A key of `LAMBDA_PRESETS`.
        eps_levels: Radius of the L-infinity ball in grey levels (1/255), at least 0.

    Returns:
        lambda: for CIFAR-10 0.2 at 8/255 and 2.0 at 16/255, for SVHN 2.5 at 8/255.

    Raises:
        KeyError: there is no preset for `dataset`.
    """
    at_zero, growth = LAMBDA_PRESETS[dataset]
    return at_zero * math.pow(growth, eps_levels / 8)
