"""`handler.early`: what is said of a request before there is a worker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from handler.early import NAMED, check, only_model
from handler.edge import ROUTES
from handler.errors import BadRequest, NoSuchModel
from handler.messages import Request

CHAT = "/v1/chat/completions"


def asking(body: object, path: str = CHAT) -> Request:
    """A POST of `body`, JSON unless it is bytes."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Request("POST", path, (("content-type", "application/json"),), raw)


@pytest.mark.parametrize("path", sorted(NAMED))
def test_an_unknown_model_is_refused_as_vllm_does(path: str) -> None:
    """With the name that would be right."""
    with pytest.raises(NoSuchModel) as refused:
        check(asking({"model": "other"}, path), model="mine")
    error = refused.value
    assert (error.status, error.type, error.param, error.code) == (
        404,
        "invalid_request_error",
        "model",
        "model_not_found",
    )
    assert error.message == "The model `other` does not exist. Valid aliases: mine."


@pytest.mark.parametrize("model", ["mine", "", None, 5, ["other"], "\ud800"])
def test_a_model_that_may_be_right_or_is_another_fault_waits(model: object) -> None:
    """vLLM takes a request without a model, and says itself what is wrong with one that is no text."""
    check(asking({"model": model, "messages": []}), model="mine")


def test_a_request_without_model_waits() -> None:
    """A worker serves one model."""
    check(asking({"messages": []}), model="mine")


@pytest.mark.parametrize("path", sorted(path for path in ROUTES.keys() - NAMED if ROUTES[path] == "POST"))
def test_on_other_routes_a_model_waits(path: str) -> None:
    """What the model can do is not known, and so not which error comes first."""
    check(asking({"model": "other"}, path), model="mine")


def test_where_names_cannot_be_known_every_model_waits() -> None:
    """It may be an adapter."""
    check(asking({"model": "other"}), model=None)


@pytest.mark.parametrize("model", ["mine", None])
def test_a_body_that_is_no_object_is_refused(model: str | None) -> None:
    """Whatever is known of names."""
    with pytest.raises(BadRequest, match=r"must be a JSON object, not an array"):
        check(asking([]), model=model)
    with pytest.raises(BadRequest, match="could not parse"):
        check(asking(b"{", CHAT + "/"), model=model)


def test_what_is_no_post_waits() -> None:
    """`GET /v1/models` is answered by the worker."""
    check(Request("GET", "/v1/models"), model="mine")


@pytest.mark.parametrize(
    "environ",
    [
        {"ENABLE_LORA": "true"},
        {"LORA_MODULES": "other=/adapters/other"},
        {"MAX_LORAS": "4"},
        {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
        {"VLLM_EXTRA_ARGS": "--seed 1 --enable-lora --lora-modules other=/adapters/other"},
        {"VLLM_SKIP_MODEL_NAME_VALIDATION": "1"},
        {"VLLM_CONFIG_FILE": "/nowhere/vllm.yaml"},
    ],
    ids=lambda environ: next(iter(environ)),
)
def test_other_names_may_be_served(environ: dict[str, str]) -> None:
    """Adapters have names of their own, and vLLM may be told to take every name."""
    assert only_model("mine", environ) is None


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"LORA_MODULES": " "},
        {"EXPLORATION": "1"},
        {"LORA_DEVICE": "/dev/spi0", "FOREIGN_NAMES": "LORA_DEVICE"},
        {"VLLM_EXTRA_ARGS": "--seed 1"},
        {"VLLM_SKIP_MODEL_NAME_VALIDATION": "false"},
    ],
)
def test_one_name_is_served(environ: dict[str, str]) -> None:
    """Nothing here is about adapters."""
    assert only_model("mine", environ) == "mine"


@pytest.mark.parametrize(("text", "name"), [("enable-lora: true\n", None), ("seed: 1\n", "mine")])
def test_a_configuration_file_may_name_adapters(text: str, name: str | None, tmp_path: Path) -> None:
    """It is read as text: vLLM's parser is not there yet."""
    (tmp_path / "vllm.yaml").write_text(text)
    assert only_model("mine", {"VLLM_CONFIG_FILE": str(tmp_path / "vllm.yaml")}) == name
