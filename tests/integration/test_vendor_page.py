"""What the page takes from others, against npm; skipped, and said so, where there is none."""

from __future__ import annotations

import shutil

import pytest

from scripts import vendor_page


def test_vendored_files_are_what_npm_has() -> None:
    """npm refuses what has another hash than the lock's; what it has is what lies in vendor/, to the byte."""
    if not shutil.which("npm"):
        pytest.skip("this lane did not run: npm is missing (Debian: apt-get install npm)")
    assert vendor_page.main(["--check"]) == 0
