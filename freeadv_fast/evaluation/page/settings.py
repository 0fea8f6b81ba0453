"""How a run was set: what differs from its recipe or from other runs, and how to repeat it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from freeadv_fast.config.file import config_to_dict
from freeadv_fast.config.written import as_written
from freeadv_fast.evaluation.page.files import RunFiles
from freeadv_fast.recipes.catalogue import RECIPES

# Fields that change no weight: names, where data and files are, what is written how often.
NOT_CHANGES = frozenset(
    "recipe data phase_data output_dir resume workers checkpoint_every log_every".split()
)


@dataclasses.dataclass(frozen=True)
class Repeat:
    """How to make a run again.

    Attributes:
        command: What was typed; empty where nobody noted it.
        replay: A command that takes the saved config instead.
        facts: What decides whether it comes out bit for bit the same: name and value.
    """

    command: str
    replay: str
    facts: tuple[tuple[str, str], ...]


def repeat(files: RunFiles) -> Repeat:
    """The command of a run, the code, versions and hardware that it ran on."""
    environment, result = files.environment, files.result
    words = [str(word) for word in environment.get("command") or ()]
    script = next((word for word in words if word.endswith(".py")), "")
    replay = ""
    if files.plain and "launch/" in script:
        # Fields that name another script's method are in the config: any training script takes it.
        replay = f"python launch/{Path(script).name} --config config.yaml --output-dir FOLDER"
    git = environment.get("git") or {}
    hardware = environment.get("hardware") or {}
    facts = {
        "Commit": commit(git),
        "Seed": result.get("seed"),
        "Ranks": result.get("ranks"),
        "Precision": result.get("precision"),
        "GPU": gpus(hardware),
        "GPU driver": hardware.get("gpu_driver"),
        "CPU": processor(hardware),
        "Threads": environment.get("threads"),
        "System": environment.get("platform"),
        "Versions": versions(environment.get("versions") or result.get("versions") or {}),
    }
    return Repeat(
        shlex.join(words),
        replay,
        tuple((name, str(value)) for name, value in facts.items() if value not in (None, "")),
    )


def commit(git: Mapping[str, Any]) -> str:
    """A commit, and whether the code was another; empty where it is not known."""
    if not git.get("commit"):
        return ""
    return str(git["commit"]) + (", with changes that are not committed" if git["dirty"] else "")


def gpus(hardware: Mapping[str, Any]) -> str:
    """The GPUs by name, and how many of each."""
    names = [str(name) for name in hardware.get("gpus") or ()]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def processor(hardware: Mapping[str, Any]) -> str:
    """The CPU's name and cores."""
    if not hardware.get("cpu"):
        return ""
    return f"{hardware['cpu']}, {hardware.get('cores')} cores"


def versions(found: Mapping[str, Any]) -> str:
    """Packages and versions in a line, without those that are absent."""
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def changed_from_recipe(files: RunFiles) -> list[tuple[str, str, str]]:
    """What makes a run of its recipe: field, its value, the recipe's.

    What a recipe leaves open or to the machine is no change, and neither is a global minibatch that
    the ranks divide.
    """
    recipe = RECIPES.get(str(files.plain.get("recipe")))
    if recipe is None:
        return []
    usual = config_to_dict(recipe)
    ranks = files.result.get("ranks") or 1
    share = files.plain.get("batch_size", 0) * files.plain.get("accumulate", 1) * ranks
    found = [
        (name, files.plain[name], value)
        for name, value in usual.items()
        if name in files.plain and name not in NOT_CHANGES
        if value not in (None, "auto")
        and files.plain[name] != value
        and not (name in ("batch_size", "accumulate") and share == usual["batch_size"])
    ]
    return [(name, as_text(own), as_text(value)) for name, own, value in found]


def differences(plains: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The fields in which runs differ, with each run's value; a dash where it has none."""
    names = dict.fromkeys(name for plain in plains for name in plain)
    rows = [(name, [as_text(plain.get(name)) for plain in plains]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def as_text(value: object) -> str:
    """A field of config.yaml as text; a dash of none."""
    if value is None:
        return "\N{EN DASH}"
    return as_written(tuple(value) if isinstance(value, list) else value)
