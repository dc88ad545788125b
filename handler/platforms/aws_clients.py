"""Clients of AWS's services, made when they are first needed, for any thread."""

from __future__ import annotations

import importlib
import threading
from typing import Any

from handler.errors import UpstreamFailed

CONNECT_S, READ_S, TRIES = 3.0, 10.0, 3


class Clients:
    """boto3's clients, one for each service. Region and credentials are those of the environment."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._session: Any = None
        self._made: dict[str, Any] = {}

    def client(self, service: str) -> Any:
        """The client of `service`. Imports boto3 for the first one, 0.3 s: not on an event loop."""
        with self._lock:  # a session is not for several threads, its clients are
            if service not in self._made:
                if self._session is None:
                    self._session = importlib.import_module("boto3").session.Session()
                config = importlib.import_module("botocore.config").Config(
                    connect_timeout=CONNECT_S,
                    read_timeout=READ_S,
                    retries={"mode": "standard", "total_max_attempts": TRIES},
                )
                self._made[service] = self._session.client(service, config=config)
            return self._made[service]

    def call(self, service: str, operation: str, **parameters: Any) -> Any:
        """Do one operation. Raises `UpstreamFailed`, which says what AWS has said."""
        exceptions: Any = importlib.import_module("botocore.exceptions")
        try:
            return getattr(self.client(service), operation)(**parameters)
        except (exceptions.BotoCoreError, exceptions.ClientError) as error:
            raise UpstreamFailed(f"{service} {operation}: {error}") from error
