"""Waiting for a state of another process, which has no event to wait for."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event

LOOK_S = 0.01


def until(holds: Callable[[], object], *, timeout_s: float = 60.0) -> None:
    """Return once `holds()`; fails when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not so after {timeout_s} s"
        Event().wait(LOOK_S)
