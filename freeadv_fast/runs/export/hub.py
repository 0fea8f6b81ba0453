"""The Hugging Face Hub: an export is uploaded as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from freeadv_fast.errors import UserError
from freeadv_fast.runs.export.trained import NEW_CARD
from freeadv_fast.runs.foreign import printable

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def check_repository(name: str) -> Any:
    """Refuses what cannot be uploaded to, before anything is made for it.

    Args:
        name: ``OWNER/NAME``.

    Returns:
        The package huggingface_hub.

    Raises:
        UserError: the package or a token is missing, or the name is none.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            "--push-to-hub: huggingface_hub is not installed; pip install huggingface_hub"
        ) from None
    if NAME.fullmatch(name) is None:
        raise UserError(f"--push-to-hub {name}: write OWNER/NAME")
    if huggingface_hub.get_token() is None:
        raise UserError("--push-to-hub: no token; log in with `hf auth login`, or set HF_TOKEN")
    return huggingface_hub


def push(folder: Path, name: str) -> str:
    """Makes the repository if it is missing, and uploads a folder in one commit.

    The token is huggingface_hub's: HF_TOKEN, or what ``hf auth login`` has left.

    Args:
        folder: An export.
        name: ``OWNER/NAME``; public where it is made.

    Returns:
        Where it is.

    Raises:
        UserError: no token, no network, no permission, or whatever else the Hub says, in a line.
    """
    hub = check_repository(name)
    api = hub.HfApi(library_name="freeadv_fast")
    try:
        api.create_repo(name, repo_type="model", exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="Upload by freeadv_fast",
            ignore_patterns=["*.partial", NEW_CARD],
        )
    except Exception as error:  # of the Hub, of its HTTP client, of the system
        reason = printable(str(error) or type(error).__name__)
        raise UserError(f"--push-to-hub {name}: not uploaded ({reason})") from None
    return f"https://huggingface.co/{name}"
