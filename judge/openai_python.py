"""Run openai-python's own resource tests against vLLM's own server and against ours.

    python -m judge.openai_python [--model FOLDER] [--cache FOLDER]

The tests of the resources that vLLM serves (models, chat completions, completions, responses,
embeddings) come from the sdist of `openai`; they check that every answer has the type that the
client promises. Ends with one line of JSON, and with 1 if fewer pass against ours.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from judge import servers, session
from judge.sdist import Sdist, unpack
from judge.verdict import Run, Verdict, merged

SDIST = Sdist(
    name="openai",
    version="3.54.0",
    sha256="2e393e63f8a38be6452806f9ef0b6534fecd6d41ab3b2165180dfce3599249cd",
    folders=("tests",),
    git="https://github.com/openai/openai-python",
    tag="v3.54.0",
)
TEST_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class Round:
    """The test files that ask for `model`, and the flags with which it is served."""

    model: str
    flags: Sequence[str]
    files: Sequence[str]


_RESOURCES = "tests/api_resources"
_EVERY = ("--max-model-len", "2048", "--max-num-seqs", "16", "--enforce-eager", "--seed", "0")
_GENERATE = (*_EVERY, "--enable-auto-tool-choice", "--tool-call-parser", "hermes")

ROUNDS = (
    Round(
        "gpt-6-astra",
        _GENERATE,
        (
            f"{_RESOURCES}/test_models.py",
            f"{_RESOURCES}/chat/test_completions.py",
            f"{_RESOURCES}/test_responses.py",
        ),
    ),
    Round("gpt-3.5-turbo-instruct", _GENERATE, (f"{_RESOURCES}/test_completions.py",)),
    Round("text-embedding-3-small", (*_EVERY, "--runner", "pooling"), (f"{_RESOURCES}/test_embeddings.py",)),
)


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Judge; returns 0 if at least as many tests pass against ours, else 1."""
    parser = argparse.ArgumentParser(prog="python -m judge.openai_python")
    parser.add_argument("--model", type=Path, default=session.REPOSITORY / "tests/tinychat/model")
    parser.add_argument("--cache", type=Path, default=session.cache(environ))
    options = parser.parse_args(argv)
    tree = unpack(SDIST, options.cache, environ)
    logs = session.fresh(options.cache / "openai-logs")
    environ = session.environment(environ)
    verdict = Verdict(
        vllm=against(servers.vllm, options.model, tree=tree, environ=environ, logs=logs / "vllm"),
        ours=against(servers.ours, options.model, tree=tree, environ=environ, logs=logs / "ours"),
    )
    print(verdict.text())
    print(verdict.json())
    return 0 if verdict.ok else 1


def against(
    start: Callable[..., servers.Server], model: Path, *, tree: Path, environ: Mapping[str, str], logs: Path
) -> Run:
    """Run every round against the server that `start` starts, with `model` under the names they ask for."""
    runs = []
    for one in ROUNDS:
        here = session.fresh(logs / one.model)
        flags = ("--served-model-name", one.model, *one.flags)
        with start(str(model), flags, environ, here / "server.log") as server:
            print(f"{logs.name}: ready as {one.model} after {server.started_s:.1f} s", flush=True)
            # Their pyproject.toml asks for plugins that are not needed here; this stands in for it.
            words = ["-c", os.devnull, "--rootdir", str(tree), "-o", "asyncio_mode=auto"]
            words += ["-o", "asyncio_default_fixture_loop_scope=session", "--timeout", str(TEST_TIMEOUT_S)]
            words += ["-p", "judge.openai_plugin", "--judge-key", server.key, *one.files]
            base = {"TEST_API_BASE_URL": f"{server.root}/v1"}
            runs.append(session.run(words, tree=tree, environ={**environ, **base}, logs=here))
    return merged(runs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
