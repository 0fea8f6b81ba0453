"""What a Python user or a YAML file may write in a field, read into the field's type.

The command line reads its words in the same way: `Perturbation.parse`, `Schedule.parse` and
`Phases.parse` are the only readers of theirs.
"""

from __future__ import annotations

import functools
import numbers
import os
import types
import typing
from typing import Any

from freeadv_fast.config.fields import RunFields
from freeadv_fast.config.phases import Phases
from freeadv_fast.config.schedule import Schedule
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.errors import UserError

# Fields whose ~ is the user's home: a shell leaves that of --output-dir=~/x as it is.
PATHS = ("output_dir", "init_from")


@functools.cache
def field_types() -> dict[str, Any]:
    """The annotations of a run's fields, evaluated."""
    return typing.get_type_hints(RunFields)


def flag_of(name: str) -> str:
    """The flag that sets a field: ``--batch-size`` for ``batch_size``."""
    return "--" + name.replace("_", "-")


def read_value(name: str, hint: Any, value: Any) -> Any:
    """A field's value as its type.

    Args:
        name: The field, for the message.
        hint: Its annotation, evaluated.
        value: ``8/255``, ``"8/255"`` or ``"every:30"`` as users write them, a tuple as a list or
            as words between commas, a path as a `pathlib.Path`, numpy's numbers; or the type.

    Raises:
        UserError: a value of another type; the message names the flag.
    """
    alternatives = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in alternatives:
        return None
    (kind,) = (kind for kind in alternatives if kind is not type(None))
    flag = flag_of(name)
    if kind is Perturbation:
        if isinstance(value, bool) or not isinstance(value, str | numbers.Real | Perturbation):
            raise UserError(f"{flag} {value}: not a perturbation; write it as 4/255")
        return Perturbation.parse(value if isinstance(value, Perturbation) else str(value), flag)
    if kind in (Schedule, Phases):
        return kind.parse(value if isinstance(value, kind) else str(value))
    if kind == tuple[str, ...]:
        return read_words(flag, value)
    if kind is bool:
        return read_bool(flag, value)
    if kind is int:
        return read_whole(flag, value)
    if kind is float:
        return read_number(flag, value)
    if kind is str:
        if not isinstance(value, str | os.PathLike):
            raise UserError(f"{flag} {value}: must be text")
        path = os.fspath(value)
        return os.path.expanduser(path) if name in PATHS else path
    return value  # one of some words: `checks.check_choices` knows them


def read_words(flag: str, value: Any) -> tuple[str, ...]:
    """Words, as a list or between commas."""
    if isinstance(value, str):
        return tuple(value.split(","))
    if not isinstance(value, list | tuple):
        raise UserError(f"{flag} {value}: must be words, such as pgd-10,pgd-50")
    return tuple(str(word) for word in value)


def read_bool(flag: str, value: Any) -> bool:
    """True or False; numbers and words are neither."""
    if not isinstance(value, bool):
        raise UserError(f"{flag} {value}: must be true or false")
    return value


def read_whole(flag: str, value: Any) -> int:
    """A whole number; 4.0 is none, for who writes it may have meant 4.5."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise UserError(f"{flag} {value}: must be a whole number" + instead(value, int))
    return int(value)


def read_number(flag: str, value: Any) -> float:
    """A number; a whole one stays whole, so that it is saved as it was written."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UserError(f"{flag} {value}: must be a number" + instead(value, float))
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def instead(value: Any, kind: type) -> str:
    """What to write instead, where that can be told; YAML takes 1e-2 for text."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return ""
    if isinstance(value, bool) or (kind is int and not number.is_integer()):
        return ""
    return f"; write {kind(number)!r}" + (" without quotes" if isinstance(value, str) else "")
