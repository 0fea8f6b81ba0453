"""Tables of results, for the terminal and in markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def results_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Lays results out as a plain text table.

    Args:
        rows: One mapping a line, column title to value. A float is a fraction and is shown in
            percent; text goes to the left, numbers to the right; a missing value is ``-``.

    Returns:
        Lines joined by newlines, without a last one; empty for no rows.
    """
    titles = list(dict.fromkeys(title for row in rows for title in row))
    if not titles:
        return ""
    columns = []
    for title in titles:
        values = [row.get(title) for row in rows]
        cells = [title, *map(_cell, values)]
        width = max(map(len, cells))
        is_number = not any(isinstance(value, str) for value in values)
        cells = [cell.rjust(width) if is_number else cell.ljust(width) for cell in cells]
        columns.append([cells[0], "-" * width, *cells[1:]])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Lays results out as a markdown table, values as in `results_table`.

    Args:
        rows: One mapping a line, column title to value.

    Returns:
        Lines joined by newlines, without a last one; empty for no rows.
    """
    titles = list(dict.fromkeys(title for row in rows for title in row))
    if not titles:
        return ""
    lines = [titles, ["---"] * len(titles)]
    lines += [[_cell(row.get(title)).replace("|", "\\|") for title in titles] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    """A table's cell as text."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else one_line(str(value))


def one_line(text: str) -> str:
    """A text without line breaks, and without what a terminal or a font would take as an order."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
