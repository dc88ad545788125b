"""`builder.seal`: the manifest of what is there, the same bytes for the same files."""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from builder import seal as sealing
from builder.__main__ import run
from builder.console import Console
from builder.seal import seal
from builder.store import MTIME_S, alone
from handler.errors import UsageError
from handler.manifest import NAME, File, Manifest

START: dict[str, dict[str, Any]] = {
    "made_with": {"vllm": "1"},
    "settings": {"dtype": "half"},
    "start": {"total_s": 3.0},
}
NOTE = {"model": "org/name", "source": "https://hub", "commit": "c0ffee", "files": {}}
CONTENTS = {
    "model/config.json": b"{}",
    "model/fetched.json": json.dumps(NOTE).encode(),
    "model/model.safetensors": b"weights",
    "cache/start.json": json.dumps(START).encode(),
    "cache/vllm/kernel.so": b"kernel",
}


class Said(io.TextIOWrapper):
    """A stream that tells when something was said."""

    def __init__(self, to: io.StringIO) -> None:
        super().__init__(io.BytesIO())
        self.to = to
        self.once = threading.Event()

    def write(self, text: str) -> int:
        """Pass it on."""
        written = self.to.write(text)
        self.once.set()
        return written


@pytest.fixture
def bake(tmp_path: Path) -> Path:
    """A folder that was fetched and warmed."""
    return written(tmp_path / "bake")


def written(folder: Path) -> Path:
    """`folder` with `CONTENTS`."""
    for name, data in CONTENTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def sealed(bake: Path, **settings: str) -> tuple[bool, str]:
    """Whether sealing changed something, and what it said."""
    stream = io.StringIO()
    return seal(bake, environ=settings, console=Console(stream, "seal")), stream.getvalue()


def test_every_file_is_in_it(bake: Path) -> None:
    """With where the model is from and what the caches were made with."""
    assert sealed(bake) == (True, f"seal: org/name: 5 files, 180 bytes, sealed in {bake / NAME}\n")
    assert Manifest.load(bake) == Manifest(
        model={"name": "org/name", "source": "https://hub", "commit": "c0ffee"},
        files={name: File(len(data), sha256(data).hexdigest()) for name, data in CONTENTS.items()},
        made_with=START["made_with"],
        settings={"dtype": "half"},
        start=START["start"],
    )


def test_a_name_of_the_user_s_is_the_model_s(bake: Path) -> None:
    """In either spelling; an empty one is none."""
    for settings in ({"SERVED_MODEL_NAME": "mine"}, {"OPENAI_SERVED_MODEL_NAME_OVERRIDE": "mine"}):
        sealed(bake, **settings)
        assert Manifest.load(bake).model["name"] == "mine"
    sealed(bake, SERVED_MODEL_NAME="")
    assert Manifest.load(bake).model["name"] == "org/name"


def test_the_same_files_give_the_same_bytes(bake: Path, tmp_path: Path) -> None:
    """Wherever they are, and whenever they were made."""
    sealed(bake)
    other = written(tmp_path / "elsewhere" / "other")
    sealed(other)
    assert (other / NAME).read_bytes() == (bake / NAME).read_bytes()


def test_a_second_seal_reads_nothing(bake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And writes nothing."""
    sealed(bake)
    before = (bake / NAME).stat().st_mtime_ns
    monkeypatch.setattr(sealing, "sha256", lambda *_: pytest.fail("a file was read again"))
    assert sealed(bake) == (False, "")
    assert (bake / NAME).stat().st_mtime_ns == before


def test_a_file_that_was_changed_is_read_again(bake: Path) -> None:
    """Also if its size and its time are what they were."""
    sealed(bake)
    (bake / "model/model.safetensors").write_bytes(b"wEights")
    os.utime(bake / "model/model.safetensors", (MTIME_S, MTIME_S))
    assert sealed(bake)[0]
    found = Manifest.load(bake).files["model/model.safetensors"]
    assert found.sha256 == sha256(b"wEights").hexdigest()


def test_modes_and_times_are_those_of_every_bake(bake: Path) -> None:
    """So that an image layer of it is the same, and another user can read it."""
    (bake / "model/config.json").chmod(0o600)
    (bake / "cache/vllm").chmod(0o700)
    sealed(bake)
    found = [path for top in ("model", "cache") for path in (bake / top, *(bake / top).rglob("*"))]
    assert {path.stat().st_mtime for path in found} == {MTIME_S}
    assert {path.stat().st_mode & 0o7777 for path in found if path.is_file()} == {0o644}
    assert {path.stat().st_mode & 0o7777 for path in found if path.is_dir()} == {0o755}


def test_without_caches_there_is_nothing_that_made_them(bake: Path) -> None:
    """A model alone may be sealed."""
    shutil.rmtree(bake / "cache")
    sealed(bake)
    manifest = Manifest.load(bake)
    assert (manifest.made_with, manifest.settings, manifest.start) == ({}, {}, {})
    assert set(manifest.files) == {name for name in CONTENTS if name.startswith("model/")}


def test_a_link_is_refused(bake: Path) -> None:
    """What it leads to would not be in an image."""
    (bake / "model/link").symlink_to("/etc/passwd")
    with pytest.raises(UsageError, match=r"model/link is a link"):
        sealed(bake)


def test_what_is_neither_file_nor_folder_is_refused(bake: Path) -> None:
    """Who reads a pipe waits for its writer."""
    os.mkfifo(bake / "model/pipe")
    with pytest.raises(UsageError, match=r"model/pipe is no file"):
        sealed(bake)


def test_a_bake_is_nobody_else_s_to_write_to(bake: Path) -> None:
    """A worker would pass its caches over; whoever could read it still can."""
    bake.chmod(0o2775)
    sealed(bake)
    assert bake.stat().st_mode & 0o7777 == 0o2755


def test_a_second_seal_writes_nothing(bake: Path) -> None:
    """A bake may be read-only by then."""
    sealed(bake)
    before = bake.stat().st_mtime_ns
    assert sealed(bake) == (False, "")
    assert bake.stat().st_mtime_ns == before


def test_two_commands_take_turns_in_a_folder(bake: Path) -> None:
    """Else one removes what the other has just made."""
    with alone(bake, Console(io.StringIO())):
        stream = io.StringIO()
        said = Said(stream)
        waiting = threading.Thread(target=lambda: seal(bake, environ={}, console=Console(said, "seal")))
        waiting.start()
        assert said.once.wait(60)
        assert not (bake / NAME).exists()
    waiting.join(60)
    assert stream.getvalue().splitlines()[0] == "seal: waiting for another command in this folder"
    assert (bake / NAME).exists()


@pytest.mark.parametrize("command", ["seal", "warm"])
def test_a_folder_without_a_model_is_refused(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And is told what comes first."""
    stream = io.StringIO()
    assert run([command, str(tmp_path)], {}, stream) == 64
    assert "has no model: `python -m builder fetch MODEL --out" in stream.getvalue()
    assert capsys.readouterr().out == ""


def test_verify_names_what_is_not_as_baked(bake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On standard output, a line each; the exit code says it too."""
    sealed(bake)
    stream = io.StringIO()
    assert run(["verify", str(bake)], {}, stream) == 0
    assert f"verify: {bake} is what was baked: 5 files, 180 bytes\n" in stream.getvalue()
    assert "a worker here would not use its caches: made with vllm 1" in stream.getvalue()
    (bake / "cache/vllm/kernel.so").write_bytes(b"Kernel")
    assert run(["verify", str(bake), "--quick"], {}, io.StringIO()) == 0
    assert capsys.readouterr().out == ""
    assert run(["verify", str(bake)], {}, stream) == 65
    expected, found = (sha256(data).hexdigest() for data in (b"kernel", b"Kernel"))
    assert capsys.readouterr().out == f"cache/vllm/kernel.so: sha256: expected {expected}, found {found}\n"
    assert stream.getvalue().endswith(f"verify: {bake}: 1 of 5 files, 180 bytes are not as baked\n")


def test_verify_of_what_was_not_baked(tmp_path: Path) -> None:
    """Is not found; a manifest that can't be read is a mismatch."""
    stream = io.StringIO()
    assert run(["verify", str(tmp_path)], {}, stream) == 66
    assert stream.getvalue() == f"verify: {tmp_path} was not baked: there is no manifest.json in it\n"
    (tmp_path / NAME).write_text("{}")
    assert run(["verify", str(tmp_path)], {}, stream) == 65
