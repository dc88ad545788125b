"""The official client for Node as an oracle; skipped, and said so, where there is no npm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import servers

HERE = servers.ROOT / "tests" / "node"
NPM = ("npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--loglevel=error")


@pytest.fixture(scope="session")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the oracle and the client that it needs."""
    if not (shutil.which("npm") and shutil.which("node")):
        pytest.skip("this lane did not run: node and npm are missing (Debian: apt-get install nodejs npm)")
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "oracle.mjs", "batches.mjs"):
        shutil.copy(HERE / name, folder)
    subprocess.run(NPM, cwd=folder, check=True, timeout=150, stdout=subprocess.DEVNULL)
    return folder


def seen(program: str, folder: Path, stack: servers.Stack) -> object:
    """What `program` has seen of the gateway."""
    environ = {
        "PATH": os.environ["PATH"],
        "OPENAI_BASE_URL": stack.gateway.base_url,
        "OPENAI_API_KEY": stack.gateway.key,
    }
    done = subprocess.run(
        ["node", program, servers.MODEL],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("path", ["stack", "jobs_stack"], ids=["gateway", "runpod"])
def test_the_node_client_understands_every_answer(
    path: str, node_folder: Path, request: pytest.FixtureRequest
) -> None:
    """Objects, streams and errors arrive as the client's own types, through the gateway."""
    assert seen("oracle.mjs", node_folder, request.getfixturevalue(path)) == {
        "models": [servers.MODEL],
        "model": "model",
        "chat": ["chat.completion", "The capital of France is Paris.", "stop"],
        "stream": "The capital of France is Paris.",
        "sameUsage": True,
        "completion": ["text_completion", 3],
        "noModel": ["NotFoundError", 404, "model_not_found", "invalid_request_error", "model", True],
        "badKey": ["AuthenticationError", 401, "invalid_api_key", "invalid_request_error", None, True],
        "badValue": ["BadRequestError", 400, "invalid_request", "invalid_request_error", "temperature", True],
    }


def test_the_node_client_does_files_and_batches(node_folder: Path, stack: servers.Stack) -> None:
    """With the real engine behind them."""
    assert seen("batches.mjs", node_folder, stack) == {
        "file": ["file", "\u00fc.jsonl", "batch", 3600],
        "batch": ["batch", "completed", {"by": "node"}, {"total": 2, "completed": 1, "failed": 1}, None],
        "outputs": [["france", 200, "The capital of France is Paris.", None]],
        "errors": [["bad", 400, "temperature"]],
        "refused": ["failed", [[2, "duplicate_custom_id"]]],
        "batches": True,
        "results": True,
        "deleted": True,
        "gone": ["NotFoundError", 404],
        "over": ["ConflictError", 409],
    }
