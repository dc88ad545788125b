"""Write the table of docs/gateway.md anew: `python -m scripts.gateway_page`."""

from __future__ import annotations

import re
from pathlib import Path

from gateway.endpoints.file import ROWS
from handler.table import SWITCH

PAGE = Path(__file__).parent.parent / "docs" / "gateway.md"


def fill(page: str) -> str:
    """`page` with the keys of an endpoint as the parser knows them."""
    lines = ["| Key | Default | Allowed | What it is |", "| --- | --- | --- | --- |"]
    for key, row in ROWS.items():
        default = "" if key in {"id", "model"} else f"`{row.default}`" if row.default else "not set"
        allowed = "`true`, `false`" if row.kind is SWITCH else row.kind.allowed
        lines.append(f"| `{key}` | {default} | {allowed} | {row.help} |")
    lines.append("| `settings` | | a table | Of its workers, see below. |")
    return re.sub(
        r"(<!-- endpoint keys -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}\n" + "\n".join(lines) + f"\n\n{match[2]}",
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text()))
