"""What the papers report of their rows: accuracies in percent, under which attack, and where.

Of detectors it is COCO's average precision (AP) instead, likewise in percent.

A recipe that is not here has no number that we know: it is in a figure only, or in no paper.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Reported:
    """What a paper reports of a recipe; `catalogue.PAPERS` says which paper.

    Attributes:
        place: Where it stands, such as the table.
        clean: Accuracy on clean images in percent, AP of a detector; None where it is not given.
        robust: Accuracies in percent by attack, as `--eval-attacks` names it.
        seconds: Of training, where they are given.
    """

    place: str
    clean: float | None = None
    robust: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seconds: float | None = None


def _rows(
    place: str, attacks: tuple[str, ...], accuracies: Mapping[str, tuple[float, ...]]
) -> dict[str, Reported]:
    """Rows of a table: clean accuracy, then one under each attack."""
    return {
        name: Reported(place, clean, dict(zip(attacks, robust, strict=True)))
        for name, (clean, *robust) in accuracies.items()
    }


REPORTED: dict[str, Reported] = {
    **_rows(
        "table 1",
        ("pgd-20", "pgd-100", "cw-100", "pgd-20-10"),
        {
            "cifar10-wrn32-free-m2": (91.45, 33.92, 33.20, 34.57, 33.41),
            "cifar10-wrn32-free-m4": (87.83, 41.15, 40.35, 41.96, 40.73),
            "cifar10-wrn32-free-m8": (85.96, 46.82, 46.19, 46.60, 46.33),
            "cifar10-wrn32-free-m10": (83.94, 46.31, 45.79, 45.86, 45.94),
            "cifar10-wrn32-pgd7": (87.25, 45.84, 45.29, 46.52, 45.53),
        },
    ),
    **_rows("table 1", ("pgd-20",), {"cifar10-wrn32-natural": (95.01, 0.0)}),
    **_rows(
        "table 2",
        ("pgd-20", "pgd-100"),
        {
            "cifar100-wrn32-free-m2": (69.20, 15.37, 14.86),
            "cifar100-wrn32-free-m4": (65.28, 20.64, 20.15),
            "cifar100-wrn32-free-m6": (64.87, 23.68, 23.18),
            "cifar100-wrn32-free-m8": (62.13, 25.88, 25.58),
            "cifar100-wrn32-free-m10": (59.27, 25.15, 24.88),
        },
    ),
    **_rows(
        "table 2",
        ("pgd-20",),
        {
            "cifar100-wrn32-natural": (78.84, 0.0),
            "cifar100-wrn32-pgd2": (67.94, 17.08),
            "cifar100-wrn32-pgd7": (59.87, 22.76),
        },
    ),
    "cifar10-wrn34-free-m10": Reported("section 4", robust={"pgd-20": 48.03}),
    **_rows(
        "table 3",
        ("pgd-10", "pgd-50"),
        {"imagenet-rn50-natural": (76.04, 0.166, 0.052)},
    ),
    **_rows(
        "table 3",
        ("pgd-10", "pgd-50", "pgd-100"),
        {
            "imagenet-rn50-free-m2-eps2": (71.21, 37.01, 36.34, 36.25),
            "imagenet-rn50-free-m4-eps2": (64.45, 43.52, 43.39, 43.40),
            "imagenet-rn50-free-m6-eps2": (60.64, 42.00, 41.90, 41.89),
            "imagenet-rn50-free-m8-eps2": (58.12, 40.04, 40.01, 40.00),
        },
    ),
    **_rows(
        "tables 4 and 5",
        ("pgd-10", "pgd-50", "pgd-100"),
        {
            "imagenet-rn50-free-m4-eps4": (60.21, 32.77, 31.88, 31.82),
            "imagenet-rn101-free-m4-eps4": (63.34, 35.39, 34.40, 34.33),
            "imagenet-rn152-free-m4-eps4": (64.45, 36.99, 36.04, 35.99),
        },
    ),
    **_rows(
        "table 5",
        ("pgd-10", "pgd-50", "pgd-100"),
        {"imagenet-rn50-pgd2-eps4": (64.13, 37.17, 36.35, 36.32)},
    ),
    # Fast AdvProp is for clean accuracy; what else it reports is under corruptions.
    **_rows(
        "tables 1 and 2",
        (),
        {
            "imagenet-rn50-natural-105ep": (76.2,),
            "imagenet-rn101-natural-105ep": (77.8,),
            "imagenet-rn152-natural-105ep": (78.3,),
            "imagenet-rn50-fast-advprop": (76.5,),
            "imagenet-rn101-fast-advprop": (77.8,),
            "imagenet-rn152-fast-advprop": (78.6,),
            "imagenet-rn50-advprop-pgd5-1x": (66.8,),
            "imagenet-rn101-advprop-pgd5-1x": (68.6,),
            "imagenet-rn152-advprop-pgd5-1x": (69.0,),
            "imagenet-rn50-advprop-pgd5": (77.0,),
            "imagenet-rn50-advprop-pgd1": (77.5,),
            "imagenet-rn50-advprop-pgd1-1x": (73.9,),
        },
    ),
    **_rows("table 3", (), {"imagenet-rn50-advprop-decoupled": (76.6,)}),
    **_rows(
        "table 4",
        (),
        {
            "imagenet-rn50-fast-advprop-padv0.11": (76.5,),
            "imagenet-rn50-fast-advprop-padv0.33": (76.0,),
            "imagenet-rn50-fast-advprop-padv0.5": (75.4,),
        },
    ),
    **_rows(
        "table 5",
        (),
        {
            "imagenet-rn50-fast-advprop-neither": (76.20,),
            "imagenet-rn50-fast-advprop-no-sync": (76.27,),
            "imagenet-rn50-fast-advprop-no-rebalance": (76.35,),
        },
    ),
    "coco-retinanet50-natural-2x": Reported("table 7 (COCO-C: AP 17.6)", 35.8),
    "coco-retinanet50-fast-advprop": Reported("table 7 (COCO-C: AP 19.0)", 35.8),
    "cifar10-preact18-gradalign-eps8": Reported(
        "issue 7 of their code (1,000 images)",
        robust={"pgd-50-10": 47.58},
    ),
    "cifar10-preact18-fgsm-rs-30ep": Reported("issue 8 of their code", 83.81, {"pgd-50-10": 46.06}),
    "imagenet-rn50-fgsm-rs-eps2": Reported("their README", 60.90, {"pgd-50-10": 43.46}),
    "imagenet-rn50-fgsm-rs-eps4": Reported("the paper", robust={"pgd-50-10": 30.28}),
    "cifar10-wrn34-yopo-5-3": Reported("the paper", 87.20, {"pgd-20": 47.98}),
    # benchmark_data.json of their code, means of three seeds; the GPU is named nowhere.
    **{
        name: Reported(place, clean, {"pgd-50": pgd, "autoattack": autoattack}, seconds)
        for name, place, clean, pgd, autoattack, seconds in (
            ("fastat-free-4", "their board; delta starts anew", 75.20, 48.83, 44.34, 1979),
            ("fastat-fgsm-rs", "their board", 77.66, 48.27, 43.09, 1902),
            ("fastat-n-fgsm", "their board", 78.59, 53.07, 47.77, 1941),
            ("fastat-gradalign", "their board", 79.39, 52.87, 47.99, 5612),
            ("fastat-pgd", "their board", 82.36, 54.17, 50.49, 7027),
            ("fastat-pgd-plain", "their board", 85.35, 46.31, 44.33, 6954),
        )
    },
}
