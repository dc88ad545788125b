"""`handler.supervision`: what a worker and its parent tell each other, over a real socket and pipe."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from handler.supervision import Notifier, watch_lifeline

WAIT_S = 60.0

Make = Callable[[str | None], Notifier]


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[socket.socket]:
    """The listening end of `NOTIFY_SOCKET`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(WAIT_S)
        yield listening


@pytest.fixture
def notifiers() -> Iterator[Make]:
    """Makes notifiers, whose sockets would otherwise live as long as their process."""
    made: list[Notifier] = []

    def make(address: str | None) -> Notifier:
        made.append(Notifier(address))
        return made[-1]

    yield make
    for notifier in made:
        notifier._close()


def heard(parent: socket.socket) -> dict[str, str]:
    """The fields of the next datagram."""
    lines = parent.recv(65536).decode().split("\n")
    return dict(line.split("=", 1) for line in lines)


def test_a_start_is_told_as_systemd_wants_it(parent: socket.socket, notifiers: Make) -> None:
    """One datagram each: what it does, that it is ready, that it stops, why it ends."""
    notifier = notifiers(parent.getsockname())
    cold_start = {"total_s": 1.5, "phases": [{"name": "import vllm", "begin_s": 0.0, "end_s": 1.0}]}
    notifier.status("import vllm")
    notifier.ready(cold_start, slots=8)
    notifier.stopping()
    notifier.failed(66, "there is no such folder")
    assert heard(parent) == {"STATUS": "import vllm"}
    ready = heard(parent)
    assert json.loads(ready.pop("X_COLD_START")) == cold_start
    assert ready == {"READY": "1", "STATUS": "ready", "X_SLOTS": "8"}
    assert heard(parent) == {"STOPPING": "1", "STATUS": "draining"}
    assert heard(parent) == {"EXIT_STATUS": "66", "STATUS": "there is no such folder"}


def test_no_text_can_say_more_than_it_is_given_to(parent: socket.socket, notifiers: Make) -> None:
    """A line break in a reason does not make a field of its own."""
    notifiers(parent.getsockname()).failed(66, "no such model: a\nREADY=1")
    assert heard(parent) == {"EXIT_STATUS": "66", "STATUS": "no such model: a READY=1"}


def test_an_abstract_socket_is_understood(notifiers: Make) -> None:
    """systemd may give one, with `@` for the leading zero."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0firsttoken-test-{os.getpid()}")
        listening.settimeout(WAIT_S)
        notifiers(f"@firsttoken-test-{os.getpid()}").status("engine")
        assert heard(listening) == {"STATUS": "engine"}


@pytest.mark.parametrize("address", [None, ""])
def test_without_a_parent_nothing_is_told(address: str | None, notifiers: Make) -> None:
    """A worker by itself."""
    notifiers(address).status("engine")


def test_a_parent_that_was_never_there_is_no_reason_to_die(tmp_path: Path, notifiers: Make) -> None:
    """A container may inherit a name whose socket is not in it; sd_notify(3) only returns an error then."""
    notifiers(str(tmp_path / "nobody")).status("engine")


def test_a_parent_that_goes_away_is_no_reason_to_die(
    parent: socket.socket, tmp_path: Path, notifiers: Make
) -> None:
    """The lifeline decides what follows."""
    notifier = notifiers(parent.getsockname())
    notifier.status("engine")
    parent.close()
    (tmp_path / "notify").unlink()
    notifier.status("first token")
    notifier.stopping()


def test_a_parent_that_does_not_listen_holds_up_nothing(parent: socket.socket, notifiers: Make) -> None:
    """Its queue holds few datagrams; a worker that waits for room would never be ready."""
    notifier = notifiers(parent.getsockname())
    finished = threading.Event()

    def talk() -> None:
        for number in range(5000):
            notifier.status(f"phase {number}")
        finished.set()

    threading.Thread(target=talk, daemon=True).start()
    assert finished.wait(WAIT_S)


def test_the_lifeline_ends_with_the_parent() -> None:
    """However it ends: the kernel closes the pipe. What is written to it says nothing."""
    gone = threading.Event()
    watched, held = os.pipe()
    watch_lifeline(watched, gone.set)
    os.write(held, b"still here")
    assert not gone.is_set()
    os.close(held)
    assert gone.wait(WAIT_S)
    os.close(watched)


def test_a_lifeline_that_is_not_there_has_ended() -> None:
    """A number that is no open pipe can't tell of anything: better to stop than to be left behind."""
    gone = threading.Event()
    watched, held = os.pipe()
    os.close(watched)
    os.close(held)
    watch_lifeline(watched, gone.set)
    assert gone.wait(WAIT_S)
