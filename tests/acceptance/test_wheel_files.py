"""The wheel that is built of this repository, and the gateway in it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAYS_WHERE = """
from gateway import page
found = page.Page.open()
print(page.__file__)
print(found.version, *found.files)
"""


def test_the_page_is_in_the_wheel(tmp_path: Path) -> None:
    """Every file of it, and it is found there: the same version as in the repository."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("firsttoken-*.whl")
    tracked = subprocess.run(
        ["git", "ls-files", "gateway/page"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    assert "gateway/page/vendor/uPlot.LICENSE" in tracked
    assert set(tracked) <= set(zipfile.ZipFile(wheel).namelist())

    def opened(path: Path) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", SAYS_WHERE],
            cwd=tmp_path,
            env={"PYTHONPATH": str(path)},
            check=True,
            capture_output=True,
            text=True,
        )
        where, files = done.stdout.splitlines()
        assert where.startswith(f"{path}/")
        return files.split()

    assert opened(wheel) == opened(ROOT)
