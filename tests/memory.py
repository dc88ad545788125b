"""What a process holds of the machine's memory, in bytes, as proc(5) says."""

from __future__ import annotations

from pathlib import Path


def resident_bytes(pid: int) -> int:
    """The memory of the process `pid` now."""
    return _read(pid, "VmRSS:")


def peak_bytes(pid: int) -> int:
    """The most memory that the process has had, since `forget_peak` if that was called."""
    return _read(pid, "VmHWM:")


def forget_peak(pid: int) -> None:
    """Have the peak be what the process has now (proc_pid_clear_refs(5))."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _read(pid: int, name: str) -> int:
    rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(row.split()[1]) << 10 for row in rows if row.startswith(name))
