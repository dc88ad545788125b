"""Text that a terminal only shows: whoever wrote it, somebody's program has perhaps only repeated it."""

from __future__ import annotations

import re

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def plain(text: str) -> str:
    """`text` without what a terminal would obey, but for line breaks and tabs."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)
