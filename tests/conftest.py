"""What several folders of tests share: one real engine for the whole run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests import object_store as object_stores
from tests import servers
from tests.place import Place


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--tiny-model` tries the tests on another model than the repository's."""
    parser.addoption("--tiny-model", type=Path, default=servers.ROOT / "tests/tinychat/model")


@pytest.fixture(scope="session")
def tiny_model(pytestconfig: pytest.Config) -> Path:
    """The folder of the small chat model."""
    folder: Path = pytestconfig.getoption("--tiny-model")
    return folder


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
