"""Names for files and folders that are made from a user's values, and never lead outside."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from pocl_cli.errors import SecurityError

_LONGEST_SLUG = 60


def slugify(text: str) -> str:
    """`text` as a readable name: lower case, only `[a-z0-9.-]`, at most 60 characters, never empty, no dot at its ends.

    "openai-community/GPT2 (1.5B)" gives "openai-community-gpt2-1.5b".
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    plain = re.sub(r"[^a-z0-9.]+", "-", plain)
    plain = re.sub(r"[.-]{2,}", "-", plain)
    return plain.strip(".-")[:_LONGEST_SLUG].strip(".-") or "unnamed"


def confined(folder: Path, name: str) -> Path:
    """The path of `name` (relative, `/` between its parts) below `folder`.

    Raises:
        SecurityError: `name` is empty or absolute, has a part `.` or `..`, a backslash or a control character.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or not name.isprintable() or "\\" in name:
        raise SecurityError(
            f"the file name {name!r} is refused",
            where=str(folder),
            why="a name must lead to a place inside its folder",
            fix="use a plain relative name without '..', backslashes and control characters",
        )
    return folder.joinpath(*parts)
