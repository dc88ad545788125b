"""What a worker and the process that started it tell each other.

Upwards the worker speaks systemd's notification protocol (sd_notify(3)), so that the
gateway and systemd understand it alike. Downwards there is a lifeline: a pipe that ends
when the parent does, however it died.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

SEND_TIMEOUT_S = 5.0
"""How long the news that matters may wait for room in the parent's queue, as in sd_notify(3)."""


class Notifier:
    """Sends state to the datagram socket that `NOTIFY_SOCKET` names; without one, nowhere.

    A parent that is not there, goes away or does not listen never stops a worker.
    """

    def __init__(self, address: str | None) -> None:
        self._socket: socket.socket | None = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            try:
                self._socket.connect("\0" + address[1:] if address.startswith("@") else address)
            except OSError:  # a container may inherit a name whose socket is not in it
                self._close()

    def status(self, text: str) -> None:
        """What the worker is doing, for a person to read."""
        self._send({"STATUS": text}, timeout_s=0)

    def ready(self, cold_start: dict[str, Any], slots: int | None = None) -> None:
        """A first token was made and the socket accepts; `cold_start` is `Phases.report()`.

        `slots` is how many requests are worked on at once; more wait for each other in here.
        """
        told = {} if slots is None else {"X_SLOTS": str(slots)}
        self._send({"READY": "1", "STATUS": "ready", "X_COLD_START": json.dumps(cold_start), **told})

    def stopping(self) -> None:
        """The worker takes no more and finishes what it holds."""
        self._send({"STOPPING": "1", "STATUS": "draining"})

    def failed(self, exit_code: int, reason: str) -> None:
        """The worker is about to exit with `exit_code`; `reason` is one line for a person."""
        self._send({"EXIT_STATUS": str(exit_code), "STATUS": reason})

    def _send(self, fields: dict[str, str], timeout_s: float = SEND_TIMEOUT_S) -> None:
        if self._socket is None:
            return
        lines = "\n".join(f"{name}={' '.join(value.split())}" for name, value in fields.items())
        self._socket.settimeout(timeout_s)
        try:
            self._socket.send(lines.encode())
        except (BlockingIOError, TimeoutError):
            log.debug("the parent does not listen")
        except OSError:  # whoever listened is gone; the lifeline tells what to do about that
            self._close()

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def watch_lifeline(fd: int, gone: Callable[[], None] = lambda: os.kill(os.getpid(), signal.SIGTERM)) -> None:
    """Call `gone` once the other end of the pipe `fd` is closed, from a daemon thread."""

    def wait() -> None:
        try:
            while os.read(fd, 1):
                pass
        except OSError as error:  # better to stop than to be left behind
            log.error("no lifeline", extra={"fd": fd, "reason": error.strerror})  # noqa: TRY400 - no news in a trace
        gone()

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
