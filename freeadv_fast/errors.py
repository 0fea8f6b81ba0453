"""The one exception that becomes a single line on the user's terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """Something the user typed or owns is wrong; the message names the flag and the fix.

    The message is one line and stands alone: `cli.run` prints it after ``error: `` and exits
    with status 2, without a traceback. Python callers catch it as a `ValueError`.
    """


@contextlib.contextmanager
def blaming(flag: str | None) -> Iterator[None]:
    """Puts the flag that the user typed before a complaint about what it set.

    Args:
        flag: Such as ``--phases 0-6:128:512``; None where nothing needs to be added.

    Raises:
        UserError: the one that was raised within the block, its line lengthened.
    """
    try:
        yield
    except UserError as error:
        raise error if flag is None else UserError(f"{flag}: {error}") from None
