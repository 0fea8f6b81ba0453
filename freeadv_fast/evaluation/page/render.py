"""Values and a template to one HTML file, which replaces none but its own kind."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.page import wording
from freeadv_fast.evaluation.tables import one_line
from freeadv_fast.runs.whole_file import renamed_when_whole

TEMPLATES = Path(__file__).parent / "templates"
# What a page of ours has within its first bytes, by which it may be replaced.
MARK = '<meta name="generator" content="freeadv_fast">'
HEAD_BYTES = 1000


def write(template: str, path: Path, **values: Any) -> None:
    """Writes a page, whole or not at all.

    Args:
        template: A file of templates/.
        path: The page.
        values: What the template draws; all text is escaped.

    Raises:
        UserError: there is a file that is no page of ours.
    """
    refuse_foreign(path)
    text = templates().get_template(template).render(mark=MARK, **values)
    with renamed_when_whole(path) as partial:
        # A folder's name need not be Unicode; what is not is shown as what it is not.
        partial.write_text(text, encoding="utf-8", errors="replace")


@functools.cache
def templates() -> Environment:
    """The templates, and what they can do with values."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for write_out in (wording.percent, wording.count, wording.seconds, wording.size):
        environment.filters[write_out.__name__] = write_out
    environment.filters["plural"] = wording.plural
    environment.filters["one_line"] = lambda value: one_line(str(value))
    return environment


def refuse_foreign(path: Path) -> None:
    """Keeps a file of the user's from being replaced.

    Raises:
        UserError: there is something at the path, and it is no page of ours.
    """
    if path.is_dir():
        raise UserError(f"--output {path}: a folder; name a file, such as comparison.html")
    if not path.exists():
        return
    with path.open("rb") as file:
        if MARK.encode() not in file.read(HEAD_BYTES):
            raise UserError(f"--output {path}: no report of ours, so it stays; name another file")
