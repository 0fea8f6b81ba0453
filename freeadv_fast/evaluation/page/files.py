"""What stands in a run's folder, read as far as it can be read.

Only result.json must be whole: it says that a run is finished. Every other file is one that a user
may have removed, that an older version did not write, or that a full disk cut short; what is wrong
with it is told and the rest of the page stands.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, TypeGuard

from freeadv_fast.config.file import config_from_dict, read_plain
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.errors import UserError
from freeadv_fast.runs.log import RunFolder

AUDIT = "audit.json"
# What `export/config.json` may call the names of the classes.
CLASS_NAMES = ("class_names", "label_names")


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """A finished run's files.

    Attributes:
        folder: Where they are.
        result: What result.json holds.
        plain: Fields of config.yaml as they stand there; empty where it cannot be read.
        config: The same as a config; None where this version does not take it.
        environment: What env.json holds; empty where it cannot be read.
        log: The lines of log.jsonl that can be read, in their order.
        evaluations: What evaluation-*.json hold, by the file's name. robustness: robustness-*.json.
        audit: What audit.json holds; None where there is none.
        classes: Names of the classes, from the export; empty where it does not tell.
        damage: Why a file is left out, by its name.
    """

    folder: RunFolder
    result: dict[str, Any]
    plain: dict[str, Any]
    config: TrainConfig | None
    environment: dict[str, Any]
    log: list[dict[str, Any]]
    evaluations: dict[str, dict[str, Any]]
    robustness: dict[str, dict[str, Any]]
    audit: dict[str, Any] | None
    classes: list[str]
    damage: dict[str, str]

    @property
    def name(self) -> str:
        """The folder's own name, whatever path led to it."""
        return self.folder.root.resolve().name

    @property
    def norm(self) -> str:
        """That of the run's ball."""
        return str(self.plain.get("norm", "linf"))

    @property
    def detection(self) -> dict[str, Any] | None:
        """What a detector came to; None of a classifier."""
        found = self.result.get("detection")
        return found if isinstance(found, dict) else None

    def damaged(self, prefix: str) -> dict[str, str]:
        """Why files are left out whose names begin so."""
        return {name: why for name, why in self.damage.items() if name.startswith(prefix)}


def read_run(run_folder: str | Path) -> RunFiles:
    """Reads a finished run's folder.

    Args:
        run_folder: The run's output folder.

    Raises:
        UserError: no such folder, or no result in it.
    """
    root = Path(run_folder).expanduser()
    folder = RunFolder(root)
    if not folder.result.is_file():
        raise UserError(f"RUN {run_folder}: no finished run; it has no {folder.result.name}")
    damage: dict[str, str] = {}
    result = read_object(folder.result, damage)
    if result is None:
        why = damage[folder.result.name]
        raise UserError(f"RUN {run_folder}: {folder.result.name} cannot be read: {why}")
    plain, config = read_config(folder.config, damage)
    exported = read_object(folder.export / "config.json", {}) or {}
    classes: Any = next((exported[name] for name in CLASS_NAMES if exported.get(name)), [])
    return RunFiles(
        folder=folder,
        result=result,
        plain=plain,
        config=config,
        environment=read_object(folder.environment, damage) or {},
        log=read_readings(folder.log, damage),
        evaluations=read_objects(root, "evaluation-*.json", damage),
        robustness=read_objects(root, "robustness-*.json", damage),
        audit=read_object(root / AUDIT, damage),
        classes=[str(name) for name in classes] if isinstance(classes, list) else [],
        damage=damage,
    )


def read_object(path: Path, damage: dict[str, str]) -> dict[str, Any] | None:
    """A JSON object; None where there is no file, and where it holds something else.

    Args:
        path: The file.
        damage: Takes the reason why a file that is there cannot be read.
    """
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        damage[path.name] = reason(error)
        return None
    if not isinstance(record, dict):
        damage[path.name] = "not a JSON object"
        return None
    return record


def read_objects(root: Path, pattern: str, damage: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The JSON objects of a folder whose names fit a pattern, by name."""
    records = {path.name: read_object(path, damage) for path in sorted(root.glob(pattern))}
    return {name: record for name, record in records.items() if record is not None}


def read_config(path: Path, damage: dict[str, str]) -> tuple[dict[str, Any], TrainConfig | None]:
    """The fields of config.yaml, and the config where this version takes them."""
    if not path.is_file():
        return {}, None
    plain: dict[str, Any] = {}
    try:
        plain = read_plain(path)
        return plain, config_from_dict(plain, path.name)
    except UserError as error:  # not YAML, or a field of another version
        damage[path.name] = str(error)
        return plain, None


def read_readings(path: Path, damage: dict[str, str]) -> list[dict[str, Any]]:
    """The lines of log.jsonl that are JSON objects with a number of passes."""
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        damage[path.name] = reason(error)
        return []
    readings = []
    for line in lines:
        try:
            reading = json.loads(line)
        except ValueError:
            continue
        if isinstance(reading, dict) and is_number(reading.get("passes")):
            readings.append(reading)
    if len(readings) < len(lines):
        damage[path.name] = f"{len(lines) - len(readings):,} of {len(lines):,} lines are no reading"
    return readings


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of a JSON file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def reason(error: Exception) -> str:
    """An error in one line that is short enough to be read."""
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
