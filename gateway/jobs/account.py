"""What a key may ask for through jobs, and what they cost it: as elsewhere (`gateway.accounts.clients`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Connection

from gateway.accounts import usage
from gateway.accounts.clients import MODELS, permit
from gateway.accounts.keys import Keys
from gateway.accounts.limits import Limits
from gateway.accounts.usage import Entry, Prices
from gateway.jobs.table import Job
from handler.errors import BadRequest
from handler.messages import Request
from handler.usage import Usage


@dataclass(frozen=True, slots=True)
class Account:
    """Asks and tells `keys` and `limits`. `terms` are the model and the prices of an endpoint, by its id.

    `tell` hears what was counted.
    """

    keys: Keys
    limits: Limits
    terms: Callable[[str], tuple[str, Prices]]
    tell: Callable[[Entry], None] = lambda _: None

    def sees_all(self, key_id: str) -> bool:
        """Whether the key may see other keys' jobs."""
        return self.keys.of(key_id).admin

    def admit(self, key_id: str, endpoint_id: str, inside: Request | None) -> None:
        """Let a job in that asks the endpoint for `inside`, None if that can't be understood.

        Raises `NoSuchModel`, `BadRequest` and `RateLimited`.
        """
        key = self.keys.of(key_id)
        if inside is not None:
            permit(key, inside, self.terms(endpoint_id)[0])
            if key.models is not None and inside.path.rstrip("/") == MODELS:
                raise BadRequest("Your key has some models only: ask for their list without a job.")
        if inside is None or inside.method == "POST":
            self.limits.take(key)

    def count(self, connection: Connection, job: Job, used: Usage) -> None:
        """Write down what an attempt at `job` has used."""
        usage.add(connection, self._entry(job, used))

    def _entry(self, job: Job, used: Usage) -> Entry:
        model_id, prices = self.terms(job.endpoint_id)
        tokens = (used.prompt_tokens, used.completion_tokens)
        return Entry(job.key_id, job.endpoint_id, used.model or model_id, *tokens, prices.cost_nano(*tokens))

    def spend(self, job: Job, used: Usage) -> None:
        """It is written down: its key's limit hears of it."""
        self.tell(self._entry(job, used))
        self.limits.spend(self.keys.of(job.key_id), used.prompt_tokens + used.completion_tokens)
