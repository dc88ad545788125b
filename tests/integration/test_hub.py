"""The hub's real client against a stand-in for Hugging Face."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.console import Console
from builder.fetch import fetch
from builder.reach import reachable
from handler.errors import ModelNotFound
from tests.hub import COMMIT, Hub, serving

WEIGHTS = bytes(range(256)) * 4096
FILES = {
    "README.md": b"# A model",
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickle",
    "tokenizer.json": b'{"version": "1.0"}',
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub with one good model and one that is pickled."""
    with serving(Hub({"org/good": FILES, "org/pickled": {"config.json": b"{}", "model.bin": b""}})) as hub:
        yield hub


@pytest.fixture
def console() -> Console:
    """A console that is no terminal."""
    return Console(io.StringIO())


def environ(hub: Hub, tmp_path: Path, **more: str) -> dict[str, str]:
    """The environment of a user with that hub."""
    return {"HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, **more}


def test_needed_files_are_downloaded(hub: Hub, tmp_path: Path, console: Console) -> None:
    """Whole, with a note of the commit, and nothing of the client's own beside them."""
    folder = fetch("org/good", environ=environ(hub, tmp_path), console=console)
    assert folder == tmp_path / "home/.cache/firsttoken/models/org--good"
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    note = json.loads(files.pop("fetched.json").read_text())
    expected = {name: FILES[name] for name in ("config.json", "model.safetensors", "tokenizer.json")}
    assert {name: path.read_bytes() for name, path in files.items()} == expected
    assert note == {
        "model": "org/good",
        "source": hub.url,
        "commit": COMMIT,
        "files": {name: len(body) for name, body in expected.items()},
    }


def test_what_happens_is_said(hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What comes, and where it is; lines and not bars, because this is no terminal."""
    stream = io.StringIO()
    folder = fetch("org/good", environ=environ(hub, tmp_path), console=Console(stream))
    assert stream.getvalue().splitlines() == [
        "fetch: downloading org/good: 3 files, 1 MB",
        f"fetch: org/good is in {folder}",
    ]
    assert capfd.readouterr() == ("", "")


def test_second_fetch_asks_nobody(hub: Hub, tmp_path: Path, console: Console) -> None:
    """The cache answers without a request."""
    first = fetch("org/good", environ=environ(hub, tmp_path), console=console)
    hub.seen.clear()
    assert fetch("org/good", environ=environ(hub, tmp_path), console=console) == first
    assert hub.seen == []


def test_out_is_filled_instead_of_the_cache(hub: Hub, tmp_path: Path, console: Console) -> None:
    """For an image or a volume."""
    out = tmp_path / "baked"
    assert fetch("org/good", environ=environ(hub, tmp_path), console=console, out=out) == out
    assert (out / "model.safetensors").read_bytes() == WEIGHTS
    assert not (tmp_path / "home").exists()


def test_download_goes_on_after_a_break(hub: Hub, tmp_path: Path, console: Console) -> None:
    """A connection that ends in mid-file costs no second download of what had arrived."""
    hub.cut = "model.safetensors"
    folder = fetch("org/good", environ=environ(hub, tmp_path), console=console)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.paths("GET").count(f"/org/good/resolve/{COMMIT}/model.safetensors") == 2


def test_token_opens_a_private_model(hub: Hub, tmp_path: Path, console: Console) -> None:
    """HF_TOKEN comes from the environment that is passed in."""
    hub.token = "hf_secret"
    folder = fetch("org/good", environ=environ(hub, tmp_path, HF_TOKEN="hf_secret"), console=console)
    assert (folder / "config.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("model", "revision", "change", "message"),
    [
        ("org/none", None, {}, "has no such model"),
        ("org/good", None, {"token": "hf_secret"}, "it is private and needs HF_TOKEN"),
        ("org/good", "no-such-branch", {}, "has no revision 'no-such-branch' of it"),
        ("org/pickled", None, {}, r"no \.safetensors files"),
        ("org/good", None, {"failing": 500}, "answered 500"),
    ],
)
def test_what_the_hub_refuses_is_not_found(
    hub: Hub,
    tmp_path: Path,
    console: Console,
    model: str,
    revision: str | None,
    change: dict[str, object],
    message: str,
) -> None:
    """With the reason, and no folder that a later fetch would take for a model."""
    for name, value in change.items():
        setattr(hub, name, value)
    with pytest.raises(ModelNotFound, match=message):
        fetch(model, environ=environ(hub, tmp_path), console=console, revision=revision)
    models = tmp_path / "home/.cache/firsttoken/models"
    assert [path.name for path in models.glob("[!.]*")] == []


def test_server_that_is_away_is_known_to_be(hub: Hub) -> None:
    """Nobody listens, no such scheme, and the one that does answer."""
    assert reachable(hub.url)
    assert not reachable("http://127.0.0.1:9")
    assert not reachable("ftp://127.0.0.1")


def test_hub_that_is_away_is_not_found(tmp_path: Path, console: Console) -> None:
    """At once, where the connection is refused."""
    away = {"HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    with pytest.raises(
        ModelNotFound, match=r"^org/good can't be fetched: http://127.0.0.1:9 can't be reached\.$"
    ):
        fetch("org/good", environ=away, console=console)
