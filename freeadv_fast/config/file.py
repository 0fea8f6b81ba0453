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

    Raises:
        UserError: unknown fields, or a value that the config refuses.
    """
    plain = dict(plain)
    unknown = sorted(set(plain) - {field.name for field in dataclasses.fields(TrainConfig)})
    if unknown:
        raise UserError(f"{origin}: unknown fields {', '.join(unknown)}")
    hints = field_types()
    for name, value in plain.items():
        if isinstance(value, bool) and {"on", "off"} <= set(typing.get_args(hints[name])):
            plain[name] = "on" if value else "off"  # as YAML reads on and off without quotes
    return TrainConfig(**plain)


def config_to_yaml(config: TrainConfig) -> str:
    """The text of a config.yaml, so that ``--config PATH`` replays the run."""
    plain = {k: v for k, v in config_to_dict(config).items() if k not in NOT_SAVED}
    return yaml.safe_dump(plain, sort_keys=False)


def load_config(path: Path) -> TrainConfig:
    """Reads a config that a run saved.

    Raises:
        UserError: no such file, not YAML, or not a config of ours.
    """
    try:
        plain = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"--config {path}: not a YAML file") from None
    if not isinstance(plain, dict):
        raise UserError(f"--config {path}: not a saved configuration")
    return config_from_dict(plain, f"--config {path}")
