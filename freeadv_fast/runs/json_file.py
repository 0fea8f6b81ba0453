"""JSON objects as files, for whoever needs nothing else of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from freeadv_fast.runs.whole_file import renamed_when_whole


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    with renamed_when_whole(path) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record
