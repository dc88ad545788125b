"""What this machine has: cores, memory, an accelerator. Reads /proc, /sys and /dev only."""

from __future__ import annotations

import os
from pathlib import Path

_ACCELERATORS = {"/dev/nvidiactl": "cuda", "/dev/kfd": "rocm"}
_VECTORS = ("amx", "asimd", "avx", "bf16", "fma", "sve")
_CPUINFO = Path("/proc/cpuinfo")
_NVIDIA = Path("/proc/driver/nvidia/gpus")
_AMD = Path("/sys/class/kfd/kfd/topology/nodes")
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
_MEMORY_USED = Path("/sys/fs/cgroup/memory.current")

MIN_KV_CACHE_BYTES = 64 << 20
MAX_KV_CACHE_BYTES = 1 << 30


def has_accelerator() -> bool:
    """Whether a GPU's device file is there; asks no driver, so nothing is initialised."""
    return accelerator() is not None


def accelerator() -> str | None:
    """`cuda` or `rocm` if a GPU's device file is there, else None."""
    return next((kind for device, kind in _ACCELERATORS.items() if Path(device).exists()), None)


def gpu(nvidia: Path = _NVIDIA, amd: Path = _AMD) -> str | None:
    """What kind the first GPU is, as its driver says in /proc or /sys; None if there is none to be seen.

    Of NVIDIA's the name, of AMD's the version of its instruction set, as `gfx 90402`.
    """
    for file in sorted(nvidia.glob("*/information")):
        for line in file.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "Model":
                return value.strip()
    for file in sorted(amd.glob("*/properties")):
        for line in file.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "gfx_target_version" and value != "0":  # 0 is a processor's node
                return f"gfx {value}"
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


def memory_bytes(pid: int) -> int:
    """The memory of the process `pid` that is in no file, also what it shares; 0: it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def kv_cache_bytes(sequence_bytes: int, free_bytes: int) -> int:
    """How much of `free_bytes` a KV cache gets on a CPU, if a sequence of full length takes `sequence_bytes`.

    Room for 32 such sequences, within 64 MiB and 1 GiB; always for two of them, if 40 % of the free
    memory hold that. Each GiB costs half a second of page faults at the start.
    """
    wanted = min(max(32 * sequence_bytes, MIN_KV_CACHE_BYTES), MAX_KV_CACHE_BYTES)
    return int(min(max(2 * sequence_bytes, wanted), 0.4 * free_bytes))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
