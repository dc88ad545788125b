"""A look at a batch's whole input before anything is asked: with one bad line nothing is, as at OpenAI."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b

from handler.batch_lines import REQUESTS_MAX, Item, Progress
from handler.batch_source import Source
from handler.errors import BadRequest, RequestError
from handler.messages import Request

FAULTS_MAX = 100
"""How many faults are told; whoever has more has one more often."""


@dataclass(slots=True)
class Checked:
    """What was found: how many requests, for which model, and what is wrong, with the numbers of lines."""

    total: int = 0
    model: str | None = None
    faults: list[tuple[int | None, RequestError]] = field(default_factory=list)


def check(
    source: Source,
    url: str,
    *,
    default_model: str,
    refuse: Callable[[Request], None],
    goes_on: Callable[[], bool],
) -> Checked | None:
    """Look at every line of `source`, all of which have to ask `url`; None if `goes_on` said no first.

    `refuse` raises what the first request is refused with, whoever asks it.
    """
    found = Checked()
    seen: set[bytes] = set()
    for items in source.items(Progress(), ()):
        if not goes_on():
            return None
        for item in items:
            found.total += 1
            if found.total > REQUESTS_MAX:
                why = f"The file has more than {REQUESTS_MAX} requests."
                found.faults.append((None, BadRequest(why, code="too_many_tasks")))
                return found
            fault = item.fault or _fault(item, url, seen, found, default_model)
            if fault is None and found.total == 1:
                fault = _refusal(item, refuse)
            if fault is not None:
                found.faults.append((item.line.number, fault))
                if len(found.faults) == FAULTS_MAX:
                    return found
    if not found.total:
        found.faults.append((None, BadRequest("The file has no requests.", code="empty_file")))
    return found


def _fault(item: Item, url: str, seen: set[bytes], found: Checked, default_model: str) -> RequestError | None:
    assert item.request is not None, "the line is not bad by itself"
    assert item.custom_id is not None, "the line is not bad by itself"
    digest = blake2b(item.custom_id.encode(errors="surrogatepass"), digest_size=16).digest()
    if digest in seen:
        why = f"The custom_id '{item.custom_id}' for this request is a duplicate of another request."
        return BadRequest(why, param="custom_id", code="duplicate_custom_id")
    seen.add(digest)
    if item.request.path != url:
        why = f"The URL provided for this request does not match the batch's endpoint {url}."
        return BadRequest(why, param="url", code="url_mismatch")
    model = item.model or default_model
    found.model = found.model or model
    if model != found.model:
        why = f"The model `{model}` is not that of the lines above, `{found.model}`; a batch has one."
        return BadRequest(why, param="body.model", code="model_mismatch")
    return None


def _refusal(item: Item, refuse: Callable[[Request], None]) -> RequestError | None:
    assert item.request is not None, "the line is not bad by itself"
    try:
        refuse(item.request)
    except RequestError as error:
        return error
    return None
