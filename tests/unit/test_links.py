"""The links of the docs lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").rglob("*.md"))


def anchors(page: Path) -> Iterator[str]:
    """What GitHub calls the headings of `page`."""
    prose = re.sub(r"(?ms)^ *```.*?^ *```", "", page.read_text())
    for heading in re.findall(r"(?m)^#+ (.*)$", prose):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        yield re.sub(r"[^\w\- ]", "", shown.lower().strip()).replace(" ", "-")


def test_every_link_leads_to_a_file_and_a_heading() -> None:
    """Those that stay in the repository; nobody is asked for the others."""
    lost = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            name, _, anchor = link.partition("#")
            to = page.parent / name if name else page
            if "://" not in link and (not to.exists() or (anchor and anchor not in anchors(to))):
                lost.append(f"{page.relative_to(ROOT)}: {link}")
    assert lost == []
