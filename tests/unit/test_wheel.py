"""`builder.wheel` without pip: what it is told."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path
from typing import Any

import pytest

from builder import wheel
from builder.console import Console


def test_pip_is_told_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has what it needs to find its sources."""
    told: dict[str, str] = {}

    def run(line: list[str], *, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        told.update(env)
        (tmp_path / "a.whl").touch()
        return subprocess.CompletedProcess(line, 0, "", "")

    monkeypatch.setattr("subprocess.run", run)
    needed = {"PATH": "/bin", "PIP_INDEX_URL": "https://user:password@index"}
    wheel.download(tmp_path, Console(io.StringIO()), needed | {"HF_TOKEN": "canary"})
    assert told == needed
