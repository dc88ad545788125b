"""The hub's real client against a stand-in for Hugging Face."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder import hub as hub_client
from builder.console import Console
from builder.fetch import fetch
from builder.reach import reachable
from builder.selection import Choice
from handler.errors import Damaged, ModelNotFound
from tests import servers
from tests.bake_folder import THREE_PARTS_BYTES, noise
from tests.hub import COMMIT, Hub, serving
from tests.until import until

WEIGHTS = bytes(range(256)) * 4096
FILES = {
    "README.md": b"# A model",
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "modeling.py": b"import os",
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
        "revision": None,
        "pickles": [],
        "code": False,
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
        "fetch: not taken, as it is Python code: modeling.py; --trust-remote-code takes it",
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


def test_killed_download_goes_on(hub: Hub, tmp_path: Path, console: Console) -> None:
    """A process that is killed in the middle of a file costs the piece that was on its way, no more."""
    weights = noise(THREE_PARTS_BYTES)
    hub.models = {"org/large": {"config.json": b"{}", "model.safetensors": weights}}
    hub.stall = ("model.safetensors", 20_000_000)
    environment = {"PATH": os.environ["PATH"], **environ(hub, tmp_path)}
    notes = tmp_path / "home/.cache/firsttoken/models/.org--large.partial/.pieces/done/model.safetensors"
    with servers.program("builder", environment, tmp_path, "fetch", "org/large") as (process, _):
        assert hub.stalled.wait(60)
        until(lambda: notes.is_file() and len(notes.read_text().splitlines()) == 3)
        process.kill()
        process.wait()
    hub.stall = None
    hub.ranges.clear()
    folder = fetch("org/large", environ=environ(hub, tmp_path), console=console)
    asked = [part for name, part in hub.ranges if name == "model.safetensors"]
    assert asked == ["16777216-33554431"]  # the other file may have come, or not, before the kill
    assert (folder / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damaged_file_is_downloaded_again(hub: Hub, tmp_path: Path, name: str) -> None:
    """Whether the hub knows its SHA-256 or only what git calls it."""
    hub.wrong = {name: 1}
    stream = io.StringIO()
    folder = fetch("org/good", environ=environ(hub, tmp_path), console=Console(stream))
    assert (folder / name).read_bytes() == FILES[name]
    assert f"fetch: {name}: " in stream.getvalue()
    assert [file for file, _ in hub.ranges].count(name) == 2
    assert len(hub.ranges) == 4


@pytest.mark.parametrize(
    ("name", "before", "algorithm"),
    [("model.safetensors", b"", "sha256"), ("config.json", b"blob 2\0", "sha1")],
)
def test_file_that_stays_damaged_is_an_error(
    hub: Hub, tmp_path: Path, console: Console, name: str, before: bytes, algorithm: str
) -> None:
    """With its name, what was expected and what was found, and no folder that passes for a model."""
    hub.wrong = {name: 2}
    wrong = bytes([FILES[name][0] ^ 1]) + FILES[name][1:]
    expected, found = (hashlib.new(algorithm, before + body).hexdigest() for body in (FILES[name], wrong))
    with pytest.raises(Damaged) as caught:
        fetch("org/good", environ=environ(hub, tmp_path), console=console)
    assert str(caught.value) == (
        f"what arrived is not what was sent: {name}: {algorithm}: expected {expected}, found {found}"
    )
    assert not (tmp_path / "home/.cache/firsttoken/models/org--good").exists()


def test_code_is_taken_on_demand(hub: Hub, tmp_path: Path, console: Console) -> None:
    """A folder without it is not enough then, and one with it not without; the weights stay."""

    def taken(choice: Choice) -> bool:
        folder = fetch("org/good", environ=environ(hub, tmp_path), console=console, choice=choice)
        return (folder / "modeling.py").exists()

    assert [taken(Choice(code=code)) for code in (False, True, True, False)] == [False, True, True, False]
    assert sorted(name for name, _ in hub.ranges) == [
        "config.json",
        "model.safetensors",
        "modeling.py",
        "tokenizer.json",
    ]


def test_pickle_is_taken_by_name_and_with_a_warning(hub: Hub, tmp_path: Path) -> None:
    """Of a model that has nothing else."""
    stream = io.StringIO()
    choice = Choice(pickles=("*.bin",))
    folder = fetch("org/pickled", environ=environ(hub, tmp_path), console=Console(stream), choice=choice)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "fetched.json", "model.bin"]
    warning = "fetch: warning: pickled, so loading it runs the code of whoever made it: model.bin"
    assert warning in stream.getvalue().splitlines()


def test_files_are_alike_whenever_they_were_fetched(hub: Hub, tmp_path: Path, console: Console) -> None:
    """One time and one mode, so that the same weights are the same layer of an image."""
    folder = fetch("org/good", environ=environ(hub, tmp_path), console=console)
    stats = {path.name: path.stat() for path in [folder, *folder.iterdir()]}
    assert {name: stat.st_mtime for name, stat in stats.items()} == dict.fromkeys(stats, 315532800)
    assert {name: oct(stat.st_mode) for name, stat in stats.items()} == {
        name: "0o40755" if name == folder.name else "0o100644" for name in stats
    }


def test_file_lies_where_the_hub_says(hub: Hub, tmp_path: Path, console: Console) -> None:
    """The hub is asked once for each; whoever has the files is not told the token."""
    hub.signed, hub.token = True, "hf_secret"
    fetch("org/good", environ=environ(hub, tmp_path, HF_TOKEN="hf_secret"), console=console)
    remote = hub_client._Remote(
        f"{hub.url}/org/good/resolve/{COMMIT}/model.safetensors",
        {"authorization": "Bearer hf_secret"},
        1 << 20,
    )
    hub.tokens.clear()
    assert b"".join([*remote.read(0, 10), *remote.read(10, 20)]) == WEIGHTS[:20]
    assert hub.tokens == [
        (f"/org/good/resolve/{COMMIT}/model.safetensors", "Bearer hf_secret"),
        ("/signed/org/good/-/model.safetensors", None),
        ("/signed/org/good/-/model.safetensors", None),
    ]


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
