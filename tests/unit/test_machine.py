"""`handler.machine`: what /proc and /sys say of a machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from handler import machine


def written(path: Path, text: str) -> Path:
    """A file with a text, in folders that are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_name_of_an_nvidia_gpu(tmp_path: Path) -> None:
    """Of the first, in the words of its driver."""
    for address, name in (("0000:81:00.0", "NVIDIA B200"), ("0000:19:00.0", "NVIDIA H100 80GB HBM3")):
        written(tmp_path / address / "information", f"Model: \t\t {name}\nIRQ:   \t\t 16\n")
    assert machine.gpu(tmp_path, tmp_path / "none") == "NVIDIA H100 80GB HBM3"


def test_the_instruction_set_of_an_amd_gpu(tmp_path: Path) -> None:
    """A node that is a processor has none."""
    written(tmp_path / "0" / "properties", "cpu_cores_count 64\ngfx_target_version 0\n")
    written(tmp_path / "1" / "properties", "cpu_cores_count 0\ngfx_target_version 90402\n")
    assert machine.gpu(tmp_path / "none", tmp_path) == "gfx 90402"


def test_no_gpu(tmp_path: Path) -> None:
    """Nothing to be seen is nothing there."""
    assert machine.gpu(tmp_path, tmp_path) is None


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("flags\t\t: fpu avx2 avx sse4_2 amx_tile fma", ["amx_tile", "avx", "avx2", "fma"]),
        ("Features\t: fp asimd sve bf16 crc32", ["asimd", "bf16", "sve"]),
        ("bogomips\t: 50.00", []),
    ],
)
def test_the_vector_instructions_of_a_processor(tmp_path: Path, line: str, found: list[str]) -> None:
    """Those that code may be compiled for, on x86 and on Arm."""
    assert machine.instructions(written(tmp_path / "cpuinfo", f"processor\t: 0\n{line}\n")) == found


def test_the_memory_of_a_process() -> None:
    """This one has some; one that has ended has none."""
    assert machine.memory_bytes(os.getpid()) > 1 << 20
    assert machine.memory_bytes(2**22) == 0  # above the largest number of a process
