"""Weights in S3: the real engine streams them, on moto's server in S3's place."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import bake_folder, servers
from tests.object_store import ObjectStore

NAME = "tests/tiny"
SOON_S = 60.0
"""What a start that can't succeed may take, on a busy machine; asking again and again takes longer."""


def given(store: ObjectStore) -> dict[str, str]:
    """A worker's environment, with region and credentials as Lambda names them."""
    aws = dict(store.environ)
    aws["AWS_REGION"] = aws.pop("AWS_DEFAULT_REGION")
    return {**servers.engine_environ(Path()), "SERVED_MODEL_NAME": "", **aws}


@pytest.fixture
def bake(object_store: ObjectStore, tiny_model: Path, tmp_path: Path) -> str:
    """A bake of the small model, pushed with the builder's own command."""
    bucket = f"weights-{uuid.uuid4()}"
    object_store.client().create_bucket(Bucket=bucket)
    files = {f"model/{name}": data for name, data in bake_folder.read(tiny_model).items()}
    folder, url = bake_folder.sealed(tmp_path / "bake", files, model=NAME), f"s3://{bucket}/bakes/tiny"
    command = [sys.executable, "-m", "builder", "push", str(folder), url]
    environ = {**os.environ, **object_store.environ}
    subprocess.run(command, cwd=servers.ROOT, env=environ, check=True, capture_output=True, timeout=60)
    return url


async def test_vllm_makes_tokens_from_a_bake_in_s3(
    object_store: ObjectStore, bake: str, tmp_path: Path
) -> None:
    """By the name that it was baked by; the weights go from S3 into memory, and no disk has them."""
    environ = {**given(object_store), "MODEL_NAME": bake, "VLLM_ASSETS_CACHE": str(tmp_path / "assets")}
    with servers.worker(environ) as worker:
        async with worker.server.client() as client:
            told = await client.chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": "Hello"}], max_tokens=8, temperature=0
            )
            assert [model.id async for model in client.models.list()] == [NAME]
        assert told.choices[0].message.content
        assert told.usage is not None
        assert told.usage.completion_tokens == 8
        log = worker.errors.read_text()
    assert '"loader": "runai_streamer: object store (s3)"' in log
    key = f"/{bake.removeprefix('s3://')}/model/model.safetensors"
    read = [status for asked, status in object_store.answered() if asked.startswith("GET ") and key in asked]
    assert set(read) == {206}  # in ranges, which is what the streamer asks for
    kept = {path.name for path in (tmp_path / "assets").rglob("*") if path.is_file()}
    assert "config.json" in kept
    assert "model.safetensors" not in kept


@pytest.mark.parametrize(
    ("model", "changed", "code", "says"),
    [
        ("s3://no-such-bucket-here/tiny", {}, 66, "there is no such bucket"),
        ("{bucket}/nothing-here", {}, 66, "the prefix has no object below it"),
        (
            "{bucket}",
            {
                "AWS_ACCESS_KEY_ID": "",
                "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
                "AWS_CONFIG_FILE": "/nowhere",
            },
            75,
            "no credentials were found",
        ),
        ("{bucket}/tiny", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, 69, "the connection failed"),
    ],
)
def test_a_start_that_can_not_have_its_model_ends_in_seconds(
    object_store: ObjectStore, model: str, changed: Mapping[str, str], code: int, says: str
) -> None:
    """With the exit code that tells what is missing, and one line that says it."""
    bucket = f"weights-{uuid.uuid4()}"
    object_store.client().create_bucket(Bucket=bucket)
    name = model.format(bucket=f"s3://{bucket}")
    environ = {**given(object_store), "MODEL_NAME": name, **changed}
    begun = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "handler"],
        cwd=servers.ROOT,
        env={name: value for name, value in environ.items() if value},
        capture_output=True,
        text=True,
        timeout=servers.START_TIMEOUT_S,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (code, ""), ended.stderr
    assert f"firsttoken: MODEL_NAME={name}: {says}" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert time.monotonic() - begun < SOON_S
