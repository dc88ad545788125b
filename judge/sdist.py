"""Get a source distribution from PyPI and unpack the part of it that is needed."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BACKENDS = ("setuptools/build_meta", "hatchling/build")
"""The build backends of the distributions that are judged, as module paths."""

_BACKEND = """
import email, pathlib, shutil

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    info = email.message_from_bytes(pathlib.Path("PKG-INFO").read_bytes())
    folder = pathlib.Path(metadata_directory, f"{info['Name']}-{info['Version']}.dist-info")
    folder.mkdir()
    shutil.copy("PKG-INFO", folder / "METADATA")
    return folder.name

def build_wheel(*args, **kwargs):
    raise NotImplementedError("only metadata is asked for")
"""


@dataclass(frozen=True, slots=True)
class Sdist:
    """One source distribution, pinned by its hash, and where else its tree can be had."""

    name: str
    version: str
    sha256: str
    folders: Sequence[str]
    """What of it is unpacked, relative to its root."""
    git: str
    tag: str


def unpack(sdist: Sdist, cache: Path, environ: Mapping[str, str]) -> Path:
    """The folder with `sdist.folders`, fetched once and kept under `cache`.

    From PyPI by pip; where that can't be reached, from a shallow clone of `sdist.tag`.
    Raises `subprocess.CalledProcessError` when neither can be reached, and `ValueError`
    when PyPI's file is not the one of `sdist.sha256`.
    """
    target = cache / f"{sdist.name}-{sdist.version}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        tree = Path(scratch, "tree")
        try:
            print(f"fetching the sdist of {sdist.name} {sdist.version}", flush=True)
            _extract(_download(sdist, Path(scratch), environ), sdist, tree)
        except subprocess.CalledProcessError as error:
            print(f"no sdist ({error}); cloning {sdist.git} at {sdist.tag}", flush=True)
            clone = ["git", "-c", "advice.detachedHead=false", "clone", "--quiet", "--depth", "1"]
            subprocess.run([*clone, "--branch", sdist.tag, sdist.git, str(tree)], check=True)
            for entry in tree.iterdir():
                if entry.name not in sdist.folders:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        tree.rename(target)
    return target


def _download(sdist: Sdist, scratch: Path, environ: Mapping[str, str]) -> Path:
    # pip asks the build backend of an sdist for its metadata before it keeps the file, and
    # vLLM's wants torch, rust and cmake for that. This one answers from the sdist's PKG-INFO.
    backends = scratch / "backends"
    for module in BACKENDS:
        path = backends / f"{module}.py"
        path.parent.mkdir(parents=True)
        (path.parent / "__init__.py").touch()
        path.write_text(_BACKEND)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--no-binary", sdist.name, "--dest", str(scratch)]
    command += [f"{sdist.name}=={sdist.version}"]
    subprocess.run(command, env={**environ, "PYTHONPATH": str(backends)}, check=True)
    (archive,) = scratch.glob("*.tar.gz")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sdist.sha256:
        raise ValueError(f"{archive.name} has sha256 {found}, not {sdist.sha256}")
    return archive


def _extract(archive: Path, sdist: Sdist, tree: Path) -> None:
    root = f"{sdist.name}-{sdist.version}/"
    with tarfile.open(archive) as tar:
        for member in tar:
            inside = member.name.removeprefix(root)
            if any(inside == folder or inside.startswith(folder + "/") for folder in sdist.folders):
                tar.extract(member, tree, filter="data")
    for entry in (tree / root).iterdir():
        entry.rename(tree / entry.name)
    (tree / root).rmdir()
