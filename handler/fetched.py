"""Models that `python -m builder fetch` has left in the user's cache: where, and what is noted of each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

NOTE = "fetched.json"
"""In a folder that holds the whole model: its name, where it is from, its files.

What is fetched from such a folder gets one of its own.
"""


def models(environ: Mapping[str, str]) -> Path:
    """The folder of the user's cache that holds models: `$XDG_CACHE_HOME` or `~/.cache`, then ours."""
    cache = environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or Path.home()) / ".cache"
    return Path(cache) / "firsttoken" / "models"


def find(name: str, environ: Mapping[str, str]) -> Path | None:
    """The folder of the Hugging Face id `name`, of its main branch, if it was fetched."""
    folder = models(environ) / name.replace("/", "--")
    try:
        note = json.loads((folder / NOTE).read_text())
    except (OSError, ValueError):
        return None
    return folder if isinstance(note, dict) and note.get("model") == name else None
