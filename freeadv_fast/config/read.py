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
from collections.abc import Callable
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


@functools.cache
def readers() -> dict[str, Callable[[Any], Any]]:
    """For each field of a run the function that reads what users write in it.

    Kept, for the recipes alone are some 850 configs, and every command makes them.
    """
    return {name: _reader_of(name, hint) for name, hint in field_types().items()}


def _reader_of(name: str, hint: Any) -> Callable[[Any], Any]:
    """What reads a field's value as its type.

    It takes ``8/255``, ``"8/255"`` or ``"every:30"`` as users write them, a tuple as a list or as
    words between commas, a path as a `pathlib.Path`, numpy's numbers; or the type. A value of
    another type is a UserError whose message names the flag.

    Args:
        name: The field.
        hint: Its annotation, evaluated.
    """
    alternatives = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    (kind,) = (kind for kind in alternatives if kind is not type(None))
    by_kind: dict[Any, Callable[[str, Any], Any]] = {
        Perturbation: read_perturbation,
        tuple[str, ...]: read_words,
        bool: read_bool,
        int: read_whole,
        float: read_number,
        str: read_path if name in PATHS else read_text,
    }
    if kind in (Schedule, Phases):
        return lambda value: kind.parse(value if isinstance(value, kind) else str(value))
    if kind not in by_kind:  # one of some words: `checks.check_choices` knows them
        return lambda value: value
    read = functools.partial(by_kind[kind], flag_of(name))
    if type(None) in alternatives:
        return lambda value: None if value is None else read(value)
    return read


def read_perturbation(flag: str, value: Any) -> Perturbation:
    """A distance: as text, as a share of the pixel range, or as itself."""
    if isinstance(value, Perturbation):
        return value
    if isinstance(value, bool) or not isinstance(value, str | numbers.Real):
        raise UserError(f"{flag} {value}: not a perturbation; write it as 4/255")
    return Perturbation.parse(str(value), flag)


def read_text(flag: str, value: Any) -> str:
    """Text, or a path."""
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{flag} {value}: must be text")
    return os.fspath(value)


def read_path(flag: str, value: Any) -> str:
    """A path in the user's home, or anywhere."""
    return os.path.expanduser(read_text(flag, value))


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
