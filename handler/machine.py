"""What this machine has: cores, memory, an accelerator. Reads /proc, /sys and /dev only."""

from __future__ import annotations

import os
from pathlib import Path

_ACCELERATORS = {"/dev/nvidiactl": "cuda", "/dev/kfd": "rocm"}
_VECTORS = ("amx", "asimd", "avx", "bf16", "fma", "sve")
_CPUINFO = Path("/proc/cpuinfo")
_NVIDIA = Path("/proc/driver/nvidia/gpus")
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
_MEMORY_USED = Path("/sys/fs/cgroup/memory.current")


def has_accelerator() -> bool:
    """Whether a GPU's device file is there; asks no driver, so nothing is initialised."""
    return accelerator() is not None


def accelerator() -> str | None:
    """`cuda` or `rocm` if a GPU's device file is there, else None."""
    return next((kind for device, kind in _ACCELERATORS.items() if Path(device).exists()), None)


def gpu(folder: Path = _NVIDIA) -> str | None:
    """What the first NVIDIA GPU is called, as its driver says in /proc; None if there is none to be seen."""
    for file in sorted(folder.glob("*/information")):
        for line in file.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "Model":
                return value.strip()
    return None


def instructions(cpuinfo: Path = _CPUINFO) -> list[str]:
    """The sets of vector instructions of the first processor that code may be compiled for, sorted."""
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in {"flags", "Features"}:  # x86, Arm
            return sorted(word for word in value.split() if word.startswith(_VECTORS))
    return []


def cores() -> int:
    """How many cores this process may use: its affinity, capped by the cgroup's quota."""
    usable = len(os.sched_getaffinity(0))
    quota = _words(_CPU_QUOTA)
    if len(quota) == 2 and quota[0] != "max":
        usable = min(usable, max(1, int(quota[0]) // int(quota[1])))
    return usable


def free_memory_bytes() -> int:
    """Memory that can be had without swapping: the machine's, capped by the cgroup's limit."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = _words(_MEMORY_LIMIT), _words(_MEMORY_USED)
    if limit and used and limit[0] != "max":
        free = min(free, max(0, int(limit[0]) - int(used[0])))
    return free


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
