"""A field as its users write it: the way back from `read`."""

from __future__ import annotations

from freeadv_fast.config.read import flag_of


def as_written(value: object) -> str:
    """A value as it is typed behind its flag: 4/255, every:30, pgd-10,pgd-50, 0.05, 30."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def as_typed(name: str, value: object) -> str:
    """A field with its value: ``--eps 4/255``, ``--no-shuffle``."""
    if isinstance(value, bool):
        return flag_of(name if value else f"no_{name}")
    return f"{flag_of(name)} {as_written(value)}"
