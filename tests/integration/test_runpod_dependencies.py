"""RunPod's SDK is installed without its dependencies: what it needs of them is here.

docs/decisions/0007-runpod-sdk.md says why.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.runpod_plane import Plane

PROJECT = tomllib.loads((Path(__file__).parent.parent.parent / "pyproject.toml").read_text())["project"]

NEVER_IMPORTED = {
    "boto3": "boto3",
    "colorama": "colorama",
    "fastapi": "fastapi",
    "inquirerpy": "InquirerPy",
    "prettytable": "prettytable",
    "watchdog": "watchdog",
}
"""Distributions that the SDK wants for its command line, its local server and uploads, and their modules."""

WORKER = """
import importlib.abc, sys

absent = sys.argv[1:]
del sys.argv[1:]  # the SDK reads them

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in absent:
            print("wanted:", name, flush=True)
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Absent())
import runpod

async def handler(job):
    yield job["input"]

runpod.serverless.start({"handler": handler, "refresh_worker": True})
"""


@pytest.fixture(scope="module")
def wanted() -> dict[str, Requirement]:
    """What the installed SDK says that it requires."""
    lines = metadata.requires("runpod") or []
    return {requirement.name.lower(): requirement for requirement in map(Requirement, lines)}


def test_the_extra_is_what_the_sdk_wants_but_for_what_no_worker_imports(
    wanted: dict[str, Requirement],
) -> None:
    """With the SDK's own bounds: an upgrade that raises one, or wants more, is seen here."""
    extra = {line.name.lower(): line for line in map(Requirement, PROJECT["optional-dependencies"]["runpod"])}
    assert extra == {name: line for name, line in wanted.items() if name not in NEVER_IMPORTED}
    assert wanted.keys() >= NEVER_IMPORTED.keys()


def test_what_is_installed_is_what_the_sdk_wants(wanted: dict[str, Requirement]) -> None:
    """But for fastapi, of which vLLM wants an earlier version: once they agree, `--no-deps` can go."""
    unmet = {
        name: metadata.version(name)
        for name, line in wanted.items()
        if name not in NEVER_IMPORTED.keys() - {"fastapi"}
        and not line.specifier.contains(metadata.version(name), prereleases=True)
    }
    assert unmet.keys() == {"fastapi"}


async def test_a_worker_serves_a_job_without_them(tmp_path: Path) -> None:
    """The SDK's loop takes, runs and reports a job, and asks for none of what is left out."""
    async with Plane().open() as plane:
        environ = {**os.environ, **plane.environ(), "RUNPOD_LOG_LEVEL": "INFO", "HOME": str(tmp_path)}
        worker = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WORKER, *NEVER_IMPORTED.values(),
            env=environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        try:
            (job,) = await plane.submit({"prompt": "x"})
            async with asyncio.timeout(60):
                result = await job.result()
                await plane.release()
                said, _ = await worker.communicate()
        finally:
            if worker.returncode is None:
                worker.kill()
                await worker.wait()
    assert result["output"] == []
    assert job.streamed == [{"prompt": "x"}]
    assert "wanted:" not in said.decode()
    assert worker.returncode == 0
