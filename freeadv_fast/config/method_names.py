"""The methods by name, and which of them can do what."""

from __future__ import annotations

from typing import Literal, get_args

Method = Literal[
    "natural",
    "free",
    "fgsm",
    "fgsm-rs",
    "n-fgsm",
    "gradalign",
    "elle",
    "pgd",
    "trades",
    "free-trades",
    "yopo",
    "dat",
    "fast-advprop",
    "advprop",
]
METHODS: tuple[Method, ...] = get_args(Method)

# Methods that replay a minibatch, and methods with a second batch-norm branch.
REPLAYING: tuple[Method, ...] = ("natural", "free", "free-trades")
DUAL: tuple[Method, ...] = ("fast-advprop", "advprop")
# Methods whose weights GradAlign can go on with: they make the same L-infinity attacks.
ALIGNABLE: tuple[Method, ...] = ("free", "fgsm", "fgsm-rs", "n-fgsm", "elle", "pgd", "yopo")
WARMING: tuple[Method, ...] = ("fgsm", "fgsm-rs", "n-fgsm", "gradalign", "elle", "pgd")
# Methods that differentiate a gradient.
SECOND_ORDER: tuple[Method, ...] = ("gradalign",)
# Methods whose update adds up the gradients of several passes, forward or backward.
SUMMING: tuple[Method, ...] = (
    "fast-advprop", "advprop", "elle", "trades", "free-trades", "dat", "yopo",
)  # fmt: skip
