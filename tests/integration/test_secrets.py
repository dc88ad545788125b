"""The token gets to the hub and nowhere else: no command line, no file, no log, no error."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import servers
from tests.bake_folder import noise
from tests.hub import Hub, serving
from tests.secrets_watch import holding, watching

CANARY = f"hf_canary{secrets.token_hex(16)}"
MODEL = {"config.json": b"{}", "model.safetensors": noise(1_000_000)}


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub that answers to the token alone."""
    with serving(Hub({"org/private": MODEL}, token=CANARY)) as hub:
        yield hub


def fetch(hub: Hub, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """`python -m builder fetch` of the private model, all that it may write in `folder`."""
    return subprocess.run(
        [sys.executable, "-m", "builder", "fetch", "org/private", "--out", str(folder / "out")],
        cwd=servers.ROOT,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder),
            "HF_ENDPOINT": hub.url,
            **environ,
        },
        capture_output=True,
        text=True,
        check=False,
    )


def test_token_is_seen_by_the_hub_alone(hub: Hub, tmp_path: Path) -> None:
    """While the fetch runs it is on no command line of the machine, afterwards in no file and no log."""
    with watching(CANARY) as watch:
        done = fetch(hub, tmp_path, HF_TOKEN=CANARY)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/config.json").read_bytes() == b"{}"
    assert watch.looks > 10
    assert watch.seen == []
    assert holding(tmp_path, CANARY) == []
    assert CANARY not in done.stdout + done.stderr


@pytest.mark.parametrize("token", [CANARY, f"{CANARY} and more", f"{CANARY}\nx: y"])
def test_token_that_opens_nothing_is_not_quoted(hub: Hub, tmp_path: Path, token: str) -> None:
    """Not even one that no HTTP client would send."""
    hub.token = "another"
    failed = fetch(hub, tmp_path, HF_TOKEN=token)
    assert failed.returncode in {64, 66}
    assert len(failed.stderr.splitlines()) == 1
    assert CANARY not in failed.stdout + failed.stderr
    assert holding(tmp_path, CANARY) == []


def test_command_line_with_the_secret_is_seen() -> None:
    """The watcher sees it while its process runs, whoever's child that is."""
    secret = secrets.token_hex(16)
    waits = "import sys; sys.stdin.read()"
    with watching(secret) as watch:
        child = subprocess.Popen([sys.executable, "-c", waits, secret], stdin=subprocess.PIPE)
        while not watch.seen:
            assert watch.looked.wait(60)
            watch.looked.clear()
        child.communicate()
    assert watch.seen[0] == f"{sys.executable} -c {waits} {secret} "


def test_file_with_the_secret_is_named(tmp_path: Path) -> None:
    """By what is in it, by its name, by what it links to."""
    (tmp_path / "clean").write_text("nothing")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "held").write_bytes(b"\xff before canary after")
    (tmp_path / "canary").touch()
    (tmp_path / "link").symlink_to("/nowhere/canary")
    assert sorted(path.name for path in holding(tmp_path, "canary")) == ["canary", "held", "link"]
