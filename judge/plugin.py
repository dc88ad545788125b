"""The pytest plugin that runs inside vLLM's tests: which server, and which tests.

Given to pytest with `-p judge.plugin`. It changes one class of theirs, `RemoteOpenAIServer`,
so that it starts the server that is judged instead of `vllm serve`; the tests stay as they are.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import signal
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from judge import report, servers
from judge.selection import SELECTED

START = {"vllm": servers.vllm, "ours": servers.ours}
USUAL_CONTEXT_TOKENS = 2048
UNPREFIXED = ("tokenize", "detokenize")
"""Routes that vLLM has at its root and we below `/v1`."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of this plugin."""
    parser.addoption("--judge-side", required=True, choices=sorted(START), help="the server to judge")
    parser.addoption("--judge-logs", required=True, type=Path, help="a folder for the logs of servers")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Put the server that is judged in the place of vLLM's."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that fixtures stop their servers
    option = session.config.getoption
    # vLLM's `tests`, not ours: they lie in the folder that pytest runs in.
    install(import_module("tests.utils").RemoteOpenAIServer, option("--judge-side"), option("--judge-logs"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that are selected."""
    report.select(
        config, items, lambda item: SELECTED.left_out(item.nodeid, touches_server=touches_server(item))
    )


def touches_server(item: pytest.Item) -> bool:
    """Whether the test talks to a server: by a fixture, or by starting one itself."""
    names = getattr(item, "fixturenames", ())
    if any("server" in name or "client" in name for name in names):
        return True
    return isinstance(item, pytest.Function) and "RemoteOpenAIServer" in inspect.getsource(item.function)


def install(remote: Any, side: str, logs: Path) -> None:
    """Make vLLM's `RemoteOpenAIServer` a handle of the server that is judged.

    What its tests use of it stays: the clients, `url_for`, `url_root`, `with`.
    """
    count = itertools.count()

    def start(self: Any, model: str, vllm_serve_args: Sequence[str], **options: Any) -> None:
        flags = complete(vllm_serve_args, **options)
        environ = {**os.environ, **(options.get("env_dict") or {})}
        self.server = START[side](model, flags, environ, logs / f"server-{next(count):03}.log")
        self.DUMMY_API_KEY = self.server.key
        self.uds, self.host, self.port, self.proc = None, "127.0.0.1", None, self.server.process
        # Ours always asks for a key. The tests' plain requests carry none, so they get it
        # here, but for those that show what happens without one.
        if side == "ours" and not asks_for_key(flags, environ):
            bear(self.server)

    def url_for(self: Any, *parts: str) -> str:
        path = "/".join(part.strip("/") for part in parts if part)
        if side == "ours" and path in UNPREFIXED:
            path = f"v1/{path}"
        return f"{self.server.root}/{path}"

    methods = {
        "__init__": start,
        "_shutdown": lambda self: self.server.stop(),
        "url_root": property(lambda self: self.server.root),
        "url_for": url_for,
    }
    for name, method in methods.items():
        setattr(remote, name, method)


def complete(
    flags: Sequence[str],
    *,
    seed: int | None = 0,
    override_hf_configs: Mapping[str, Any] | None = None,
    **_: object,
) -> list[str]:
    """The flags of a test, with those that `RemoteOpenAIServer` makes of its other arguments.

    Where the test gives no context length, the stand-ins' own would be long: an answer
    without an end would take minutes.
    """
    more = [] if seed is None else ["--seed", str(seed)]
    if override_hf_configs is not None:
        more += ["--hf-overrides", json.dumps(override_hf_configs)]
    if not any(name == "max-model-len" for name, _ in servers.parse(flags)):
        more += ["--max-model-len", str(USUAL_CONTEXT_TOKENS)]
    return [*flags, *more]


def asks_for_key(flags: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Whether vLLM's own server would ask for a key."""
    return "VLLM_API_KEY" in environ or any(name == "api-key" for name, _ in servers.parse(flags))


def bear(server: servers.Server) -> None:
    """Give plain `requests` to `server` its key, unless they carry one."""
    prepared: Any = import_module("requests").PreparedRequest
    prepare = prepared.prepare_headers

    def with_key(self: Any, headers: Any) -> None:
        prepare(self, headers)
        if str(self.url).startswith(server.root):
            self.headers.setdefault("Authorization", f"Bearer {server.key}")

    prepared.prepare_headers = with_key
