"""Which file of a minibatch stopped the decoder."""

from __future__ import annotations

from freeadv_fast.data.pixels import read_rgb
from freeadv_fast.errors import UserError


def name_undecodable(paths: list[str], error: Exception) -> Exception:
    """Decodes a minibatch's files one by one to find the one to blame.

    Args:
        paths: The files.
        error: What the decoder said.

    Returns:
        A UserError that names the first file that PIL cannot decode either; `error` itself when
        there is none, because then the files are not to blame.
    """
    for path in paths:
        try:
            read_rgb(path)
        except Exception as reason:
            return undecodable(path, reason)
    return error


def undecodable(path: str, reason: Exception) -> UserError:
    """The one line about a file that cannot be decoded."""
    return UserError(
        f"--data: {path} cannot be decoded ({first_line(reason)}); repair or remove it, "
        "then --resume"
    )


def first_line(error: Exception) -> str:
    """What an exception says, in one line; its name where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]
