"""Run vLLM's own HTTP tests against vLLM's own server and against ours.

    python -m judge.vllm [WORD...] [--tiny FOLDER] [--text FOLDER] [--cache FOLDER]

The tests come from the sdist of vLLM, at the version that is served, and start the server
themselves, with flags of their own: once `vllm.entrypoints.openai.api_server`, once our
gateway with the same flags as settings (see `judge.plugin`). With WORDs only the test files
whose path holds one of them. Ends with one line of JSON, and with 1 if fewer pass against ours.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from handler.settings import DEFAULT_MODEL
from judge import session, standins
from judge.sdist import Sdist, unpack
from judge.selection import SELECTED
from judge.verdict import Verdict

SDIST = Sdist(
    name="vllm",
    version="0.32.0",
    sha256="d2c957d5eee3d0985012151315ddc62cbe0cd368fc96a5fc3510438d9dddf2ad",
    folders=("tests", "examples", "pyproject.toml"),  # not its package: the installed one is judged
    git="https://github.com/vllm-project/vllm",
    tag="v0.32.0",
)
TINY = (
    "HuggingFaceH4/zephyr-7b-beta",
    "Qwen/Qwen2-1.5B-Instruct",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-1.7B",
    "Qwen/Qwen3-8B",
    "intfloat/multilingual-e5-small",
    "meta-llama/Llama-3.2-1B-Instruct",
    "openai-community/gpt2",
)
"""The models of the tests for which the tiny chat model of this repository stands in."""
TEXT = (
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "NousResearch/Hermes-3-Llama-3.1-8B",
    "Qwen/Qwen2.5-1.5B-Instruct",
    "facebook/opt-125m",
)
"""Those whose tests want a larger vocabulary: the default model stands in, or is meant."""
TINY_ADAPTERS = (
    "charent/self_cognition_Alice",
    "minpeter/LoRA-Llama-3.2-1B-tool-vllm-ci",
    "typeof/zephyr-7b-beta-lora",
)
TEXT_ADAPTERS = ("peft-internal-testing/opt-125m-dummy-lora",)
TEST_TIMEOUT_S = 400
"""For one test, with the start of its servers."""


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Judge; returns 0 if at least as many tests pass against ours, else 1."""
    parser = argparse.ArgumentParser(prog="python -m judge.vllm")
    parser.add_argument(
        "words", nargs="*", metavar="WORD", help="only test files whose path holds one of these"
    )
    parser.add_argument("--tiny", type=Path, default=session.REPOSITORY / "tests/tinychat/model")
    parser.add_argument("--text", type=Path, help=f"a folder with {DEFAULT_MODEL}; fetched if not given")
    parser.add_argument("--cache", type=Path, default=session.cache(environ))
    options = parser.parse_args(argv)
    files = SELECTED.files(options.words)
    tree = unpack(SDIST, options.cache, environ)
    text = options.text or fetched(DEFAULT_MODEL)
    with tempfile.TemporaryDirectory(prefix="judge-vllm-") as scratch:
        home = Path(scratch, "hf")
        models = dict.fromkeys(TINY, options.tiny) | dict.fromkeys(TEXT, text)
        standins.hub(
            home, models, dict.fromkeys(TINY_ADAPTERS, options.tiny) | dict.fromkeys(TEXT_ADAPTERS, text)
        )
        environ = session.environment(environ) | {"HF_HOME": str(home)}
        runs = []
        for side in ("vllm", "ours"):
            logs = session.fresh(options.cache / "vllm-logs" / side)
            print(f"{side}: {len(files)} test files, logs in {logs}", flush=True)
            words = ["-p", "judge.plugin", "--judge-side", side, "--judge-logs", str(logs)]
            words += ["--timeout", str(TEST_TIMEOUT_S), *files]
            runs.append(session.run(words, tree=tree, environ=environ, logs=logs))
    verdict = Verdict(*runs)
    print(verdict.text())
    print(verdict.json())
    return 0 if verdict.ok else 1


def fetched(model: str) -> Path:
    """The folder of `model`, fetched by the builder if it isn't there."""
    command = [sys.executable, "-m", "builder", "fetch", model]
    done = subprocess.run(command, cwd=session.REPOSITORY, stdout=subprocess.PIPE, check=True, text=True)
    return Path(done.stdout.strip().rpartition("\n")[2])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
