"""Write the tables of docs/settings.md anew: `python -m scripts.settings_page`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from gateway.settings import TABLE as GATEWAY
from handler.flags import ALIASES, REFUSED, SETTINGS
from handler.settings import TABLE as WORKER
from handler.settings import render_markdown
from handler.unread import COMMON, SERVER, WORKER_VLLM

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"


def fill(page: str) -> str:
    """`page` with each table made anew. A table lies between `<!-- name -->` and `<!-- end -->`."""
    tables = {
        "worker": render_markdown(WORKER),
        "gateway": render_markdown(GATEWAY),
        "flags that are settings": _pairs(
            "Flag", "Set", {_option(d): f"`{name}`" for d, name in SETTINGS.items()}
        ),
        "flags that are refused": _pairs("Flag", "Why", {_option(d): why for d, why in REFUSED.items()}),
        "other names": _pairs("worker-vllm", "Here", {old: f"`{new}`" for old, new in ALIASES.items()}),
        "unread of worker-vllm": _pairs("Name", "Why", WORKER_VLLM),
        "unread of the server": _pairs("Name", "Why", SERVER),
        "unread common names": _pairs("Name", "Why", COMMON),
    }
    return re.sub(
        r"(<!-- ([\w -]+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}\n{tables[match[2]]}\n{match[3]}",
        page,
        flags=re.DOTALL,
    )


def _option(dest: str) -> str:
    return f"--{dest.replace('_', '-')}"


def _pairs(left: str, right: str, pairs: Mapping[str, str]) -> str:
    lines = [
        f"| {left} | {right} |",
        "| --- | --- |",
        *(f"| `{key}` | {value} |" for key, value in pairs.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text()))
