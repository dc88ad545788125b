"""`handler.errors`: the tree in its docstring is the tree in the code, and bodies are OpenAI's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from handler import errors, sse
from handler.errors import FirstTokenError, RequestError, StartError
from handler.messages import read

EXAMPLES: tuple[RequestError, ...] = (
    errors.RequestError("why"),
    errors.BadRequest("why"),
    errors.BadEvent("why"),
    errors.KeyReused(),
    errors.Unauthorized(),
    errors.Forbidden("why"),
    errors.NotFound("why"),
    errors.NoSuchRoute("GET", "/v1/x"),
    errors.NoSuchModel("org/name"),
    errors.NoSuchEndpoint("other"),
    errors.NoSuchJob("other"),
    errors.MethodNotAllowed("PUT", "/v1/models", ["POST", "GET"]),
    errors.Conflict("why"),
    errors.BodyTooLarge(10),
    errors.StorageFull("why"),
    errors.BadFile(["endpoints.toml: no TOML"]),
    errors.RateLimited("why", retry_after_s=3),
    errors.EngineDead(),
    errors.UpstreamFailed("why"),
    errors.AwsFailed("why", "NoSuchBucket", 404),
    errors.KeyRefused("why"),
    errors.NotAdmitted("why", retry_after_s=3),
    errors.StartFailed(errors.ModelNotFound("there is\n  no such folder.")),
    errors.StorageDown(),
    errors.DeadlineExceeded("why"),
)

EXPECTED = {
    # class: status, type, param, code, headers beside those of the body
    "RequestError": (500, "server_error", None, None, {}),
    "BadRequest": (400, "invalid_request_error", None, "invalid_request", {}),
    "BadEvent": (400, "invalid_request_error", None, "unknown_event", {}),
    "KeyReused": (422, "invalid_request_error", None, "idempotency_key_reused", {}),
    "Unauthorized": (401, "invalid_request_error", None, "invalid_api_key", {"www-authenticate": "Bearer"}),
    "Forbidden": (403, "permission_error", None, "forbidden", {}),
    "NotFound": (404, "invalid_request_error", None, "not_found", {}),
    "NoSuchRoute": (404, "invalid_request_error", None, "unknown_url", {}),
    "NoSuchModel": (404, "invalid_request_error", "model", "model_not_found", {}),
    "NoSuchJob": (404, "invalid_request_error", None, "job_not_found", {}),
    "NoSuchEndpoint": (404, "invalid_request_error", None, "endpoint_not_found", {}),
    "MethodNotAllowed": (405, "invalid_request_error", None, "method_not_allowed", {"allow": "GET, POST"}),
    "BodyTooLarge": (413, "invalid_request_error", None, "request_too_large", {}),
    "Conflict": (409, "invalid_request_error", None, "conflict", {}),
    "StorageFull": (413, "invalid_request_error", None, "storage_full", {}),
    "BadFile": (422, "invalid_request_error", None, "bad_settings", {}),
    "RateLimited": (429, "rate_limit_error", None, "rate_limit_exceeded", {"retry-after": "3"}),
    "EngineDead": (500, "server_error", None, "engine_dead", {}),
    "UpstreamFailed": (502, "server_error", None, "upstream_failed", {}),
    "AwsFailed": (502, "server_error", None, "upstream_failed", {}),
    "KeyRefused": (502, "server_error", None, "upstream_unauthorized", {}),
    "NotAdmitted": (503, "server_error", None, "not_admitted", {"retry-after": "3"}),
    "StartFailed": (503, "server_error", None, "worker_start_failed", {"retry-after": "60"}),
    "StorageDown": (503, "server_error", None, "storage_unavailable", {"retry-after": "5"}),
    "DeadlineExceeded": (504, "server_error", None, "deadline_exceeded", {}),
}


def subclasses(
    cls: type[FirstTokenError], parent: str | None = None
) -> Iterator[tuple[str, str | None, int]]:
    """Each class of the tree with its parent and its number; private ones count as their parent."""
    public = not cls.__name__.startswith("_")
    if public:
        number = cls.status if issubclass(cls, RequestError) else getattr(cls, "exit_code", 0)
        yield cls.__name__, parent, number if parent not in {None, "FirstTokenError"} else 0
    for child in cls.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from subclasses(child, cls.__name__ if public else parent)


def drawn() -> Iterator[tuple[str, str | None, int, str]]:
    """Each line of the tree in the docstring: name, parent, number, and what is said of it."""
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        row = re.fullmatch(r"([│├└─ ]*)([A-Z]\w+)(?: +(\d{2,3}))?(?:  +(.*))?", line)
        if row is None:
            continue
        depth = len(row[1]) // 4
        path[depth:] = [row[2]]
        yield row[2], path[depth - 1] if depth else None, int(row[3] or 0), row[4] or ""


def test_the_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    """Every class is drawn under its parent with its status or exit code, and no other is."""
    tree = [(name, parent, number) for name, parent, number, _ in drawn()]
    assert sorted(tree, key=str) == sorted(subclasses(FirstTokenError), key=str)


def test_the_codes_in_the_docstring_are_those_of_the_classes() -> None:
    """What stands behind a status is the type, the code, or both."""
    by_name = {type(example).__name__: example for example in EXAMPLES}
    for name, _, _, text in drawn():
        if name in by_name and name != "RequestError":
            example = by_name[name]
            said = set(re.findall(r"[a-z]+_[a-z_]+", text))
            assert said <= {example.type, example.code}, name
            assert (", with " in text) == bool(example.headers) or name == "Unauthorized", name


def test_every_request_error_has_an_example_here() -> None:
    """A new error can't be added without saying what a client gets."""
    public = {name for name, _, _ in subclasses(RequestError)}
    assert public == set(EXPECTED) == {type(example).__name__ for example in EXAMPLES}


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
async def test_a_reply_has_status_type_param_code_and_headers(error: RequestError) -> None:
    """The whole answer is as OpenAI's, and its length is announced."""
    reply = error.reply()
    raw = await read(reply)
    status, kind, param, code, extra = EXPECTED[type(error).__name__]
    assert reply.status == status
    assert json.loads(raw) == {"error": {"message": str(error), "type": kind, "param": param, "code": code}}
    assert dict(reply.headers) == {
        "content-type": "application/json",
        "content-length": str(len(raw)),
        **extra,
    }


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_a_frame_is_one_whole_frame_with_the_same_body(error: RequestError) -> None:
    """In mid-stream the client gets the object that a reply would have held."""
    assert sse.split(error.frame()) == [error.frame()]
    assert sse.data(error.frame()) == error.body()


@pytest.mark.parametrize(
    ("retry_after_s", "header"),
    [(-5, "1"), (0, "1"), (0.4, "1"), (1.6, "2"), (119.9, "120"), (120, "120"), (121, "120"), (1e9, "120")],
)
def test_retry_after_is_between_1_and_120_seconds(retry_after_s: float, header: str) -> None:
    """openai-python does not retry at all after a longer one, and at once after 0."""
    for kind in (errors.NotAdmitted, errors.RateLimited):
        assert kind("why", retry_after_s=retry_after_s).headers == (("retry-after", header),)


def test_a_code_of_its_own_replaces_the_class_code() -> None:
    """One class may stand for several reasons."""
    assert errors.NotAdmitted("why", retry_after_s=1, code="worker_stopping").body() == {
        "error": {"message": "why", "type": "server_error", "param": None, "code": "worker_stopping"}
    }


async def test_a_lone_surrogate_in_a_message_can_be_answered() -> None:
    """JSON can name half a character, UTF-8 can't hold it: what is quoted back stays escaped."""
    error = errors.NoSuchModel("\ud800")
    assert json.loads(await read(error.reply())) == error.body()
    assert sse.data(error.frame()) == error.body()


def test_start_errors_exit_with_sysexits() -> None:
    """Each has the code that the platform and the gateway read."""
    ours = [cls for cls in StartError.__subclasses__() if cls.__module__ == errors.__name__]
    codes = {cls.__name__: cls.exit_code for cls in ours}
    assert codes == {
        "UsageError": 64,
        "ManifestMismatch": 65,
        "Damaged": 65,
        "BadModel": 65,
        "ModelNotFound": 66,
        "StoreFailed": 69,
        "Unreachable": 69,
        "EngineFailed": 70,
        "NoResources": 75,
        "BarrierFailed": 75,
        "BadSettings": 78,
    }


def test_bad_settings_names_every_fault() -> None:
    """A person repairs them all in one go."""
    error = errors.BadSettings(["A=1 is wrong", "B is unknown"])
    assert error.faults == ("A=1 is wrong", "B is unknown")
    assert str(error) == "bad settings:\n  - A=1 is wrong\n  - B is unknown"


def test_an_error_of_a_start_fits_on_a_line() -> None:
    """As a parent and a supervisor take it."""
    assert errors.ModelNotFound("no such\n  folder").line == "no such folder"
    assert errors.BadSettings(["PORT='x'", "SEED='y'"]).line == "bad settings: PORT='x'; SEED='y'"
