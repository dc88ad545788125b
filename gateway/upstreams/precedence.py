"""Who has a core that both want: a worker, before the loop of the gateway that asks it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def before_us() -> Iterator[None]:
    """A process that is started in here has precedence over this thread, the loop's, from then on.

    The loop wakes with each token, by what the worker has written. An ordinary task that wakes may take the
    core from who has woken it, which would go on to make the next token; a batch task waits for a free core,
    or for its turn. What it starts elsewhere, threads too, is as itself. Nothing changes for a gateway that
    was started with another policy (`chrt`), or where the kernel knows no such thing or does not allow it.
    """
    _be("SCHED_OTHER")  # a child has what its parent has as it is made, before the first `await`
    try:
        yield
    finally:
        _be("SCHED_BATCH")


def _be(policy: str) -> None:
    with suppress(AttributeError, OSError):
        if os.sched_getscheduler(0) in {os.SCHED_OTHER, os.SCHED_BATCH}:
            os.sched_setscheduler(0, getattr(os, policy), os.sched_param(0))
