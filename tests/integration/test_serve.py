"""A gateway that can't start, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.endpoints.file import describe
from gateway.files.store import FilesUnusable
from gateway.serve import serve


async def test_the_first_key_is_shown_though_the_start_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next start makes none, and nobody could know this one."""
    environ = {
        "MODEL_NAME": "org/m",
        "UPSTREAM": "http",
        "UPSTREAM_URL": "http://127.0.0.1:9/v1",
        "PORT": "0",
        "DATA_DIR": str(tmp_path),
    }
    (tmp_path / "files").touch()  # where a folder should be
    with pytest.raises(FilesUnusable):
        await serve(*describe(environ), environ, ())
    assert "key ft-" in capsys.readouterr().out
