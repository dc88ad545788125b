"""What a person reads when vLLM could not start."""

from __future__ import annotations

import logging

from handler.errors import BadSettings, EngineFailed, ModelNotFound, NoResources, StartError

log = logging.getLogger(__name__)


def start_error(error: BaseException) -> StartError:
    """What `error`, which vLLM raised at its start, comes down to: the error to end with.

    `ModelNotFound` if Hugging Face is behind it, `NoResources` for memory, `BadSettings` for a configuration
    that can never start, else `EngineFailed`, which is logged with its traceback.
    """
    for cause in _chain(error):
        kind = type(cause).__module__.partition(".")[0]
        if kind == "huggingface_hub" or (isinstance(cause, OSError) and "huggingface.co" in str(cause)):
            return _from(
                ModelNotFound(f"the model can't be had from Hugging Face: {_first_line(cause)}"), error
            )
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return _from(NoResources(f"not enough memory: {_first_line(cause)}"), error)
    if type(error).__module__.startswith("pydantic"):  # vLLM's configuration: it can never start so
        return _from(BadSettings([f"vLLM: {' '.join(str(error).split())}"]), error)
    log.error("engine failed to start", exc_info=error)
    return _from(
        EngineFailed(f"the engine failed to start: {type(error).__name__}: {_first_line(error)}"), error
    )


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _from(error: StartError, cause: BaseException) -> StartError:
    error.__cause__ = cause
    return error


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
