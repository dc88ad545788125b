"""AWS, for tests whose worker runs in their own process."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests import batch_stack
from tests.aws_stack import AwsStack
from tests.batch_stack import Resources
from tests.object_store import ObjectStore


@pytest.fixture
def aws(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """AWS, as boto3 finds it by the environment, where everybody may do everything."""
    _set(monkeypatch, object_store.environ)
    return object_store


@pytest.fixture
def resources(aws_stack: AwsStack, monkeypatch: pytest.MonkeyPatch) -> Resources:
    """What template.yaml makes, the test's own; boto3 finds it, and is under the template's policy."""
    _set(monkeypatch, aws_stack.environ)
    return batch_stack.of(aws_stack)


def _set(monkeypatch: pytest.MonkeyPatch, environ: Mapping[str, str]) -> None:
    for name, value in environ.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
