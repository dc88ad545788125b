"""A cluster of Ray on one machine: each node in a network namespace of its own, on one bridge. Needs root."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

NET = "10.78.31"
BRIDGE = "ftray0"
GCS_PORT = 6399
START_TIMEOUT_S = 90


@dataclass(frozen=True, slots=True)
class Node:
    """A machine as far as the network goes."""

    number: int

    @property
    def address(self) -> str:
        """Where other nodes, and the tests, reach it."""
        return f"{NET}.{self.number}"

    @property
    def namespace(self) -> str:
        """What `ip netns` calls it."""
        return f"ftray{self.number}"

    def processes(self) -> list[int]:
        """All that run on it."""
        out = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True
        ).stdout
        return [int(pid) for pid in out.split()]

    def replicas(self) -> list[int]:
        """The processes of its replicas."""
        return [pid for pid in self.processes() if "ServeReplica" in _command(pid)]

    def kill(self) -> None:
        """The machine loses its power."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Its nodes, the first of which is the head, and the environment of a program that asks it."""

    nodes: tuple[Node, ...]
    environ: Mapping[str, str]

    def run(self, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run `command` on the head, to its end."""
        return subprocess.run(
            ["ip", "netns", "exec", self.nodes[0].namespace, *command],
            env={**self.environ, **more},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )


@contextmanager
def cluster(number: int, environ: Mapping[str, str], folder: Path) -> Iterator[Cluster]:
    """`number` nodes, each with room for one replica, on which a process has `environ`."""
    nodes = tuple(Node(index + 1) for index in range(number))
    own = {
        **environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "of-the-tests-of-firsttoken-only-0123456789",
        # Its own default is 10 s, for the mean of 12 s that the deployment asks for: tests are in a hurry.
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        "RAY_metrics_report_interval_ms": "5000",  # 10,000
    }
    ray = str(Path(sys.executable).parent / "ray")
    head = f"{nodes[0].address}:{GCS_PORT}"
    with _network(nodes):
        try:
            for node in nodes:
                role = ["--head", f"--port={GCS_PORT}"] if node is nodes[0] else [f"--address={head}"]
                _start(node, [ray, "start", *role, f"--node-ip-address={node.address}"], own, folder)
            yield Cluster(nodes, {**own, "RAY_ADDRESS": head})
        finally:
            for node in nodes:
                node.kill()
            shutil.rmtree(folder / "ray", ignore_errors=True)


def _start(node: Node, command: list[str], environ: Mapping[str, str], folder: Path) -> None:
    more = ["--num-cpus=1", "--disable-usage-stats"]
    place = ["--include-dashboard=false", f"--temp-dir={folder / 'ray'}"] if "--head" in command else []
    started = subprocess.run(
        ["ip", "netns", "exec", node.namespace, *command, *more, *place],
        env=dict(environ),
        capture_output=True,
        text=True,
        check=False,
        timeout=START_TIMEOUT_S,
    )
    assert started.returncode == 0, started.stdout + started.stderr


@contextmanager
def _network(nodes: tuple[Node, ...]) -> Iterator[None]:
    _remove(nodes)
    _ip("link", "add", BRIDGE, "type", "bridge")
    try:
        _ip("addr", "add", f"{NET}.254/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        for node in nodes:
            ours = f"{BRIDGE}v{node.number}"
            _ip("netns", "add", node.namespace)
            _ip("link", "add", ours, "type", "veth", "peer", "name", "eth0", "netns", node.namespace)
            _ip("link", "set", ours, "master", BRIDGE, "up")
            for words in (
                ("addr", "add", f"{node.address}/24", "dev", "eth0"),
                ("link", "set", "eth0", "up"),
            ):
                _ip("-n", node.namespace, *words)
            _ip("-n", node.namespace, "link", "set", "lo", "up")
        yield
    finally:
        _remove(nodes)


def _remove(nodes: tuple[Node, ...]) -> None:
    for words in (*(("netns", "del", node.namespace) for node in nodes), ("link", "del", BRIDGE)):
        subprocess.run(["ip", *words], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""
