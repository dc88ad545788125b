"""What can be said of a request before a model is loaded, so that nobody waits for a refusal.

It is what the worker would say, in the same words. Who can't be sure says nothing: of two faults
in one request the worker may name the other one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from handler.body import json_object, takes_json
from handler.errors import NoSuchModel
from handler.messages import Request
from handler.table import FALSE, ours

NAMED = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"}
)
"""Routes on which vLLM compares `model` with the names that it serves, whatever the model can do."""


def only_model(model_id: str, environ: Mapping[str, str]) -> str | None:
    """`model_id` if a worker in `environ` takes no other name; None if it may.

    Adapters have names of their own, some of which are known to the worker alone.
    """
    given = ours(environ)
    if given.get("VLLM_SKIP_MODEL_NAME_VALIDATION", "false").lower() not in FALSE:
        return None
    if any(re.search(r"(^|_)Q?LORAS?(_|$)", name) for name in given):
        return None
    words = given.get("VLLM_EXTRA_ARGS", "")
    if file := given.get("VLLM_CONFIG_FILE"):
        try:
            words += Path(file).read_text()
        except (OSError, ValueError):
            return None
    return None if "lora" in words.lower() else model_id


def check(request: Request, *, model: str | None) -> None:
    """Raise the `RequestError` that a worker which serves only `model` would answer `request` with.

    `model` is None if names can't be known.
    """
    path = request.path.rstrip("/")
    if not takes_json(request):
        return
    asked = json_object(request).get("model")
    if model is None or path not in NAMED:
        return
    if isinstance(asked, str) and asked not in {"", model} and _is_text(asked):
        raise NoSuchModel(asked, served=[model])


def _is_text(name: str) -> bool:
    # JSON can name half a character; that is another fault, and vLLM says which.
    return not re.search("[\ud800-\udfff]", name)
