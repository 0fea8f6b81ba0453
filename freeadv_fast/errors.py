"""The one exception that becomes a single line on the user's terminal."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user typed or owns is wrong; the message names the flag and the fix.

    The message is one line and stands alone: `cli.run` prints it after ``error: `` and exits
    with status 2, without a traceback. Python callers catch it as a `ValueError`.
    """
