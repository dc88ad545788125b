"""The installer as `make` runs it, on a package and an engine so small that they need no network.

The tree is a copy with a `pyproject.toml` of its own; torch and its like are wheels of a few
bytes in the one folder that pip may look into.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.wheel_file import write_wheel

ROOT = Path(__file__).parents[2]

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""
BACKEND = """
from pathlib import Path
from wheel_file import write_wheel

def build_editable(folder, settings=None, metadata=None):
    needs = ["torch==2.13.0+cpu; extra == 'cpu'", "torchvision; extra == 'cpu'"]
    return write_wheel(Path(folder), "firsttoken", "0", needs=needs, extras=["cpu", "dev"])
"""


class Tree:
    """A copy of the repository with what the installer reads, and the wheels that pip finds."""

    def __init__(self, root: Path) -> None:
        self.root = root / "tree"
        self.wheels = root / "wheels"
        self.wheels.mkdir()
        for folder in ("builder", "handler", "scripts"):
            shutil.copytree(ROOT / folder, self.root / folder, ignore=shutil.ignore_patterns("__pycache__"))
        (self.root / "pyproject.toml").write_text(PYPROJECT)
        (self.root / "backend.py").write_text(BACKEND)
        shutil.copyfile(ROOT / "tests" / "wheel_file.py", self.root / "wheel_file.py")

    def install(self, *extras: str, **more: str) -> tuple[int, str]:
        """Run the installer, with `more` in its environment; returns its exit status and what it said."""
        environ = {
            "HOME": str(self.root),
            "PATH": os.environ["PATH"],
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_FIND_LINKS": str(self.wheels),
            "PIP_NO_INDEX": "1",
            "https_proxy": "http://127.0.0.1:9",
            **more,
        }
        line = [sys.executable, "-m", "scripts.install", *extras]
        done = subprocess.run(line, cwd=self.root, env=environ, capture_output=True, text=True, check=False)
        assert done.stdout == ""
        return done.returncode, done.stderr

    def packages(self) -> set[str]:
        """The packages in the environment that was made."""
        site = next((self.root / ".venv" / "lib").glob("python*/site-packages"))
        return {path.name.partition("-")[0] for path in site.glob("*.dist-info")} - {"pip", "setuptools"}


pytestmark = pytest.mark.timeout(600)  # an environment is made in each test


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A tree in which nothing was installed."""
    return Tree(tmp_path)


def test_installation_is_made_once(tree: Tree) -> None:
    """The second run does and says nothing; new pins and another Python do, and say what."""
    status, said = tree.install("dev")
    assert (status, tree.packages()) == (0, {"firsttoken"}), said
    assert "installing firsttoken[dev]" in said
    assert tree.install("dev") == (0, "")

    (tree.root / "pyproject.toml").write_text(PYPROJECT + "# another pin\n")
    assert tree.install("dev") == (0, "install: installing firsttoken[dev]\n")

    (tree.root / ".venv" / "bin" / "python").unlink()  # as when Debian moves on to another Python
    status, said = tree.install("dev")
    assert status == 0, said
    assert "making" in said


def test_tools_have_an_environment_of_their_own(tree: Tree) -> None:
    """Made once, and again when another version is asked for; .venv knows nothing of it."""
    for version in ("1.0", "1.1"):
        write_wheel(tree.wheels, "tool", version, {"tool/__init__.py": b""})
        group = f'[dependency-groups]\nlint = ["tool=={version}"]\n'
        (tree.root / "pyproject.toml").write_text(PYPROJECT + group)
        folder = tree.root / ".venv-aws" / "lint"
        status, said = tree.install("--tools", "lint")
        assert (status, said) == (0, f"install: installing tool=={version} in {folder}, 200 MB on disk\n")
        assert next(folder.glob("lib/python*/site-packages/tool-*")).name == f"tool-{version}.dist-info"
        assert tree.install("--tools", "lint") == (0, "")
    assert not (tree.root / ".venv").exists()


def test_engine_comes_with_torch_and_without_what_does_not_fit_it(tree: Tree) -> None:
    """The extra of an earlier run stays, and two engines never share an environment."""
    torch = {"torch/__init__.py": b"", "torch/lib/_C.so": b"libtorch_cpu.so"}
    write_wheel(tree.wheels, "torch", "2.13.0+cpu", torch)
    torchvision = {"torchvision/__init__.py": b"", "torchvision/_C.so": b"libtorch_cuda.so"}
    write_wheel(tree.wheels, "torchvision", "0.28.0", torchvision)

    status, said = tree.install("cpu")
    assert (status, tree.packages()) == (0, {"firsttoken", "torch"}), said
    assert said.splitlines()[-1] == "install: removing what is built for another torch: torchvision"
    assert tree.install("cpu") == (0, "")

    status, said = tree.install("dev")
    assert (status, tree.packages()) == (0, {"firsttoken", "torch"}), said
    assert "installing firsttoken[cpu,dev]" in said

    status, said = tree.install("gpu")
    assert (status, said.count("\n")) == (1, 1)
    assert "`make clean` first" in said


@pytest.mark.parametrize("constraint", ["", "torch<3"])
def test_torch_that_can_not_be_had_is_named(tree: Tree, constraint: str) -> None:
    """pip's own sources have no such build and PyTorch's index is out of reach: what to do, and no trace."""
    write_wheel(tree.wheels, "torch", "2.13.0")  # for GPUs
    file = tree.root / "constraints.txt"
    file.write_text(constraint)
    status, said = tree.install("cpu", PIP_CONSTRAINT=str(file))
    assert status == 1
    assert said.splitlines()[-1] == (
        "install: pip's own sources have no torch==2.13.0+cpu, and https://download.pytorch.org/whl/cpu "
        "can't be reached from here. Fetch that wheel on a machine that reaches it, put it in a folder, "
        "and try again with PIP_FIND_LINKS=/that/folder"
    )
    assert "Traceback" not in said
