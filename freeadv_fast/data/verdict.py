"""Which file of a minibatch stopped the decoder."""

from __future__ import annotations

from PIL import Image

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
            with Image.open(path) as image:
                image.convert("RGB")
        except Exception as reason:
            return undecodable(path, reason)
    return error


def undecodable(path: str, reason: Exception) -> UserError:
    """The one line about a file that cannot be decoded."""
    words = str(reason).strip().splitlines() or [type(reason).__name__]
    return UserError(
        f"--data: {path} cannot be decoded ({words[0]}); repair or remove it, then --resume"
    )
