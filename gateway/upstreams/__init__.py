"""What can stand behind the gateway: something that answers, once it is there."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from handler.errors import UpstreamFailed
from handler.messages import Reply, Request


class WorkerLost(UpstreamFailed):
    """The worker went away before it said anything: another may be asked the same.

    Raised while a call is entered and never from the frames of a reply.
    """


class Upstream(Protocol):
    """Answers requests while it is `ready`; can be waited for while it is not."""

    @property
    def ready(self) -> bool:
        """Whether a request can be sent at once."""
        ...

    @property
    def retry_after_s(self) -> float:
        """About how long until it is ready."""
        ...

    @property
    def cold_start_s(self) -> float:
        """How long the last start took, from process to first token."""
        ...

    async def wait_ready(self) -> None:
        """Return once it is ready, in order of arrival, and have it started if need be.

        Raises `NotAdmitted` at once when it can't become ready; has no deadline of its own.
        """

    def call(self, request: Request) -> AbstractAsyncContextManager[Reply]:
        """Answer `request` (a `handler.messages.Call`).

        Raises `WorkerLost` when nothing was answered and another try is in order.
        """
        ...
