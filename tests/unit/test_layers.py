"""What imports what: data goes one way, and a laptop runs the gateway without an engine."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"builder", "gateway", "handler"}
PROGRAM = [path for name in sorted(OURS) for path in sorted((ROOT / name).rglob("*.py"))]

LAYERS = (  # of handler/, from the top: a file imports only from lines below its own
    {"__main__", "healthcheck"},
    {"freezable", "platforms", "warm"},
    {"start"},
    {"engine"},
    {"preparation"},
    {"batch_ask", "batch_object", "batch_source", "batch_window"},
    {"batch_lines"},
    {"edge", "server"},
    {"link"},
    {"asgi"},
    {"admission", "shaping", "slots", "traces"},
    {
        "baked",
        "caches",
        "canary",
        "diagnosis",
        "drain",
        "early",
        "explain",
        "flags",
        "freeze",
        "jobs",
        "listener",
        "loader",
        "metrics",
        "model",
        "openmp",
        "otel",
        "prerequisites",
        "replacements",
        "usage",
        "waiting",
    },
    {
        "auth",
        "body",
        "bridge",
        "core_thread",
        "generated",
        "logs",
        "machine",
        "readahead",
        "seam",
        "settings",
        "shortcuts",
        "sse",
        "structure",
        "supervision",
        "tracing",
        "wire",
    },
    {"stored"},
    {"manifest", "pack", "phases", "zygote"},
    {"errors", "table"},
    {"fetched", "imports", "kept", "levers", "messages", "parallel", "ties", "unread"},
    {"members", "plain"},
)
GATEWAY_LAYERS = (
    {"__main__"},
    {"serve"},
    {"running"},
    {"assembly"},
    {"batches", "commands", "control", "page", "parts"},
    {"endpoints", "files"},
    {"app", "upstreams"},
    {"admin", "door", "jobs", "metrics", "openai_route"},
    {"accounts"},
    {"alone", "console", "instances", "settings", "worker_logs"},
    {"presence"},
    {
        "bodies",
        "counted",
        "data_folder",
        "methods",
        "scaling",
        "scrape",
        "store",
        "upstreams.__init__",
        "upstreams.events",
    },
    {"database"},
)
LEAVES = {"auth", "errors", "levers", "messages", "phases", "settings", "sse"}
ONLY_IN = {
    "vllm": {"handler/seam.py"},
    "torch": {"handler/replacements.py", "handler/seam.py"},
    "runpod": {"handler/platforms/runpod.py"},
    "ray": {"handler/platforms/ray_serve.py"},
}


def imports(path: Path) -> Iterator[str]:
    """The full name of each module, or name of one, that the file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(arg.value) for arg in node.args if isinstance(arg, ast.Constant))


def module(path: Path, package: str = "handler") -> str:
    """The file's name in the layers of `package`: a package in it counts as one.

    But for what stands behind the gateway: whoever asks workers knows `gateway.upstreams` itself and what
    happens to them, and none of the ways to have some.
    """
    parts = path.relative_to(ROOT / package).with_suffix("").parts
    shared = parts in {("upstreams", "__init__"), ("upstreams", "events")}
    return ".".join(parts) if shared else parts[0]


def files(name: str) -> list[Path]:
    """The files that importing `name` runs, those of ours: `handler.asgi.App` is in handler/asgi.py."""
    parts = name.split(".")
    found = [Path(*parts[:end]) for end in range(1, len(parts) + 1)]
    return [
        path
        for at in found
        for path in ((ROOT / at).with_suffix(".py"), ROOT / at / "__init__.py")
        if path.is_file()
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "handler").rglob("*.py")), ids=lambda path: path.stem)
def test_a_file_of_the_worker_imports_only_from_below(path: Path) -> None:
    """A new file is given its line in `LAYERS`."""
    line = {name: number for number, names in enumerate(LAYERS) for name in names}
    if path == ROOT / "handler/__init__.py":
        assert not list(imports(path))
        return
    for name in imports(path):
        top, _, rest = name.partition(".")
        assert top not in OURS - {"handler"}, f"{path} imports {name}"
        if top == "handler" and module(path) != (below := rest.partition(".")[0]):
            assert line[below] > line[module(path)], f"{path.name} imports {name}, which is not below it"
        if module(path) in LEAVES:
            assert top in {*sys.stdlib_module_names, "handler", "pydantic"}, f"{path.name} imports {name}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "gateway").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_file_of_the_gateway_imports_only_from_below(path: Path) -> None:
    """A new file, or folder, is given its line in `GATEWAY_LAYERS`."""
    line = {name: number for number, names in enumerate(GATEWAY_LAYERS) for name in names}
    empty = ROOT / "gateway/__init__.py"
    if path == empty:
        assert not list(imports(path))
        return
    mine = module(path, "gateway")
    for name in imports(path):
        if name.partition(".")[0] == "gateway":
            *_, found = [at for at in files(name) if at != Path("gateway/__init__.py")]
            below = module(ROOT / found, "gateway")
            assert below == mine or line[below] > line[mine], f"{path} imports {name}, which is not below it"


@pytest.mark.parametrize("package", sorted(ONLY_IN))
def test_it_is_imported_where_it_may_be(package: str) -> None:
    """What belongs to an engine or to a platform stays behind its one door."""
    users = {
        str(path.relative_to(ROOT))
        for path in PROGRAM
        if any(name.partition(".")[0] == package for name in imports(path))
    }
    assert users <= ONLY_IN[package]


def test_vllm_is_named_only_in_its_seam() -> None:
    """Every name of vLLM is looked up through `SEAM`, where the seam test finds it."""
    naming = {
        str(path.relative_to(ROOT))
        for path in PROGRAM
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and re.fullmatch(r"vllm(\.\w+)+", str(node.value))
    }
    assert naming == {"handler/seam.py", "handler/shortcuts.py"}  # that one, as vLLM imports it itself


def test_nobody_imports_the_builder() -> None:
    """It bakes; what runs knows nothing of it."""
    for path in PROGRAM:
        if path.relative_to(ROOT).parts[0] != "builder":
            assert not [name for name in imports(path) if name.partition(".")[0] == "builder"], path


def test_the_gateway_needs_neither_engine_nor_more_than_its_dependencies() -> None:
    """Followed from file to file: what it imports is in pyproject's plain `dependencies`."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = {
        re.split(r"[^\w-]", line)[0].replace("-", "_") for line in pyproject["project"]["dependencies"]
    }
    declared |= {"yarl"}  # aiohttp's own, and in its interface
    declared |= {"boto3", "botocore"}  # once a model is in S3, and whoever lacks them is told
    declared |= {"opentelemetry"}  # once traces are on, and so
    seen: set[Path] = set()
    todo = sorted((ROOT / "gateway").rglob("*.py"))
    while todo:
        path = todo.pop()
        seen.add(path)
        for name in imports(path):
            top = name.partition(".")[0]
            assert top in {*sys.stdlib_module_names, *OURS, *declared}, f"{path} imports {name}"
            todo += [found for found in files(name) if found not in seen]
    reached = {module(path) for path in seen if path.is_relative_to(ROOT / "handler")}
    assert not reached & {"__main__", "engine", "platforms", "core_thread", "flags", "prerequisites", "seam"}
