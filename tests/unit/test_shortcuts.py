"""`handler.shortcuts`: the same is found in a shorter way."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from handler import shortcuts

NAMES = ("torch", "vllm")
ASKS = """
import sys
def define(depth=1):
    from torch._library.utils import get_source
    from torch import library
    return get_source(depth + 1), library.module_of(sys._getframe(depth))
"""
OVERRIDES = """
class _VllmFallbackAllowList:
    def __init__(self, inner):
        self.inner = inner

def _patch_inductor_fallback_allow_list() -> None:
    try:
        from torch._inductor import lowering as _lowering
    except ImportError:
        return
    _lowering.FALLBACK_ALLOW_LIST = _VllmFallbackAllowList(_lowering.FALLBACK_ALLOW_LIST)

_patch_inductor_fallback_allow_list()
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with packages that stand where torch and vLLM do, not imported yet."""
    site = tmp_path / "site"
    files = {
        "torch/__init__.py": "",
        "torch/_library/__init__.py": "",
        "torch/_library/utils.py": "def get_source(stacklevel):\n    raise AssertionError\n",
        "torch/library.py": "import inspect\ndef module_of(frame):\n    return inspect.getmodule(frame)\n",
        "torch/_inductor/__init__.py": "",
        "torch/_inductor/lowering.py": "FALLBACK_ALLOW_LIST = {'aten::add'}\n",
        "torch/_inductor/graph.py": "from torch._inductor.lowering import FALLBACK_ALLOW_LIST\n",
        "torch/ops.py": ASKS,
        "vllm/__init__.py": "",
        "vllm/env_override.py": OVERRIDES,
    }
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in [name for name in sys.modules if name.partition(".")[0] in NAMES]:
        monkeypatch.delitem(sys.modules, name)
    for name in files:  # and forgotten when the test ends
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
        del sys.modules[module]
    return site


def allowed(module: str) -> Any:
    """The list of the compiler, in one of its modules."""
    return importlib.import_module(f"torch._inductor.{module}").FALLBACK_ALLOW_LIST


def test_the_compiler_is_imported_with_the_list_that_vllm_wants(site: Path) -> None:
    """When it is imported, and no sooner."""
    shortcuts.import_inductor_later()
    importlib.import_module("vllm.env_override")
    assert "torch._inductor.lowering" not in sys.modules
    assert type(allowed("lowering")).__name__ == "_VllmFallbackAllowList"
    assert allowed("lowering").inner == {"aten::add"}
    assert allowed("graph") is allowed("lowering")


def test_a_compiler_whose_graph_is_imported_first_has_it_too(site: Path) -> None:
    """Its own name for the list is the same list."""
    shortcuts.import_inductor_later()
    importlib.import_module("vllm.env_override")
    assert allowed("graph") is allowed("lowering")
    assert type(allowed("graph")).__name__ == "_VllmFallbackAllowList"


def test_a_compiler_that_was_imported_before_is_left_to_vllm(site: Path) -> None:
    """Then there is nothing to gain."""
    allowed("lowering")
    shortcuts.import_inductor_later()
    importlib.import_module("vllm.env_override")
    assert type(allowed("lowering")).__name__ == "_VllmFallbackAllowList"


@pytest.mark.parametrize(
    ("was", "now"),
    [("except ImportError", "except KeyError"), ("_VllmFallbackAllowList", "_OtherList"), ("-> None", "")],
)
def test_another_vllm_is_left_alone(site: Path, was: str, now: str) -> None:
    """Where its function may not do without the compiler, or the list has another name."""
    text = OVERRIDES.replace(was, now)
    (site / "vllm" / "env_override.py").write_text(text)
    shortcuts.import_inductor_later()
    importlib.import_module("vllm.env_override")
    assert ("torch._inductor.lowering" in sys.modules) is (now != "")
    assert "List" in type(allowed("lowering")).__name__


def test_others_import_the_compiler_meanwhile(site: Path) -> None:
    """Only the one function of vLLM's does without."""
    with (site / "vllm" / "env_override.py").open("a") as file:
        file.write("import torch._inductor.lowering as needed\n")
    shortcuts.import_inductor_later()
    overrides = importlib.import_module("vllm.env_override")
    assert type(overrides.needed.FALLBACK_ALLOW_LIST).__name__ == "_VllmFallbackAllowList"


def test_a_frame_says_where_an_operator_was_defined(site: Path) -> None:
    """The same file, line and module that `inspect` finds."""
    shortcuts.name_sources_by_frame()
    ops = importlib.import_module("torch.ops")
    here = inspect.currentframe()
    assert here is not None
    line, module = ops.define()
    assert line == f"{__file__}:{here.f_lineno - 1}"
    assert module is inspect.getmodule(here)


def test_a_frame_of_text_is_left_to_inspect(site: Path) -> None:
    """It has the name of a module, but is not in its file."""
    shortcuts.name_sources_by_frame()
    ops = importlib.import_module("torch.ops")
    found: dict[str, Any] = {}
    exec("found = define()", {"define": ops.define, "__name__": __name__}, found)
    assert found["found"] == ("<string>:1", None)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where one package is installed, alone in Python's path; each look at it is counted."""
    site = tmp_path / "packages"
    (site / "one-1.0.dist-info").mkdir(parents=True)
    (site / "one-1.0.dist-info" / "METADATA").write_text("Name: one\nVersion: 1.0\n")
    (site / "one-1.0.dist-info" / "top_level.txt").write_text("one\n")
    monkeypatch.setattr(sys, "path", [str(site), str(tmp_path / "gone")])
    for name in ("packages_distributions", "entry_points"):  # they are put back as the test ends
        monkeypatch.setattr(importlib.metadata, name, getattr(importlib.metadata, name))
    return site


def test_distributions_are_read_once(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until another is installed, or one is installed again."""
    looks: list[str] = []
    theirs = importlib.metadata.packages_distributions

    def packages_distributions() -> Any:
        looks.append("look")
        return theirs()

    monkeypatch.setattr(importlib.metadata, "packages_distributions", packages_distributions)
    environ = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    shortcuts.keep_distributions(environ)
    for _ in range(2):
        assert importlib.metadata.packages_distributions() == {"one": ["one"]}
    assert len(looks) == 1
    other = packages / "two-2.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Name: two\nVersion: 2.0\n")
    (other / "top_level.txt").write_text("two\n")
    assert importlib.metadata.packages_distributions() == {"one": ["one"], "two": ["two"]}
    os.utime(other, ns=(1, 1))
    importlib.metadata.packages_distributions()
    assert len(looks) == 3


def test_entry_points_are_those_of_what_is_installed(packages: Path, tmp_path: Path) -> None:
    """Also of what is installed later, by the same questions."""
    plain = importlib.metadata.entry_points
    shortcuts.keep_distributions({"XDG_CACHE_HOME": str(tmp_path / "cache")})
    keeping: Any = importlib.metadata.entry_points
    assert keeping is not plain
    assert list(keeping(group="plugins")) == []
    other = packages / "two-2.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Name: two\nVersion: 2.0\n")
    (other / "entry_points.txt").write_text("[plugins]\none = two:one\n[others]\none = two:three\n")
    assert [point.value for point in keeping(group="plugins")] == ["two:one"]
    for asked in ({"group": "plugins"}, {"name": "one"}, {"group": "none"}):
        assert sorted(keeping(**asked)) == sorted(plain(**asked))
        assert all(point.dist.name == "two" for point in keeping(**asked))
