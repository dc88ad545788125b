"""`handler.warm`: what a fork has from its parent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from handler import preparation
from handler.phases import Phases
from handler.settings import Settings
from handler.warm import Parent
from handler.zygote import Asked


def nobody(_: bytes) -> None:
    """Tell nothing."""


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork replaces its environment; here it is the tests' own."""
    monkeypatch.setattr(os, "environ", {"SEEN_BY": "the parent", "PATH": "/bin"})


def warmed(monkeypatch: pytest.MonkeyPatch) -> Parent:
    """A parent that has prepared, which sets two variables."""

    def prepare(settings: Settings, _: Phases, environ: dict[str, str]) -> preparation.Prepared:
        environ["VLLM_SET_LATE"] = "by preparing"
        environ.setdefault("OMP_NUM_THREADS", "1")
        return preparation.Prepared(settings, None, None, "thread", None, {})  # type: ignore[arg-type] # not looked at

    monkeypatch.setattr(preparation, "check", lambda *_: None)
    monkeypatch.setattr(preparation, "prepare", prepare)
    parent = Parent(Phases(0.0))
    parent.warm_up(Settings.from_environ({}), os.environ)
    return parent


def test_a_fork_has_its_own_environment_and_what_preparing_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reads some of it only at the first request. What was asked for comes first."""
    warmed(monkeypatch).fork(Asked({"MODEL_NAME": "a", "OMP_NUM_THREADS": "3"}, 1.0), nobody)
    assert os.environ == {
        "MODEL_NAME": "a",
        "OMP_NUM_THREADS": "3",
        "VLLM_SET_LATE": "by preparing",
        "OPENBLAS_NUM_THREADS": "1",
    }


def test_the_configuration_is_for_the_same_engine_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where the worker listens makes no difference, the model and vLLM's flags do."""
    parent = warmed(monkeypatch)

    def prepared_for(**asked: str) -> preparation.Prepared | None:
        fork = parent.fork(Asked(asked, 1.0), nobody)
        return fork.prepared_for(Settings.from_environ(os.environ))  # as the worker reads them

    assert prepared_for() is parent.prepared is not None
    assert prepared_for(PORT="1", UDS=str(tmp_path / "s"), LOG_LEVEL="DEBUG") is parent.prepared
    assert prepared_for(CUDA_VISIBLE_DEVICES="3", SHARED_BY="2") is parent.prepared, "of the same kind"
    assert prepared_for(LC_CTYPE="C.UTF-8") is parent.prepared, "Python's own, where there is no locale"
    for asked in ({"MODEL_NAME": "org/other"}, {"MAX_MODEL_LEN": "512"}, {"OMP_NUM_THREADS": "3"}):
        assert prepared_for(**asked) is None
