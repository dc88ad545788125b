"""`handler.pack`: the next start has its modules from one file, and finds the same as without."""

from __future__ import annotations

import compileall
import importlib
import importlib.resources
import importlib.util
import inspect
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

from handler import kept, pack

TOP = "packed"
NAMES = (TOP, f"{TOP}.one", f"{TOP}.inner", f"{TOP}.inner.two", f"{TOP}.inner.three")
A_MINUTE_AGO_S = int(time.time()) - 60
TAKEN = {f"{TOP}.one", f"{TOP}.inner", f"{TOP}.inner.two", f"{TOP}.inner.three"}
ATTRIBUTES = ("__name__", "__file__", "__cached__", "__path__", "__package__", "__doc__")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a package of five modules, written a minute ago."""
    site = tmp_path / "site"
    for name in NAMES:
        folder = site / name.replace(".", "/")
        inner = name in {TOP, f"{TOP}.inner"}
        file = folder / "__init__.py" if inner else folder.with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f'"""{name}"""\n\n\ndef said():\n    return "{name} said"\n')
    (site / TOP / "inner" / "data.txt").write_text("data")
    age(site)
    monkeypatch.setattr(pack, "WORTH_MODULES", 2)
    return site


def age(site: Path) -> None:
    """Have all in `site` be a minute old, and compiled, as pip leaves it."""
    for file in site.rglob("*.py"):
        os.utime(file, (A_MINUTE_AGO_S, A_MINUTE_AGO_S))
    compileall.compile_dir(site, quiet=1, force=True)  # it looks at times and not at sizes
    for folder in site.rglob("*/"):
        os.utime(folder, (A_MINUTE_AGO_S, A_MINUTE_AGO_S))


@contextmanager
def imported_anew(site: Path) -> Iterator[dict[str, ModuleType]]:
    """The modules as a new process imports them, without the finders of the tests."""
    before = list(sys.path), list(sys.meta_path)
    sys.path.insert(0, str(site))
    sys.meta_path[:] = [finder for finder in sys.meta_path if isinstance(finder, (type, pack.Pack))]
    importlib.invalidate_caches()
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path[:], sys.meta_path[:] = before
        for name in [name for name in sys.modules if name.partition(".")[0] == TOP]:
            del sys.modules[name]


def start(site: Path, file: Path) -> set[str]:
    """Start once: which modules were taken from `file`, which is there afterwards."""
    modules = pack.Pack(file, time.time())
    modules.begin()
    try:
        with imported_anew(site) as found:
            for name, module in found.items():
                assert module.said() == f"{name} said"
            taken = set(modules._taken)
            modules.end()
            modules.save()
            return taken
    finally:
        modules.end()


@pytest.fixture
def file(site: Path, tmp_path: Path) -> Path:
    """The pack of a start."""
    file = pack.place({"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert start(site, file) == set()
    return file


def test_the_second_start_takes_what_is_in_packages(site: Path, file: Path) -> None:
    """And writes nothing."""
    before = file.stat()
    assert start(site, file) == TAKEN
    assert file.stat() == before
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_taken_module_is_as_python_makes_it(site: Path, file: Path) -> None:
    """Its attributes, its loader, its source, its data and the file of its code."""
    with imported_anew(site) as modules:
        plain = {name: [getattr(module, at, None) for at in ATTRIBUTES] for name, module in modules.items()}
        specs = {name: module.__spec__ for name, module in modules.items()}
    packed = pack.Pack(file, time.time())
    packed.begin()
    try:
        with imported_anew(site) as modules:
            assert packed._taken == TAKEN
            for name, module in modules.items():
                assert [getattr(module, at, None) for at in ATTRIBUTES] == plain[name]
                assert module.__spec__ == specs[name]
                assert module.__spec__ is not None
                assert module.__spec__.has_location
                assert module.__spec__.cached == module.__cached__
                assert type(module.__loader__) is SourceFileLoader
                assert set(vars(module.__loader__)) == {"name", "path"}
                assert module.said.__code__.co_filename == module.__file__
                assert inspect.getsource(module.said).startswith("def said")
            data = importlib.resources.files(f"{TOP}.inner") / "data.txt"
            assert data.read_text() == "data"
            assert importlib.util.find_spec(f"{TOP}.inner.none") is None
    finally:
        packed.end()


def test_a_module_that_was_written_anew_is_read(site: Path, file: Path) -> None:
    """In place, so that its folder is as it was; the others are taken."""
    changed = site / TOP / "inner" / "two.py"
    changed.write_text(changed.read_text().replace('return "', 'return "" + "'))
    assert start(site, file) == TAKEN - {f"{TOP}.inner.two"}


def test_a_folder_that_was_written_to_is_looked_into(site: Path, file: Path) -> None:
    """A new file there may stand before one that is taken: here a package before a module."""
    (site / TOP / "inner" / "two").mkdir()
    (site / TOP / "inner" / "two" / "__init__.py").write_text(
        f'def said():\n    return "{TOP}.inner.two" + " said"\n'
    )
    with imported_anew(site) as modules:
        assert str(modules[f"{TOP}.inner.two"].__file__).endswith("two/__init__.py")
    assert start(site, file) == {f"{TOP}.one"}


def test_a_package_elsewhere_is_not_taken(site: Path, file: Path) -> None:
    """Where Python's path leads to another one."""
    shutil.copytree(site, site.with_name("other"))
    assert start(site.with_name("other"), file) == set()


def test_what_was_written_just_now_is_not_kept(site: Path, file: Path) -> None:
    """It could be written once more in the same second, and look the same."""
    file.unlink()
    for path in (site / TOP / "one.py", site / TOP / "inner"):
        os.utime(path)
    start(site, file)
    assert start(site, file) == set()


def test_what_was_changed_is_kept_anew(site: Path, file: Path) -> None:
    """With what is still true of the last file."""
    for name in ("two.py", "three.py"):
        path = site / TOP / "inner" / name
        path.write_text(path.read_text() + "\n# longer\n")
    age(site)
    assert start(site, file) == {f"{TOP}.one", f"{TOP}.inner"}
    assert start(site, file) == TAKEN


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "empty": lambda file: file.write_bytes(b""),
    "another index": lambda file: file.write_bytes(file.read_bytes()[:-1] + b"?"),
    "others can write": lambda file: file.chmod(0o646),
    "a folder": lambda file: Path.mkdir(file.rename(file.with_suffix(".moved")).with_suffix(".pack")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_file_that_is_not_to_be_trusted_is_not_read(
    site: Path, file: Path, damage: Callable[[Path], object]
) -> None:
    """The start is one without it."""
    damage(file)
    assert start(site, file) == set()


def test_a_damaged_module_is_read_from_its_own_file(site: Path, file: Path) -> None:
    """Marshal says that it is none, and Python looks."""
    contents = pack.opened(file)
    entry = contents.entries[f"{TOP}.one"]
    data = bytearray(file.read_bytes())
    data[entry.begin] = 0
    file.write_bytes(data)
    assert start(site, file) == TAKEN - {f"{TOP}.one"}


def test_without_a_place_for_it_nothing_is_kept(site: Path, tmp_path: Path) -> None:
    """A file system that can't be written to is no reason not to start."""
    (tmp_path / "cache").write_text("a file")
    assert start(site, pack.place({"XDG_CACHE_HOME": str(tmp_path / "cache")})) == set()


def test_two_that_write_do_not_meet(site: Path, file: Path) -> None:
    """The second one leaves it to the first."""
    file.unlink()
    with kept.draft(file) as writer:
        assert start(site, file) == set()
        assert not file.exists()
        writer.write(b"the first")
    assert file.read_bytes() == b"the first"
    assert list(file.parent.iterdir()) == [file]


def test_python_without_its_finder_is_left_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever took it away finds modules in another way."""
    others = [finder for finder in sys.meta_path if finder is not PathFinder]
    monkeypatch.setattr(sys, "meta_path", others)
    modules = pack.Pack(file, time.time())
    modules.begin()
    assert modules not in sys.meta_path
    modules.end()
