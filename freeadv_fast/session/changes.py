"""What a run that goes on may change, and what it may not: its flags, and the number of its ranks.

Nobody has to repeat a run's flags: on the command line its own config is what typed flags are on
top of (`cli.flags`), so that only those differ. In Python every field counts as typed.
"""

from __future__ import annotations

import dataclasses

from freeadv_fast.config.file import config_to_dict
from freeadv_fast.config.method_names import DUAL
from freeadv_fast.config.phases import Phases
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.written import as_typed, as_written
from freeadv_fast.errors import UserError

# What may change. Everything else is in the weights that are there.
BUDGET = ("epochs", "steps", "max_passes")
EVALUATION = ("eval_attacks", "eval_images", "eval_step", "eval_corruptions", "export")
SURROUNDINGS = (
    "data",  # the same images under another path
    "phase_data",
    "unlabelled",
    "workers",
    "max_bad_fraction",
    "graphs",
    "ema",  # an average begins where it is asked for, and training never reads it
    "checkpoint_every",
    "log_every",
)
NOT_COMPARED = ("output_dir", "resume")

# A rank of these has more of its own than can start anew: shares and groups of its minibatch,
# images that it exchanges, the lambda that elle has found on its images.
BOUND_TO_RANKS = (*DUAL, "elle")


def differences(saved: TrainConfig, config: TrainConfig) -> list[str]:
    """The fields in which a config differs from a saved one, in their order.

    ``precision="auto"`` asks for none: a run keeps its own, wherever it goes on.
    """
    before, asked = config_to_dict(saved), config_to_dict(config)
    return [
        name
        for name in before
        if name not in NOT_COMPARED
        and asked[name] != before[name]
        and (name, asked[name]) != ("precision", "auto")
    ]


def changes_for_ranks(
    saved: TrainConfig, config: TrainConfig, made_for: int, num_ranks: int
) -> list[str]:
    """`differences`, without those that follow from the number of ranks.

    Args:
        saved: What the run was made with, on `made_for` ranks.
        config: What is asked for on `num_ranks`: the same minibatch a rank, as a script that knows
            nothing of ranks asks, or the rank's share of the same global minibatch.

    Raises:
        UserError: the run cannot go on with so many ranks.
    """
    shared, asked = for_ranks(saved, made_for, num_ranks), config_to_dict(config)
    follows = {
        name for name in ("batch_size", "phases") if asked[name] == config_to_dict(shared)[name]
    }
    if made_for != num_ranks:  # so that statistics may stay those of as many images
        follows.add("bn_group")
    return [name for name in differences(saved, config) if name not in follows]


def for_ranks(config: TrainConfig, made_for: int, num_ranks: int) -> TrainConfig:
    """The config whose ranks share the same global minibatches as those it was made for.

    Raises:
        UserError: they cannot be shared, or the method does not allow it.
    """
    if made_for == num_ranks:
        return config
    if config.method in BOUND_TO_RANKS:
        raise UserError(
            f"--nproc-per-node {num_ranks}: a run of {config.method} made with {made_for} "
            f"{'ranks' if made_for > 1 else 'rank'} goes on with as many only"
        )

    def share(batch_size: int) -> int:
        whole, rest = divmod(batch_size * made_for, num_ranks)
        if rest or whole < 2:
            raise UserError(
                f"--nproc-per-node {num_ranks}: minibatches of {batch_size * made_for} images "
                f"cannot be dealt out equally among so many ranks; resume it with {made_for}"
            )
        return whole

    phases = (dataclasses.replace(p, batch_size=share(p.batch_size)) for p in config.phases)
    shared = dataclasses.replace(
        config, batch_size=share(config.batch_size), phases=Phases(tuple(phases))
    )
    if shared.num_unlabelled * num_ranks != config.num_unlabelled * made_for:
        raise UserError(
            f"--nproc-per-node {num_ranks}: the {config.num_unlabelled * made_for} unlabelled "
            f"images of a minibatch cannot be dealt out equally; resume it with {made_for}"
        )
    return shared


def refuse_fixed(names: list[str], saved: TrainConfig, config: TrainConfig, folder: object) -> None:
    """Raises UserError for the first difference that a resumed run cannot have."""
    for name in names:
        if name not in BUDGET + EVALUATION + SURROUNDINGS:
            raise UserError(
                f"{as_typed(name, getattr(config, name))}: the run in {folder} was made with "
                f"{as_typed(name, getattr(saved, name))}; resume it with that, or choose another "
                "--output-dir"
            )


def in_words(names: list[str], saved: TrainConfig, config: TrainConfig) -> str:
    """``--epochs 12 (was 8), --workers 1 (was 4)``."""
    return ", ".join(
        f"{as_typed(name, getattr(config, name))} (was {as_written(getattr(saved, name))})"
        for name in names
    )


def with_consequences(names: list[str], saved: TrainConfig, config: TrainConfig) -> str:
    """`in_words` of a run that goes on, and what becomes of the learning rate and the average."""
    text = in_words(names, saved, config)
    if "epochs" in names or "steps" in names:
        text += "; the learning rate follows the new length"
    if "ema" in names:
        is_dropped = config.ema is None
        text += "; the average so far is dropped" if is_dropped else "; the average begins here"
    return text
