"""Configs as YAML files: what a run saves and `--config` replays."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import yaml

from freeadv_fast.config.phases import Phases
from freeadv_fast.config.read import field_types
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.schedule import Schedule
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.errors import UserError

# A run's folder has its config under this name.
CONFIG_NAME = "config.yaml"

# Where a run is and whether it is being continued do not describe the run itself.
NOT_SAVED = ("output_dir", "resume")


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain YAML types, in field order; perturbations, schedules and phases as users write them."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Perturbation | Schedule | Phases):
            value = str(value)
        elif isinstance(value, tuple):
            value = list(value)
        plain[field.name] = value
    return plain


def config_from_dict(plain: dict[str, Any], origin: str = "--config") -> TrainConfig:
    """Rebuilds a config; fields that are missing keep their defaults.

    So does a step of 0, with which earlier versions let an evaluation's attacks stand still.

    Raises:
        UserError: unknown fields, or a value that the config refuses.
    """
    plain = {name: value for name, value in plain.items() if not stands_still(name, value)}
    unknown = sorted(set(plain) - {field.name for field in dataclasses.fields(TrainConfig)})
    if unknown:
        raise UserError(f"{origin}: unknown fields {', '.join(unknown)}")
    hints = field_types()
    for name, value in plain.items():
        if isinstance(value, bool) and {"on", "off"} <= set(typing.get_args(hints[name])):
            plain[name] = "on" if value else "off"  # as YAML reads on and off without quotes
    return TrainConfig(**plain)


def stands_still(name: str, value: Any) -> bool:
    """Whether a saved field is an attack's step of 0."""
    return name == "eval_step" and Perturbation.parse(value).levels == 0


def config_to_yaml(config: TrainConfig) -> str:
    """The text of a config.yaml, so that ``--config PATH`` replays the run."""
    plain = {k: v for k, v in config_to_dict(config).items() if k not in NOT_SAVED}
    return yaml.safe_dump(plain, sort_keys=False)


def load_config(path: Path) -> TrainConfig:
    """Reads a config that a run saved.

    Raises:
        UserError: no such file, not YAML, or not a config of ours.
    """
    return config_from_dict(read_plain(path), f"--config {path}")


def remarks_on(path: Path) -> list[str]:
    """What is no longer read as a saved config says it, a line each.

    Raises:
        UserError: as `load_config`.
    """
    taken = load_config(path)
    if not any(stands_still(name, value) for name, value in read_plain(path).items()):
        return []
    return [f"{path}: eval_step 0 lets attacks stand still; {taken.eval_step} is taken instead"]


def read_plain(path: Path) -> dict[str, Any]:
    """The fields of a saved config as YAML holds them.

    Raises:
        UserError: no such file, not YAML, or no fields.
    """
    try:
        plain = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"--config {path}: not a YAML file") from None
    if not isinstance(plain, dict):
        raise UserError(f"--config {path}: not a saved configuration")
    return plain
