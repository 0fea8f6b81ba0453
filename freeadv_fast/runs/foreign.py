"""Weights from elsewhere: files that others wrote, wrappings and prefixes that others use.

Reading runs no code of the file's: `torch.load(weights_only=True)`, safetensors, and a few classes
more that are plain data. What needs more than that is refused by name.
"""

from __future__ import annotations

import argparse
import re
import types
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from freeadv_fast.errors import UserError

# Classes whose making and filling runs nothing but their own few lines: a script's arguments
# (argparse.Namespace in the checkpoints of Free AT, Fast AT and timm) and numpy's numbers (a best
# accuracy). NumPy 1 wrote its own under another name.
PLAIN_CLASSES: list[Any] = [
    argparse.Namespace,
    types.SimpleNamespace,
    np.dtype,
    np._core.multiarray.scalar,  # type: ignore[attr-defined]
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")),
]

# Where weights lie inside a checkpoint, most wanted first: those that were trained before their
# running mean. Ours, MadryLab's and RobustBench's; Lightning's and timm's; others'. GradAlign's
# authors save `last` beside `best`, and RobustBench takes the former.
WRAPPINGS = (
    "model",
    "state_dict",
    "model_state_dict",
    "net",
    "network",
    "weights",
    "module",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "last",
)

# What torch.compile, FSDP and activation checkpoints put into the middle of names.
INSERTED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

# Left out where the network has no place for them: a normaliser's statistics, which are the run's
# own or stand before the network, the second classifiers of googlenet and inception_v3, which we
# build without, and a stage of TRADES' wide networks that no image passes.
SPARE = re.compile(
    r"(normali[sz]er?\.)?(new_)?(mean|std|mu|sigma)$|(AuxLogits|aux1|aux2|sub_block1)\."
)

# How a normaliser's two buffers are called: RobustBench's, MadryLab's, and those of networks that
# subtract them themselves.
STATISTICS = (("mean", "std"), ("new_mean", "new_std"), ("mu", "sigma"))

MAX_NAMED = 3
MAX_TEXT = 200


def read_file(path: Path, origin: str) -> dict[str, Any]:
    """Reads a checkpoint, a state dict or safetensors onto the CPU; nothing in it is executed.

    Args:
        path: An existing file.
        origin: Flag and path to name when it cannot be read.

    Raises:
        UserError: damaged, not a checkpoint, or holding what only running its code can load.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with torch.serialization.safe_globals(PLAIN_CLASSES), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript, which is refused below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen unrelated types for a damaged file
        held = held_code(path, str(error))
        if held:
            raise UserError(
                f"{origin}: holds {held}, which only running its code can load; save the weights "
                "alone where it was made, torch.save(model.state_dict(), FILE)"
            ) from None
        reason = printable(str(error) or type(error).__name__)
        raise UserError(f"{origin}: damaged or not a checkpoint ({reason})") from None
    if not isinstance(state, dict):
        raise UserError(f"{origin}: not a checkpoint but a {type(state).__name__}")
    return state


def held_code(path: Path, complaint: str) -> str:
    """The classes and functions in a file that weights need not hold, by name; empty for none.

    Args:
        path: A file that torch refused to load.
        complaint: What torch said; it names one where the file is of the old format, no zip file.
    """
    try:
        with torch.serialization.safe_globals(PLAIN_CLASSES):
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception as error:  # damaged, of the old format, or TorchScript
        if "torchscript" in str(error).lower():
            return "a TorchScript program"
        names = re.findall(r"GLOBAL (\S+) was not an allowed global", complaint)
    rest = [f"{len(names) - MAX_NAMED} more"] if len(names) > MAX_NAMED else []
    return " and ".join([", ".join(map(printable, names[:MAX_NAMED])), *rest] if names else [])


def printable(text: str) -> str:
    """The first line of a text from a file, without what a terminal would obey."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).strip()
    line = "".join(c if c.isprintable() else "?" for c in text.split("\n", 1)[0])
    return line if len(line) <= MAX_TEXT else line[: MAX_TEXT - 3] + "..."


def find_weights(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint that are a network's, by name; none where it holds none.

    With them comes what a module of the user's own stores beside them (`get_extra_state`).
    """
    for inner in _unwrapped(state):
        weights = {str(key): value for key, value in inner.items() if _is_state(key, value)}
        if weights:
            return weights
    return {}


def _is_state(key: object, value: object) -> bool:
    """Whether an entry is one of a module's state dict."""
    return isinstance(value, Tensor) or str(key).endswith("_extra_state")


def _unwrapped(state: Mapping[Any, Any]) -> Iterator[Mapping[Any, Any]]:
    """What lies in the known wrappings, in any nesting, and last the mapping itself."""
    for name in WRAPPINGS:
        if isinstance(inner := state.get(name), Mapping):
            yield from _unwrapped(inner)
    yield state


def named_as(wanted: Collection[str], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names that a network gives them.

    Whatever stands before the names, ``module.`` of data parallelism, ``model.`` of Lightning,
    ``1.`` of a Sequential with a normaliser, or several of these: it is the prefix with which most
    wanted names are found, the shortest of equals (MadryLab's files hold the network a second time
    in its attacker). What has another prefix is left out.

    Args:
        wanted: The network's names.
        weights: As they were saved.
    """
    for word in INSERTED:
        weights = {key.replace(word, ""): value for key, value in weights.items()}
    found: Counter[str] = Counter()
    for key in weights:
        parts = key.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in wanted:
                found[".".join([*parts[:start], ""])] += 1
    if not found:
        return dict(weights)
    prefix = min(found, key=lambda prefix: (-found[prefix], prefix.count(".")))
    return {key.removeprefix(prefix): w for key, w in weights.items() if key.startswith(prefix)}


class Statistics(NamedTuple):
    """A normaliser found among weights.

    Attributes:
        name: Of its mean there, such as ``normalize.mean``.
        mean: Per channel, as it stands in the file. std: Likewise.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def find_statistics(weights: Mapping[str, Tensor]) -> Statistics | None:
    """The normaliser that stands before the network, the outermost of several; None without.

    Args:
        weights: As they were saved, see `find_weights`.
    """
    found = []
    for key, mean in weights.items():
        place, _, last = key.rpartition(".")
        for mean_name, std_name in STATISTICS:
            std = weights.get(f"{place}.{std_name}".lstrip("."))
            if last == mean_name and std is not None and mean.numel() == std.numel() == 3:
                values = (tuple(part.double().flatten().tolist()) for part in (mean, std))
                found.append(Statistics(key, *values))
    return min(found, key=lambda one: one.name.count("."), default=None)


def first_misfit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """The first tensor that does not fit, and how; empty where all do.

    Args:
        own: The network's state dict.
        weights: What it would take.
    """
    for key, tensor in own.items():
        if key not in weights:
            if key.endswith("num_batches_tracked"):  # files from before torch 0.4.1 have none
                continue
            return f"{key} is missing"
        if _shape(weights[key]) != _shape(tensor):
            return f"{key} is {_shape(weights[key])} there and {_shape(tensor)} here"
    spare = next((key for key in weights if key not in own), None)
    return "" if spare is None else f"{printable(spare)} has no place here"


def _shape(value: Tensor) -> tuple[int, ...]:
    """A tensor's shape; that of a number for a module's extra state, which may be anything."""
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def without_spare(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights without what no network needs: a normaliser's statistics, auxiliary classifiers."""
    return {key: w for key, w in weights.items() if key in own or not SPARE.match(key)}


def other_head(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """The classifier's names where it alone does not fit, because it is for other classes.

    Args:
        own: The network's state dict. weights: What it would take.

    Returns:
        Names of tensors that have another first dimension, all of them the same one, and are
        otherwise alike; none where anything else does not fit either, or everything fits.
    """
    if first_misfit(own, {**weights, **{k: own[k] for k in own.keys() & weights.keys()}}):
        return []
    keys = [k for k in own if k in weights and _shape(own[k]) != _shape(weights[k])]
    widths = {(_shape(own[key])[:1], _shape(weights[key])[:1]) for key in keys}
    is_alike = all(_shape(own[key])[1:] == _shape(weights[key])[1:] for key in keys)
    return keys if len(widths) == 1 and is_alike else []
