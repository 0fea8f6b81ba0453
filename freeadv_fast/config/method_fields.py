"""Which methods read which fields of a run; a field that is not named here is every method's.

The command line refuses a flag that the chosen method does not read, `--help` hides it, and a sweep
hands it to the methods that do.
"""

from __future__ import annotations

from freeadv_fast.config.method_names import ALIGNABLE, DUAL, METHODS, REPLAYING, WARMING, Method


def all_but(*methods: Method) -> tuple[Method, ...]:
    """The other methods, in their order."""
    return tuple(method for method in METHODS if method not in methods)


# The guard watches those that seek robustness.
_GUARDED = all_but("natural", *DUAL)

READERS: dict[str, tuple[Method, ...]] = {
    "m": REPLAYING,
    "step_size": all_but("natural"),
    "attack_steps": ("pgd", "trades", "yopo", "dat", *DUAL),
    "attack_start": ("pgd", *DUAL),
    # Of free and fast-advprop it is the loss that trains the weights.
    "attack_loss": ("fgsm", "fgsm-rs", "n-fgsm", "pgd"),
    "attack_warmup": WARMING,
    "noise_radius": ("n-fgsm",),
    "reg_lambda": ("gradalign", "elle"),
    "reg_every": ("gradalign",),
    "reg_through": ("gradalign",),
    "reg_adaptive": ("elle",),
    "trades_beta": ("trades", "free-trades"),
    "awp": ("pgd", "trades"),
    "yopo_inner": ("yopo",),
    "dat_attack": ("dat",),
    "dat_mode": ("dat",),
    "dat_clean_weight": ("dat",),
    "dat_unlabelled": ("dat",),
    "norm": ("pgd", "trades"),
    "unlabelled": ("pgd", "trades", "dat"),
    "unlabelled_fraction": ("pgd", "trades", "dat"),
    "accumulate": all_but(*DUAL),
    "p_adv": DUAL,
    "decoupled": ("advprop",),
    "noise_weight": ("fast-advprop",),
    "adv_weight": DUAL,
    "sync_speed": DUAL,
    "shuffle": ("fast-advprop",),
    "mix": ("natural", *DUAL),
    "mix_alpha": ("natural", *DUAL),
    "aux_bn_group": DUAL,
    "guard_every": _GUARDED,
    "guard_images": _GUARDED,
    "on_collapse": _GUARDED,
}

# What a method does that does not read the field. It may be said, for a recipe of another method
# may say something else; any other value is refused, wherever it comes from (`checks`).
NEUTRAL: dict[str, object] = {
    "m": 1,
    "attack_loss": "sum",
    "attack_warmup": 0.0,
    "awp": 0.0,
    "norm": "linf",
    "mix": "none",
    "unlabelled": None,
    "accumulate": 1,
}

# What a run needs to know that may go on as GradAlign.
_GRADALIGN_TERM = ("reg_lambda", "reg_every", "reg_through")


def reads(method: str, name: str, on_collapse: str = "stop") -> bool:
    """Whether a method reads a field, or GradAlign does as which the run may go on.

    Args:
        method: Its name.
        name: The field.
        on_collapse: The run's answer to a collapse.
    """
    if on_collapse == "gradalign" and method in ALIGNABLE and name in _GRADALIGN_TERM:
        return True
    return method in READERS.get(name, METHODS)


def readers_in_words(name: str) -> str:
    """The methods that read a field, or the fewer that do not: ``every method but natural``."""
    readers, others = READERS[name], all_but(*READERS[name])
    if len(others) < len(readers):
        return f"every method but {', '.join(others)}"
    return ", ".join(readers)
