"""`handler.manifest`: what was baked, and whether it is what is there."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest

from handler import manifest
from handler.errors import ManifestMismatch
from handler.manifest import Difference, File, Manifest, differences

CONTENTS = {
    "model/config.json": b"{}",
    "model/model.safetensors": b"weights",
    "cache/vllm/kernel.so": b"kernel",
    "cache/start.json": b"{}",
}


SHA256 = "0" * 64


@pytest.fixture
def bake(tmp_path: Path) -> Path:
    """A folder that was sealed."""
    for name, data in CONTENTS.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    (tmp_path / manifest.NAME).write_bytes(of(CONTENTS).dump())
    return tmp_path


def of(contents: dict[str, bytes]) -> Manifest:
    """The manifest of files."""
    files = {name: File(len(data), digest(data)) for name, data in contents.items()}
    return Manifest(
        {"name": "org/name", "source": "here"}, files, {"vllm": "1"}, {"dtype": "half"}, {"total_s": 3.0}
    )


def digest(data: bytes) -> str:
    """The sha256 of `data`."""
    return sha256(data).hexdigest()


def found(bake: Path, *, full: bool) -> list[Difference]:
    """What differs."""
    return list(differences(bake, Manifest.load(bake), full=full))


def test_what_was_written_is_read(bake: Path) -> None:
    """Every field of it."""
    assert Manifest.load(bake) == of(CONTENTS)


def test_the_order_of_what_is_given_makes_no_difference() -> None:
    """The same files give the same bytes, and the same name."""
    backwards = of(dict(reversed(CONTENTS.items())))
    assert backwards.dump() == of(CONTENTS).dump()
    assert backwards.digest() == of(CONTENTS).digest() != of({}).digest()


def test_nothing_differs(bake: Path) -> None:
    """Neither quickly nor byte by byte."""
    assert found(bake, full=False) == found(bake, full=True) == []


@pytest.mark.parametrize("name", CONTENTS)
def test_a_flipped_byte_is_found_by_name(bake: Path, name: str) -> None:
    """In any file, with what is expected and what is there."""
    data = bytes([CONTENTS[name][0] ^ 1]) + CONTENTS[name][1:]
    (bake / name).write_bytes(data)
    assert found(bake, full=True) == [Difference(name, "sha256", digest(CONTENTS[name]), digest(data))]
    assert bool(found(bake, full=False)) == (name == "model/config.json")  # weights take too long


@pytest.mark.parametrize("full", [False, True])
def test_missing_and_cut_files_are_found_by_name(bake: Path, *, full: bool) -> None:
    """Whatever they are."""
    (bake / "model/model.safetensors").write_bytes(b"w")
    (bake / "cache/vllm/kernel.so").unlink()
    assert list(map(str, found(bake, full=full))) == [
        "cache/vllm/kernel.so: missing: expected 6 bytes, found no such file",
        "model/model.safetensors: size: expected 7 bytes, found 1 bytes",
    ]


MORE = (("model", "safetensors"), ("cache/vllm", "so"))


def test_a_file_too_many_is_found(bake: Path) -> None:
    """vLLM may read it; beside the manifest's folders anything may lie."""
    (bake / "model/more.safetensors").write_bytes(b"")
    (bake / ".bake.json").write_bytes(b"")
    (bake / "cache/vllm/more.so").write_bytes(b"")
    model, cache = ((f"{top}/more.{end}", "not in the manifest") for top, end in MORE)
    assert [(one.path, one.what) for one in found(bake, full=True)] == [cache, model]
    assert [(one.path, one.what) for one in found(bake, full=False)] == [model]  # the cache's is not shown


def test_told_how_far_it_is(bake: Path) -> None:
    """In bytes."""
    told: list[int] = []
    list(differences(bake, Manifest.load(bake), full=True, told=told.append))
    assert sum(told) == sum(map(len, CONTENTS.values()))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 2}, "format 2 is not known"),
        *(
            ({"files": {name: {"size": 1, "sha256": SHA256}}}, "is no file in its folder")
            for name in (
                *("model/../../etc/passwd", "/etc/passwd", "other/file", "model", "model/", "model//a"),
                *("cache/./a", "model/\x1b[2J", "model/a\nb", "model/\0", "model/\ud800", ""),
            )
        ),
        *(
            ({"files": {"model/a": {"size": size, "sha256": digest}}}, "is no manifest")
            for size, digest in (("1", SHA256), (-1, SHA256), (1.0, SHA256), (True, SHA256), (1, 1), (1, "a"))
        ),
        ({"files": []}, "is no manifest"),
        ({"model": None}, "is no manifest"),
        ({"model": {}}, "is no manifest"),
        ({"model": {"name": 1}}, "is no manifest"),
        ({"model": {"name": "\x1b[2J"}}, "is no manifest"),
        ({"model": {"name": "\ud800"}}, "is no manifest"),
        ({"made_with": {"cpu": 1}}, "is no manifest"),
        ({"made_with": {"cpu": [1]}}, "is no manifest"),
        ({"start": {"total_s": "3"}}, "is no manifest"),
        ({"start": {"phases": {}}}, "is no manifest"),
        ({"start": {"total_s": 3, "phases": {"engine": "1"}}}, "is no manifest"),
        ({"start": {"total_s": 3, "kv_cache": {"blocks": None}}}, "is no manifest"),
    ],
)
def test_what_is_no_manifest_is_refused(bake: Path, change: dict[str, object], reason: str) -> None:
    """With the file's name."""
    file = bake / manifest.NAME
    file.write_text(json.dumps(json.loads(file.read_bytes()) | change))
    with pytest.raises(ManifestMismatch, match=reason) as refused:
        Manifest.load(bake)
    assert str(file) in str(refused.value)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b"\xff", b"{}", b"[" * 200_000])
def test_a_damaged_manifest_is_refused(bake: Path, data: bytes) -> None:
    """As a mismatch, not as a traceback."""
    (bake / manifest.NAME).write_bytes(data)
    with pytest.raises(ManifestMismatch, match="is no manifest"):
        Manifest.load(bake)


@pytest.mark.parametrize("to", ["/etc/passwd", "/etc", "nowhere"])
def test_a_link_too_many_is_found(bake: Path, to: str) -> None:
    """vLLM follows it."""
    (bake / "model/link").symlink_to(to)
    assert [(one.path, one.what) for one in found(bake, full=True)] == [("model/link", "not in the manifest")]


@pytest.mark.parametrize("full", [False, True])
def test_a_link_is_no_file_of_a_bake(
    bake: Path, tmp_path_factory: pytest.TempPathFactory, full: bool
) -> None:
    """What it leads to is not in it, though it has the same bytes."""
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "config.json"
    (bake / "model/config.json").replace(elsewhere)
    (bake / "model/config.json").symlink_to(elsewhere)
    assert list(map(str, found(bake, full=full))) == [
        "model/config.json: missing: expected 2 bytes, found a link"
    ]


@pytest.mark.parametrize("name", ["config.json", "params.json"])
def test_a_model_with_a_file_of_that_name_is_no_bake(tmp_path: Path, name: str) -> None:
    """Other programs have manifests too."""
    (tmp_path / manifest.NAME).write_text("{}")
    assert manifest.is_bake(tmp_path)
    (tmp_path / name).write_text("{}")
    assert not manifest.is_bake(tmp_path)
