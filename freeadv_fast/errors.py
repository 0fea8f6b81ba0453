"""The one exception that becomes a single line on the user's terminal, and what helps a system."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

# What the user can do where the system refuses to open or write, by the error's number.
_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "choose a file system that holds larger files",
    errno.EROFS: "make the folder writable",
    errno.EACCES: "make the folder writable",
    errno.EIO: "repair or change the disk",
    errno.ESTALE: "mount the folder again",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files (sysctl fs.file-max)",
}


class UserError(ValueError):
    """Something the user typed or owns is wrong; the message names the flag and the fix.

    The message is one line and stands alone: `cli.run` prints it after ``error: `` and exits
    with status 2, without a traceback. Python callers catch it as a `ValueError`.
    """


def remedy(error: OSError) -> str | None:
    """What helps where the system refused; None where the program is to blame, not the system."""
    return _REMEDIES.get(error.errno or 0)


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
