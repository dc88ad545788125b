"""`handler.baked`: how a start finds what was baked."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

import pytest

from handler import baked, kept, manifest
from handler.errors import ManifestMismatch
from handler.manifest import File, Manifest

CONTENTS = {
    "model/config.json": b"{}",
    "cache/firsttoken/generated/a.marshal": b"",
    "cache/vllm/modelinfos/a.json": b"{}",
}
KEPT = b"what a start has found out"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of the process."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def bake(tmp_path: Path) -> Path:
    """A bake whose caches fit this machine."""
    folder = tmp_path / "bake"
    for name, data in CONTENTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    kept.write(folder / "cache/firsttoken/generated/a.marshal", KEPT)
    sealed(folder, baked.made_with())
    return folder


def sealed(folder: Path, made_with: dict[str, object]) -> Manifest:
    """The manifest of what is in `folder`, made with something."""
    files = {
        name: File((folder / name).stat().st_size, sha256((folder / name).read_bytes()).hexdigest())
        for name in CONTENTS
    }
    written = Manifest({"name": "org/name"}, files, made_with, {"dtype": "half"}, {"total_s": 3.5})
    (folder / manifest.NAME).write_bytes(written.dump())
    return written


@pytest.mark.parametrize("part", ["", "model"])
def test_its_name_is_what_clients_call_it(bake: Path, part: str) -> None:
    """Not the folder's; and vLLM reads the model in it."""
    environ = {"MODEL_NAME": str(bake / part)}
    assert baked.names(environ) == {"MODEL_NAME": str(bake / "model"), "SERVED_MODEL_NAME": "org/name"}


@pytest.mark.parametrize("name", ["SERVED_MODEL_NAME", "OPENAI_SERVED_MODEL_NAME_OVERRIDE"])
def test_a_name_of_the_user_s_stays(bake: Path, name: str) -> None:
    """In either spelling."""
    assert baked.names({"MODEL_NAME": str(bake), name: "mine"}) == {"MODEL_NAME": str(bake / "model")}


@pytest.mark.parametrize("model", ["", "org/name", "/nowhere", "gs://bucket/prefix"])
def test_what_was_not_baked_is_left_alone(model: str) -> None:
    """Nothing is added."""
    environ = {"MODEL_NAME": model}
    baked.adopt(environ)
    assert environ == {"MODEL_NAME": model}
    baked.check(model, {})


def test_caches_are_shown_in_the_temporary_folder(bake: Path, temporary: Path) -> None:
    """By links, under the names that vLLM, torch and we look for; ours are trusted through the link."""
    environ = {"MODEL_NAME": str(bake), "HOME": "/home/user"}
    baked.adopt(environ)
    shown = Path(environ["XDG_CACHE_HOME"])
    assert shown.parent == temporary / f"firsttoken-{os.geteuid()}"
    assert (shown / "vllm/modelinfos/a.json").readlink() == bake / "cache/vllm/modelinfos/a.json"
    assert kept.read(kept.folder(environ, "generated") / "a.marshal") == KEPT
    assert environ["TRITON_CACHE_DIR"] == str(shown / "triton")
    assert environ["HF_HOME"].endswith("/.cache/huggingface")
    assert not any(path.stat().st_mode & 0o077 for path in (shown.parent, shown, shown / "vllm"))


def test_a_file_too_many_in_the_cache_is_not_shown(bake: Path) -> None:
    """What nobody has sealed is not run."""
    (bake / "cache/vllm/modelinfos/b.json").write_text("{}")
    environ = {"MODEL_NAME": str(bake)}
    baked.adopt(environ)
    shown = Path(environ["XDG_CACHE_HOME"]) / "vllm/modelinfos"
    assert [path.name for path in shown.iterdir()] == ["a.json"]


def test_adopting_twice_is_adopting_once(bake: Path) -> None:
    """A warm parent has, and so does its worker; what was written meanwhile stays."""
    environ = {"MODEL_NAME": str(bake)}
    baked.adopt(environ)
    once = dict(environ)
    file = kept.folder(environ, "generated") / "a.marshal"
    kept.write(file, b"newer")
    baked.adopt(environ)
    assert environ == once
    assert kept.read(file) == b"newer"


def test_nothing_is_written_to_the_bake(bake: Path) -> None:
    """What a start writes takes the place of the link."""
    environ = {"MODEL_NAME": str(bake)}
    baked.adopt(environ)
    kept.write(kept.folder(environ, "generated") / "a.marshal", b"newer")
    kept.write(kept.folder(environ, "modules") / "b.pack", b"new")
    baked.check(str(bake), {}, full=True)


def test_what_the_user_has_set_stays(bake: Path) -> None:
    """A cache that somebody has named is theirs."""
    environ = {"MODEL_NAME": str(bake), "TRITON_CACHE_DIR": "/mine", "HF_HOME": "/hub"}
    baked.adopt(environ)
    assert (environ["TRITON_CACHE_DIR"], environ["HF_HOME"]) == ("/mine", "/hub")


@pytest.mark.parametrize("name", ["vllm", "torch", "python", "machine", "gpu"])
def test_caches_of_another_version_or_machine_are_passed_over(
    bake: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """With a warning that says which; the model is served all the same."""
    sealed(bake, baked.made_with() | {name: "another"})
    environ = {"MODEL_NAME": str(bake)}
    baked.adopt(environ)
    assert environ == {"MODEL_NAME": str(bake / "model"), "SERVED_MODEL_NAME": "org/name"}
    baked.check(environ["MODEL_NAME"], environ)
    (record,) = caplog.records
    assert record.message == "the caches of the bake are not used"
    assert f"made with {name} another, here is" in vars(record)["reason"]


def test_a_processor_that_lacks_instructions_gets_no_code_for_them(bake: Path) -> None:
    """It would be killed; one that has more is fine."""
    here = baked.made_with()
    assert list(baked.misfits(bake, sealed(bake, here | {"cpu": [*here["cpu"], "avx9"]}))) == [
        "made for a processor with avx9"
    ]
    assert not list(baked.misfits(bake, sealed(bake, here | {"cpu": here["cpu"][1:]})))


@pytest.mark.parametrize("path", ["", "cache", "cache/vllm", "cache/vllm/modelinfos/a.json"])
def test_caches_that_others_can_write_to_are_passed_over(bake: Path, path: str) -> None:
    """What is in them would run here."""
    (bake / path).chmod(0o777)
    assert list(baked.misfits(bake, Manifest.load(bake))) == [
        f"{bake / path} can be written to by another user, and what is in it would run here"
    ]


def test_a_folder_that_somebody_else_has_made_is_not_used(
    bake: Path, temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a temporary folder anybody may have; the start goes on without, and says so."""
    (temporary / f"firsttoken-{os.geteuid()}").mkdir(mode=0o777)
    (temporary / f"firsttoken-{os.geteuid()}").chmod(0o777)
    environ = {"MODEL_NAME": str(bake)}
    baked.adopt(environ)
    assert "XDG_CACHE_HOME" not in environ
    baked.check(str(bake), environ)
    (record,) = caplog.records
    assert record.message == "the caches of the bake are not used"
    assert "could be written to by another user" in vars(record)["reason"]


def test_nothing_is_said_of_caches_that_are_shown(bake: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A start uses them."""
    environ = {"MODEL_NAME": str(bake)}
    baked.adopt(environ)
    baked.check(environ["MODEL_NAME"], environ)
    assert not caplog.records


def test_a_start_without_a_temporary_folder_says_so(
    bake: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And goes on without the caches."""

    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", none)
    environ = {"MODEL_NAME": str(bake)}
    baked.adopt(environ)
    baked.check(environ["MODEL_NAME"], environ)
    assert [vars(record)["reason"] for record in caplog.records] == [
        "there is no temporary folder to show them in: No usable temporary directory found"
    ]


def test_a_bake_that_was_moved_is_shown_where_it_is(bake: Path) -> None:
    """Not where it was: the links there lead nowhere, or to what somebody else has put there since."""
    before = {"MODEL_NAME": str(bake)}
    baked.adopt(before)
    moved = bake.rename(bake.with_name("moved"))
    environ = {"MODEL_NAME": str(moved)}
    baked.adopt(environ)
    shown = Path(environ["XDG_CACHE_HOME"])
    assert (shown / "vllm/modelinfos/a.json").readlink() == moved / "cache/vllm/modelinfos/a.json"
    assert kept.read(kept.folder(environ, "generated") / "a.marshal") == KEPT


def test_a_bake_behind_a_link_is_shown_where_it_is(bake: Path) -> None:
    """Also once the link leads elsewhere."""
    link = bake.with_name("link")
    link.symlink_to(bake)
    environ = {"MODEL_NAME": str(link)}
    baked.adopt(environ)
    shown = Path(environ["XDG_CACHE_HOME"])
    assert (shown / "vllm/modelinfos/a.json").readlink() == bake / "cache/vllm/modelinfos/a.json"


def test_a_bake_in_the_home_folder(bake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MODEL_NAME may begin with ~, as that of any folder."""
    monkeypatch.setenv("HOME", str(bake.parent))
    assert baked.names({"MODEL_NAME": "~/bake"})["MODEL_NAME"] == str(bake / "model")


@pytest.mark.parametrize("model", ["", "model"])
def test_a_bake_that_is_not_what_was_baked_is_refused_by_name(bake: Path, model: str) -> None:
    """Which file, what was expected, what was found."""
    (bake / "model/config.json").write_bytes(b"{ }")
    with pytest.raises(ManifestMismatch) as refused:
        baked.check(str(bake / model), {})
    assert str(refused.value).splitlines()[1:] == [
        "  - model/config.json: size: expected 2 bytes, found 3 bytes"
    ]


def test_weights_are_read_as_a_whole_if_asked(bake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VERIFY_WEIGHTS=full; it takes a second for each GB."""
    monkeypatch.setitem(CONTENTS, "model/model.safetensors", b"weights")
    (bake / "model/model.safetensors").write_bytes(b"weights")
    sealed(bake, {})
    (bake / "model/model.safetensors").write_bytes(b"wEights")
    baked.check(str(bake), {})
    with pytest.raises(ManifestMismatch, match=r"model\.safetensors: sha256"):
        baked.check(str(bake), {}, full=True)


def test_many_differences_are_told_in_short() -> None:
    """The command that lists them is named."""
    different = [manifest.Difference(str(number), "size", "1", "2") for number in range(12)]
    lines = baked.told(Path("/bake"), different).splitlines()
    assert len(lines) == 12
    assert lines[-1] == "  - and 2 more; `python -m builder verify /bake` lists them"


def test_settings_that_are_not_as_at_the_bake_are_named(bake: Path) -> None:
    """A cache that depends on one is made again."""
    assert list(baked.unlike(str(bake), {"dtype": "half"})) == []
    assert list(baked.unlike(str(bake), {"max_model_len": "8"})) == [
        "dtype: caches were made with 'half', this start has None",
        "max_model_len: caches were made with None, this start has '8'",
    ]


def test_how_long_it_took_when_it_was_baked(bake: Path) -> None:
    """For who compares."""
    assert baked.expected_s(str(bake)) == 3.5
    assert baked.expected_s("org/name") is None
