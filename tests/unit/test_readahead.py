"""`handler.readahead`: what a start will read is asked of the disk at once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from handler import pack, readahead


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An environment whose cache folder is empty."""
    return {"XDG_CACHE_HOME": str(tmp_path / "cache")}


def test_what_this_process_has_read_is_recorded_largest_first(environ: dict[str, str]) -> None:
    """Modules count in the form in which they are read, and so do mapped libraries."""
    path = readahead.place(environ)
    readahead.record(path)
    files = readahead.recorded(path)
    assert any("readahead" in Path(file).name for file in files)
    assert any(".so" in file for file in files)
    sizes = [Path(file).stat().st_size for file in files]
    assert sizes == sorted(sizes, reverse=True)


def test_a_list_that_is_there_is_kept(environ: dict[str, str]) -> None:
    """Recording costs a start that has its list nothing."""
    path = readahead.place(environ)
    path.parent.mkdir(parents=True)
    path.write_text("/kept\n")
    readahead.record(path)
    assert readahead.recorded(path) == ["/kept"]


def test_lists_of_two_models_are_two(environ: dict[str, str]) -> None:
    """What one model reads says nothing about another."""
    assert readahead.place(environ) != readahead.place({**environ, "MODEL_NAME": "other"})


def test_weights_are_asked_for_in_load_order(tmp_path: Path) -> None:
    """Shards are numbered; what is no weight file is left to the imports' list."""
    for name in ("model-00002.safetensors", "model-00001.safetensors", "config.json"):
        (tmp_path / name).write_bytes(b"x")
    assert readahead.weights(str(tmp_path)) == [
        str(tmp_path / "model-00001.safetensors"),
        str(tmp_path / "model-00002.safetensors"),
    ]
    assert readahead.weights("organisation/model") == []


def test_a_file_just_written_is_in_memory(tmp_path: Path) -> None:
    """Nothing is asked of the disk for files that the page cache holds."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(1 << 20))
    assert readahead.resident(str(file)) == 1.0
    assert readahead.warm([str(file)])
    assert readahead.advise([str(file)]) == []


def test_files_that_are_gone_are_passed_over(tmp_path: Path) -> None:
    """A package may have been removed since the list was made."""
    for worker in readahead.advise([str(tmp_path / "gone"), sys.executable]):
        worker.join()
    readahead._ask([str(tmp_path / "gone")])


def test_the_lever_can_be_switched_off(tmp_path: Path, environ: dict[str, str]) -> None:
    """For a measurement of what it gives."""
    assert readahead.begin({**environ, "MODEL_NAME": str(tmp_path), "LEVERS_OFF": "readahead"}) == []


def test_modules_that_are_in_one_file_are_not_asked_for(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is, and first: it is what the imports begin with."""
    asked: list[list[str]] = []
    monkeypatch.setattr(readahead, "advise", asked.append)
    listed, modules = readahead.place(environ), pack.place(environ)
    for path in (listed, modules):
        path.parent.mkdir(parents=True)
    listed.write_text("/lib.so\n/module.pyc\n")
    readahead.begin(environ)
    modules.touch()
    readahead.begin(environ)
    readahead.begin({**environ, "LEVERS_OFF": "pack"})
    assert asked == [["/lib.so", "/module.pyc"], [str(modules), "/lib.so"], ["/lib.so", "/module.pyc"]]
