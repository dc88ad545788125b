"""What a bake remembers of itself, so that a second one does no work: `.bake.json`.

It is beside what was baked and not a part of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from handler.manifest import STATE


@dataclass
class State:
    """`hashes`: by path, what a file was when it had which sha256. `warmed`: what the caches are of."""

    file: Path
    hashes: dict[str, list[Any]] = field(default_factory=dict)
    warmed: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> State:
        """The state of the bake in `folder`; an empty one if there is none to be read."""
        file = folder / STATE
        try:
            found = json.loads(file.read_bytes())
            return cls(file, dict(found["hashes"]), dict(found["warmed"]))
        except (OSError, ValueError, LookupError, TypeError):
            return cls(file)

    def save(self) -> None:
        """Write it down, whole."""
        draft = self.file.with_suffix(".draft")
        draft.write_text(json.dumps({"hashes": self.hashes, "warmed": self.warmed}, indent=1) + "\n")
        draft.replace(self.file)
