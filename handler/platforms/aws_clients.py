"""Clients of AWS's services, made when they are first needed, for any thread."""

from __future__ import annotations

import importlib
import threading
from typing import Any

from handler.errors import AwsFailed, NoResources
from handler.prerequisites import installed

CONNECT_S, READ_S, TRIES = 3.0, 10.0, 3
CONNECTIONS = 32
"""How many to one service are kept."""
PACKAGES = ("aws_lambda_powertools", "boto3")


def check_installed() -> None:
    """See that there is what AWS's platforms need. Raises `NoResources`. Imports nothing."""
    for package in PACKAGES:
        if not installed(package):
            raise NoResources(f"{package} is not installed: pip install 'firsttoken[aws]'")


class Clients:
    """boto3's clients, one for each service. Region, credentials and endpoints are those of the environment.

    `read_s` is how long one may say nothing.
    """

    def __init__(self, *, read_s: float = READ_S) -> None:
        self._read_s = read_s
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
                    read_timeout=self._read_s,
                    max_pool_connections=CONNECTIONS,
                    retries={"mode": "standard", "total_max_attempts": TRIES},
                )
                self._made[service] = self._session.client(service, config=config)
            return self._made[service]

    def call(self, service: str, operation: str, **parameters: Any) -> Any:
        """Do one operation; the `Body` of an answer is read whole. Raises `AwsFailed`."""
        exceptions: Any = importlib.import_module("botocore.exceptions")
        try:
            answer = getattr(self.client(service), operation)(**parameters)
            if "Body" in answer:
                answer["Body"] = answer["Body"].read()
        except exceptions.ClientError as error:
            reason = str(error.response.get("Error", {}).get("Code", ""))
            http_status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            raise AwsFailed(f"{service} {operation}: {error}", reason, http_status) from error
        except exceptions.BotoCoreError as error:
            raise AwsFailed(f"{service} {operation}: {error}") from error
        return answer
