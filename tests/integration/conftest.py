"""AWS, for tests whose worker runs in their own process."""

from __future__ import annotations

import pytest

from tests import batch_stack
from tests.batch_stack import Resources
from tests.object_store import ObjectStore


@pytest.fixture
def aws(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """AWS, as boto3 finds it by the environment."""
    for name, value in object_store.environ.items():
        monkeypatch.setenv(name, value)
    return object_store


@pytest.fixture
def resources(aws: ObjectStore) -> Resources:
    """A bucket, a queue and a table of the test's own."""
    return batch_stack.make(aws)
