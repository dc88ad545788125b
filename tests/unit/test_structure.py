"""`handler.structure`: what transformers holds is read once."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from handler import structure

FOUND = {frozenset({"torch"}): {"models.llama.modeling_llama": {"LlamaModel"}}, frozenset(): {}}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder `models` of a package that stands where transformers does, not imported yet."""
    package = tmp_path / "site" / "transformers"
    (package / "utils").mkdir(parents=True)
    (package / "models").mkdir()
    for folder in (package, package / "utils", package / "models"):
        (folder / "__init__.py").touch()
    (package / "utils" / "import_utils.py").write_text(
        "calls = []\n"
        "def define_import_structure(module_path, prefix=None):\n"
        "    calls.append(str(module_path))\n"
        f"    return {FOUND!r}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    return package / "models"


def imported(cache: Path) -> Any:
    """The module of a process that has just started."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        del sys.modules[name]
    structure.keep({"XDG_CACHE_HOME": str(cache)})
    return importlib.import_module(structure.MODULE)


def test_the_second_start_reads_it_from_the_cache(models: Path, tmp_path: Path) -> None:
    """And finds the same."""
    for calls in ([str(models)], []):
        module = imported(tmp_path / "cache")
        assert module.define_import_structure(models, prefix="models") == FOUND
        assert module.calls == calls


def test_other_files_are_read_again(models: Path, tmp_path: Path) -> None:
    """An upgrade writes other files; so does a package that is put beside them."""
    imported(tmp_path / "cache").define_import_structure(models, prefix="models")
    os.utime(models / "__init__.py", ns=(1, 1))
    module = imported(tmp_path / "cache")
    module.define_import_structure(models, prefix="models")
    assert module.calls == [str(models)]


def test_a_cache_that_was_cut_short_is_made_again(models: Path, tmp_path: Path) -> None:
    """As if it were not there."""
    imported(tmp_path / "cache").define_import_structure(models)
    (file,) = (tmp_path / "cache" / "firsttoken" / "transformers").iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    assert imported(tmp_path / "cache").define_import_structure(models) == FOUND


def test_without_a_place_for_it_nothing_is_kept(models: Path, tmp_path: Path) -> None:
    """A file system that can't be written to is no reason not to start."""
    (tmp_path / "cache").write_text("a file")
    assert imported(tmp_path / "cache").define_import_structure(models) == FOUND


def test_smaller_questions_are_not_kept(models: Path, tmp_path: Path) -> None:
    """There are hundreds of them, of a few files each."""
    module = imported(tmp_path / "cache")
    module.define_import_structure(models / "llama")
    assert module.calls == [str(models / "llama")]
    assert not (tmp_path / "cache").exists()


def test_the_folder_of_models_is_kept_by_the_name_of_its_init_too(models: Path, tmp_path: Path) -> None:
    """transformers asks for both, and takes them apart: each answer has its own file."""
    init = models / "__init__.py"
    for calls in ([str(models), str(init)], []):
        module = imported(tmp_path / "cache")
        assert module.define_import_structure(models, prefix="models") == FOUND
        assert module.define_import_structure(str(init)) == FOUND
        assert module.calls == calls
    assert len(list((tmp_path / "cache" / "firsttoken" / "transformers").iterdir())) == 2
