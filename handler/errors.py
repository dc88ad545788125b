"""Every error of firsttoken, in one tree.

FirstTokenError
├── RequestError            answered to the client: status, type, code, param, message
│   ├── BadRequest          400  invalid_request_error
│   │   ├── BadEvent        400  a platform event whose shape is not known
│   │   └── KeyReused       422  idempotency_key_reused
│   ├── Unauthorized        401  invalid_request_error / invalid_api_key
│   ├── Forbidden           403  permission_error
│   ├── NotFound            404  invalid_request_error
│   │   ├── NoSuchRoute     404  unknown_url
│   │   ├── NoSuchModel     404  model_not_found
│   │   ├── NoSuchEndpoint  404  endpoint_not_found
│   │   └── NoSuchJob       404  job_not_found
│   ├── MethodNotAllowed    405  method_not_allowed, with Allow
│   ├── Conflict            409  conflict
│   ├── BodyTooLarge        413  request_too_large
│   ├── StorageFull         413  storage_full
│   ├── BadFile             422  bad_settings: what the gateway was to read again is at fault
│   ├── RateLimited         429  rate_limit_exceeded, with Retry-After
│   ├── EngineDead          500  engine_dead
│   ├── UpstreamFailed      502  upstream_failed
│   │   └── AwsFailed       502  a service of AWS, or of its kind, has refused or can't be reached
│   ├── KeyRefused          502  upstream_unauthorized: the gateway's own key, not the client's
│   ├── NotAdmitted         503  not_admitted, with Retry-After
│   │   ├── StartFailed     503  worker_start_failed, with Retry-After
│   │   └── StorageDown     503  storage_unavailable, with Retry-After
│   └── DeadlineExceeded    504  deadline_exceeded
├── BatchLost               another worker has the batch, or a newer input has taken its place
├── RuntimeApiFailed        Lambda's Runtime API did not take what was said to it
│   └── AnswerCut           nobody reads the rest of an answer
└── StartError              ends the process with an exit code from sysexits.h
    ├── UsageError          64
    ├── ManifestMismatch    65
    ├── Damaged             65
    ├── BadModel            65
    ├── ModelNotFound       66
    ├── StoreFailed         69
    ├── Unreachable         69
    ├── EngineFailed        70
    ├── NoResources         75
    │   └── Unfit           75  the platform's own checks: only another machine helps
    ├── BarrierFailed       75
    └── BadSettings         78

Bodies have the shape of OpenAI's: `{"error": {"message", "type", "param", "code"}}`,
`code` a string or null. Statuses and codes: https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from handler.messages import Headers, Reply, as_json, once

START_FAILED_RETRY_AFTER_S = 60
"""A worker that could not start never will. By then another one may have taken its place."""

STORAGE_RETRY_AFTER_S = 5

MAX_RETRY_AFTER_S = 120
"""openai-python does not retry at all when `Retry-After` is longer than this."""


class FirstTokenError(Exception):
    """The root of the tree above."""


class RequestError(FirstTokenError):
    """An error that a client is answered with."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str | None = None

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, headers: Headers = ()
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The JSON object that a client gets."""
        return error_body(self.message, type=self.type, param=self.param, code=self.code)

    def reply(self) -> Reply:
        """This error as a plain reply."""
        return json_reply(self.status, self.body(), self.headers)

    def frame(self) -> bytes:
        """This error as the last frame of an event stream that had already begun."""
        return b"data: " + as_json(self.body()) + b"\n\n"


class BadRequest(RequestError):
    """The request can't be understood."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class BadEvent(BadRequest):
    """A platform event has none of the shapes that are known."""

    code = "unknown_event"


class KeyReused(BadRequest):
    """An idempotency key came with another request than the first time."""

    status = 422
    code = "idempotency_key_reused"

    def __init__(self) -> None:
        super().__init__("This idempotency key was used with another request.")


class Unauthorized(RequestError):
    """No key, or not one that is known."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    def __init__(self, message: str = "Incorrect API key provided.") -> None:
        super().__init__(message, headers=(("www-authenticate", "Bearer"),))


class Forbidden(RequestError):
    """The key is known and may not do this."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class NotFound(RequestError):
    """There is no such thing."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class NoSuchRoute(NotFound):
    """The route is not one of the OpenAI routes that are allowed."""

    code = "unknown_url"

    def __init__(self, method: str, path: str, hint: str = "Check the URL for typos.") -> None:
        super().__init__(f"Unknown request URL: {method} {path}. {hint}")


class NoSuchModel(NotFound):
    """No model of that name is served; what are, `served` says."""

    code = "model_not_found"

    def __init__(self, model: str, served: Iterable[str] = ()) -> None:
        names = ", ".join(served)  # the text is vLLM's
        aliases = f" Valid aliases: {names}." if names else ""
        super().__init__(f"The model `{model}` does not exist.{aliases}", param="model")


class NoSuchEndpoint(NotFound):
    """No endpoint of that id is served."""

    code = "endpoint_not_found"

    def __init__(self, endpoint_id: str) -> None:
        super().__init__(f"The endpoint `{endpoint_id}` does not exist.")


class NoSuchJob(NotFound):
    """No job of that id is kept, or it is another key's."""

    code = "job_not_found"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"The job `{job_id}` does not exist; what came of a job is kept for a while only.")


class MethodNotAllowed(RequestError):
    """The route is known, with other methods."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"

    def __init__(self, method: str, path: str, allowed: Iterable[str]) -> None:
        allow = ", ".join(sorted(allowed))
        super().__init__(
            f"Method {method} is not allowed for {path}; allowed: {allow}.", headers=(("allow", allow),)
        )


class Conflict(RequestError):
    """What is asked for can't be done in the state that the thing is in."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class BodyTooLarge(RequestError):
    """The body is larger than `MAX_BODY_BYTES`."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"The request body is larger than {limit_bytes} bytes.")


class StorageFull(RequestError):
    """There is no place for the file. No 5xx: a client would send it all again, at once."""

    status = 413
    type = "invalid_request_error"
    code = "storage_full"


class BadFile(RequestError):
    """The file that was to be read again is at fault; nothing has changed. `faults` names every one."""

    status = 422
    type = "invalid_request_error"
    code = "bad_settings"

    def __init__(self, faults: Iterable[str]) -> None:
        super().__init__("Nothing has changed: " + "; ".join(faults) + ".")


class _RetryLater(RequestError):
    def __init__(self, message: str, *, retry_after_s: float, code: str | None = None) -> None:
        super().__init__(message, code=code, headers=retry_after(retry_after_s))


class RateLimited(_RetryLater):
    """The key has used up its share for now."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class EngineDead(RequestError):
    """The engine died while it held the request, or before."""

    code = "engine_dead"

    def __init__(self, message: str = "The engine died while it held this request.") -> None:
        super().__init__(message)


class UpstreamFailed(RequestError):
    """The worker behind the gateway went away or answered nonsense."""

    status = 502
    code = "upstream_failed"


class AwsFailed(UpstreamFailed):
    """What AWS has said is in `reason` (its own code) and `http_status`; None where nothing was said."""

    def __init__(self, message: str, reason: str | None = None, http_status: int | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.http_status = http_status


class KeyRefused(RequestError):
    """The upstream refuses the gateway's own key: its 401 would tell a client that the client's is wrong."""

    status = 502
    code = "upstream_unauthorized"


class NotAdmitted(_RetryLater):
    """Nothing can take the request now: the queue is full, or the worker is stopping."""

    status = 503
    code = "not_admitted"


class StartFailed(NotAdmitted):
    """The worker could not start and never will, for the reason that `failure` has."""

    def __init__(self, failure: StartError) -> None:
        reason = " ".join(str(failure).split()).rstrip(".")
        super().__init__(
            f"The worker could not start: {reason}.",
            retry_after_s=START_FAILED_RETRY_AFTER_S,
            code="worker_start_failed",
        )


class StorageDown(NotAdmitted):
    """The database can't be read or written now. What it says itself is in the log and for no client."""

    code = "storage_unavailable"

    def __init__(self) -> None:
        super().__init__("The gateway's database can't be used now.", retry_after_s=STORAGE_RETRY_AFTER_S)


class DeadlineExceeded(RequestError):
    """The request waited longer than it may."""

    status = 504
    code = "deadline_exceeded"


class BatchLost(FirstTokenError):
    """What this worker does on a batch is for nothing: another has it, or a newer input has its place."""


class RuntimeApiFailed(FirstTokenError):
    """Lambda's Runtime API did not take what was said to it; `status` is its answer, None for silence."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class AnswerCut(RuntimeApiFailed):
    """Lambda has closed an answer before its end: nobody reads the rest."""


class StartError(FirstTokenError):
    """The process can't start, or can't go on. `exit_code` is from sysexits.h."""

    exit_code: ClassVar[int] = 70

    @property
    def line(self) -> str:
        """All of it on one line."""
        return " ".join(str(self).split())


class UsageError(StartError):
    """The command line is wrong."""

    exit_code = 64


class ManifestMismatch(StartError):
    """What runs is not what was baked."""

    exit_code = 65


class Damaged(StartError):
    """What was downloaded is not what its source says of it."""

    exit_code = 65


class BadModel(StartError):
    """The model's files are there and can't be understood."""

    exit_code = 65


class ModelNotFound(StartError):
    """The model is neither a folder nor a repository that can be reached."""

    exit_code = 66


class StoreFailed(StartError):
    """An object store can't be reached or refuses; `code` is its own word for why, if it gave one."""

    exit_code = 69

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class Unreachable(StartError):
    """The gateway that a command asks can't be reached, or refuses."""

    exit_code = 69


class EngineFailed(StartError):
    """The engine could not start, or died."""

    exit_code = 70


class NoResources(StartError):
    """The machine lacks memory, a device or a system library."""

    exit_code = 75


class Unfit(NoResources):
    """The machine failed the platform's own checks: the worker has to go, so that it gets another."""


class BarrierFailed(StartError):
    """The worker can't be captured, or was not resumed (see `handler.freeze`)."""

    exit_code = 75


class BadSettings(StartError):
    """One or more settings are wrong; `faults` names every one of them."""

    exit_code = 78

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("bad settings:\n" + "\n".join(f"  - {fault}" for fault in self.faults))

    @property
    def line(self) -> str:
        """All of it on one line."""
        return " ".join(f"bad settings: {'; '.join(self.faults)}".split())


def retry_after(seconds: float) -> Headers:
    """When to come again, in a form that openai-python heeds."""
    return (("retry-after", str(max(1, min(MAX_RETRY_AFTER_S, round(seconds))))),)


def error_body(
    message: str, *, type: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def json_reply(status: int, body: object, headers: Headers = ()) -> Reply:
    """A reply whose body is `body` as JSON."""
    raw = as_json(body)
    head = (("content-type", "application/json"), ("content-length", str(len(raw))), *headers)
    return Reply(status, head, once(raw))
