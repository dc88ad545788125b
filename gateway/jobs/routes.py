"""RunPod's API of jobs, `/v2/{endpoint_id}/run` and its family."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from gateway.jobs import destinations, status, table
from gateway.jobs.document import Document, beside
from gateway.jobs.jobs import Jobs
from gateway.jobs.rates import Rates
from gateway.jobs.table import JOBS, Job, NewJob, State
from gateway.methods import by_method
from handler import jobs as shapes
from handler.errors import (
    BadEvent,
    BadRequest,
    BodyTooLarge,
    NoSuchEndpoint,
    NoSuchJob,
    json_reply,
)
from handler.messages import Call, Reply, Request, as_json, once

BODY_MAX_BYTES: Mapping[str, int] = {"run": 10 << 20, "runsync": 20 << 20}
WAIT_S, WAIT_MIN_S, WAIT_MAX_S = 90.0, 1.0, 300.0
"""How long `/runsync` is held, and what `?wait=` may make of it."""
HOLD_S = 5.0
"""How long `/stream` is held while there is nothing to tell: the SDK gives up after 10 s."""
POLICY_S: Mapping[str, tuple[float, float]] = {
    "executionTimeout": (5, 7 * 86400),
    "ttl": (10, 7 * 86400),
}

_Answer = Callable[[Request], Awaitable[Reply]]
_IDEMPOTENCY_KEY = re.compile(r"[ -~]{1,255}")


class Callers(Protocol):
    """What keys may do: `gateway.jobs.account.Account`."""

    def sees_all(self, key_id: str) -> bool:
        """Whether the key may see other keys' jobs."""

    def admit(self, key_id: str, endpoint_id: str, inside: Request | None) -> None:
        """Let a job in that asks the endpoint for `inside`, or raise what it is refused with."""


@dataclass(frozen=True, slots=True)
class JobRoutes:
    """The part of the gateway that answers them.

    A job is its key's: to others it does not exist, except to an admin's key, as `account` knows them.
    `workers` says how many workers of an endpoint are in which of RunPod's states.
    """

    jobs: Jobs
    endpoints: Collection[str]
    account: Callers
    allowed: destinations.Allowed
    workers: Callable[[str], Mapping[str, int]] = lambda _: {}
    rates: Rates = field(default_factory=Rates)

    def find(self, request: Request) -> Call | None:
        """The call for an operation. Raises what tells that there is no such thing, and `BodyTooLarge`."""
        _, top, endpoint_id, operation, *rest = [*request.path.split("/"), *[""] * 4]
        job_id = rest[0]
        if top != "v2" or any(rest[1:]):
            return None
        methods = self._of_job(endpoint_id, operation, job_id) if job_id else self._of(endpoint_id, operation)
        if methods is None:
            return None
        if endpoint_id not in self.endpoints:
            raise NoSuchEndpoint(endpoint_id)
        answer = by_method(request, methods)
        _check_size(request, operation)

        @asynccontextmanager
        async def call(asked: Request) -> AsyncIterator[Reply]:
            with self.rates.counted(operation, endpoint_id, asked.visit.caller):
                yield await answer(asked)

        return call

    def _of(self, endpoint_id: str, operation: str) -> Mapping[str, _Answer] | None:
        """What `operation` of the endpoint is, by method."""
        match operation:
            case "run":
                return {"POST": partial(self._run, endpoint_id)}
            case "runsync":
                return {"POST": partial(self._runsync, endpoint_id)}
            case "purge-queue":
                return {"POST": partial(self._purge, endpoint_id)}
            case "health":
                return {"GET": partial(self._health, endpoint_id)}
        return None

    def _of_job(self, endpoint_id: str, operation: str, job_id: str) -> Mapping[str, _Answer] | None:
        """What `operation` of the job is, by method."""

        def of(answer: Callable[[Request, Job], Awaitable[Reply]]) -> _Answer:
            async def answered(request: Request) -> Reply:
                return await answer(request, await self._own(request, endpoint_id, job_id))

            return answered

        match operation:
            case "status":
                return {"GET": of(self._status), "POST": of(self._status)}
            case "stream":
                return {"GET": of(self._stream), "POST": of(self._stream)}
            case "cancel":
                return {"POST": of(self._cancel)}
            case "retry":
                return {"POST": of(self._retry)}
        return None

    async def _own(self, request: Request, endpoint_id: str, job_id: str) -> Job:
        job = await self.jobs.find(job_id)
        caller = request.visit.caller
        if job is None or job.endpoint_id != endpoint_id:
            raise NoSuchJob(job_id)
        if job.key_id != caller and not self.account.sees_all(caller):
            raise NoSuchJob(job_id)
        return job

    async def _run(self, endpoint_id: str, request: Request) -> Reply:
        job = await self._submit(request, endpoint_id, "run")
        return json_reply(200, {"id": job.id, "status": job.state.shown})

    async def _runsync(self, endpoint_id: str, request: Request) -> Reply:
        wait_s = _milliseconds(request, "wait", WAIT_MIN_S, WAIT_MAX_S)
        job = await self._submit(request, endpoint_id, "runsync")
        job = await self.jobs.wait(job, WAIT_S if wait_s is None else wait_s)
        return await self._told(job)

    async def _submit(self, request: Request, endpoint_id: str, kind: str) -> Job:
        read = partial(_parse, request, endpoint_id, kind, self.allowed)
        new, inside = await beside(len(request.body), read)
        return await self.jobs.submit(new, partial(self.account.admit, new.key_id, endpoint_id, inside))

    async def _status(self, request: Request, job: Job) -> Reply:
        ttl_s = _milliseconds(request, "ttl", 0, POLICY_S["ttl"][1])
        if ttl_s is not None and job.ended:
            await self.jobs.ledger.keep_until(job, self.jobs.ledger.now + ttl_s)
        return await self._told(job)

    async def _told(self, job: Job) -> Reply:
        output = await self.jobs.output(job) if job.state is State.COMPLETED else None
        return _json(status.render(job, output))

    async def _stream(self, _: Request, job: Job) -> Reply:
        told = await self.jobs.stream(job, HOLD_S)
        if told is None:
            raise NoSuchJob(job.id)
        parts = b",".join(b'{"output":' + output + b"}" for output in told.outputs)
        head = as_json({"attempt": told.attempt, "status": told.status})
        return _json(head[:-1] + b',"stream":[' + parts + b"]}")

    async def _cancel(self, _: Request, job: Job) -> Reply:
        cancelled = await self.jobs.cancel(JOBS.c.id == job.id)
        if not cancelled:  # it has ended, maybe just now
            cancelled = [await self.jobs.find(job.id) or job]
        return json_reply(200, {"id": job.id, "status": cancelled[0].state.shown})

    async def _retry(self, _: Request, job: Job) -> Reply:
        again = await self.jobs.retry(job)
        if again is None:
            raise BadRequest(
                f"The job is {job.state.shown}; only one that is FAILED or TIMED_OUT can be retried.",
                code="job_not_retriable",
            )
        return json_reply(200, {"id": again.id, "status": again.state.shown})

    async def _purge(self, endpoint_id: str, request: Request) -> Reply:
        where = JOBS.c.endpoint_id == endpoint_id
        if not self.account.sees_all(request.visit.caller):
            where &= JOBS.c.key_id == request.visit.caller
        removed = await self.jobs.cancel(where, table.WAITING)
        return json_reply(200, {"removed": len(removed), "status": "completed"})

    async def _health(self, endpoint_id: str, _: Request) -> Reply:
        counts = await self.jobs.counts(endpoint_id)
        shown = {
            "completed": counts["COMPLETED"],
            "failed": counts["FAILED"] + counts["TIMED_OUT"],
            "inProgress": counts["IN_PROGRESS"],
            "inQueue": counts["IN_QUEUE"],
            "retried": await self.jobs.retried(endpoint_id),
        }
        return json_reply(200, {"jobs": shown, "workers": {**_NO_WORKERS, **self.workers(endpoint_id)}})


_NO_WORKERS = dict.fromkeys(("idle", "initializing", "ready", "running", "throttled", "unhealthy"), 0)


def worker_counts(workers: Iterable[tuple[str, int]]) -> Mapping[str, int]:
    """How many of `workers`, each a state and a number of requests in flight, are what RunPod calls so."""
    counts = dict(_NO_WORKERS)
    for state, in_flight in workers:
        if state == "starting":
            counts["initializing"] += 1
        elif state == "failed":
            counts["unhealthy"] += 1
        elif state == "ready":
            counts["ready"] += 1
            counts["running" if in_flight else "idle"] += 1
        elif in_flight:  # it finishes what it holds
            counts["running"] += 1
    return counts


def _check_size(request: Request, operation: str) -> None:
    most = BODY_MAX_BYTES.get(operation)
    announced = request.header("content-length") or ""
    # Python refuses to read a number of more than 4,300 digits.
    too_long = announced.isdecimal() and (len(announced) > 18 or int(announced) > (most or 0))
    if most is not None and (too_long or len(request.body) > most):
        raise BodyTooLarge(most)


def _parse(
    request: Request, endpoint_id: str, kind: str, allowed: destinations.Allowed
) -> tuple[NewJob, Request | None]:
    """The job that `request` submits, and what it asks for (`_inside`). Raises `BadRequest`."""
    try:
        document = Document(request.body)
    except (ValueError, RecursionError):
        raise BadRequest("We could not parse the JSON body of your request.") from None
    body = document.value
    if not isinstance(body, dict) or body.get("input") is None:
        raise BadRequest('The body of your request must be a JSON object with an "input".', param="input")
    policy = {} if body.get("policy") is None else body["policy"]
    if not isinstance(policy, dict):
        raise BadRequest('"policy" is a JSON object.', param="policy")
    background = policy.get("lowPriority") or False
    if not isinstance(background, bool):
        raise BadRequest('"lowPriority" is true or false.', param="policy.lowPriority")
    idempotency_key = request.header("idempotency-key") or request.header("x-idempotency-key")
    if idempotency_key is not None and not _IDEMPOTENCY_KEY.fullmatch(idempotency_key):
        raise BadRequest("An idempotency key is at most 255 printable ASCII characters.")
    new = NewJob(
        endpoint_id=endpoint_id,
        key_id=request.visit.caller,
        body=document.dump(body["input"]),
        kind=kind,
        background=background,
        webhook=None if body.get("webhook") is None else destinations.checked(body["webhook"], allowed),
        idempotency_key=idempotency_key,
        digest=None if idempotency_key is None else hashlib.sha256(kind.encode() + request.body).digest(),
    )
    timeout_s, ttl_s = (_policy(policy, name) for name in ("executionTimeout", "ttl"))
    new = replace(
        new,
        execution_timeout_s=new.execution_timeout_s if timeout_s is None else timeout_s,
        ttl_s=new.ttl_s if ttl_s is None else ttl_s,
    )
    return new, _inside(body["input"])


def _inside(job_input: object) -> Request | None:
    """The request that a job's input holds, of whose body only the model is kept: the key is asked for that.

    None for an input that holds none: it is told as what came of the job, as on RunPod.
    """
    try:
        return shapes.parse(job_input, _model_only)
    except BadEvent:
        return None


def _model_only(body: object) -> bytes:
    if not isinstance(body, dict):
        return as_json(type(body)())
    return as_json({"model": body["model"]} if "model" in body else {})


def _policy(policy: Mapping[str, Any], name: str) -> float | None:
    """What `policy` says of `name`, in seconds. Raises `BadRequest`."""
    given, (low_s, high_s) = policy.get(name), POLICY_S[name]
    if given is None:
        return None
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    if not is_number or not low_s * 1000 <= given <= high_s * 1000:
        allowed = f"from {low_s * 1000:.0f} to {high_s * 1000:.0f} ms"
        raise BadRequest(f'"{name}" is a number {allowed}.', param=f"policy.{name}")
    return float(given / 1000)


def _milliseconds(request: Request, name: str, low_s: float, high_s: float) -> float | None:
    """The query's `name`, in seconds. Raises `BadRequest`."""
    given = request.parameters.get(name)
    if not given:
        return None
    if re.fullmatch(r"[0-9]{1,12}", given) and low_s <= int(given) / 1000 <= high_s:
        return int(given) / 1000
    raise BadRequest(f"?{name}= is from {low_s * 1000:.0f} to {high_s * 1000:.0f} ms.", param=name)


def _json(raw: bytes) -> Reply:
    return Reply(200, (("content-type", "application/json"), ("content-length", str(len(raw)))), once(raw))
