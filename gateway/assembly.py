"""What answers in a gateway, put together: endpoints, jobs, files, batches, accounts, over one database."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Self

from sqlalchemy.exc import SQLAlchemyError

from gateway.accounts.clients import Clients
from gateway.accounts.key_table import Following
from gateway.accounts.keys import Keys
from gateway.accounts.levels import Levels
from gateway.accounts.limits import Limits
from gateway.accounts.metering import Metering
from gateway.accounts.usage import Prices
from gateway.admin import Admin
from gateway.app import Doorkeeper, Gateway, Part
from gateway.batches import table as batch_table
from gateway.batches.routes import Batches
from gateway.batches.run import Means
from gateway.batches.runs import BatchRuns
from gateway.control import Control
from gateway.database import StoreUnusable, reason
from gateway.endpoints.endpoints import Changes, Endpoints
from gateway.endpoints.file import Description, describe
from gateway.endpoints.site import Site
from gateway.files.routes import Files
from gateway.files.store import FileStore
from gateway.instances import Instance
from gateway.jobs import Jobs
from gateway.jobs.account import Account
from gateway.jobs.destinations import Allowed
from gateway.jobs.routes import JobRoutes, worker_counts
from gateway.jobs.webhooks import Webhooks
from gateway.metrics import Metrics
from gateway.page import Page
from gateway.page.session import Session
from gateway.parts import OpenAI, Operations, is_loopback
from gateway.scrape import Target
from gateway.settings import GatewaySettings
from gateway.store import Store
from gateway.upstreams.events import Event
from handler.errors import BadSettings, NoResources

if TYPE_CHECKING:
    from handler.otel import Traces


@dataclass(frozen=True, slots=True)
class Base:
    """What stands before anything answers. `tell` hears what happens to which endpoint's workers."""

    settings: GatewaySettings
    environ: Mapping[str, str]
    worker: Sequence[str]
    store: Store
    keys: Keys
    following: Following
    traces: Traces | None
    tell: Callable[[str, Event], None]


class Assembly:
    """The parts of a gateway on `base`, with the endpoints that are described. Used as `async with`."""

    def __init__(self, base: Base, description: Description) -> None:
        settings, store, keys = base.settings, base.store, base.keys
        self._traces = base.traces
        self._metrics, self._limits = Metrics(), Limits()
        self._store, self._instance = store, Instance(store)
        self._levels = Levels(store, self._limits)
        instance = self._instance.id
        self._metering = Metering(store, keys, self._limits, instance=instance, tell=self._metrics.used)
        site = Site(
            base.worker,
            base.environ,
            logs=settings.data_dir / "logs",
            metrics=self._metrics,
            traces=base.traces,
            clients=Clients(keys, self._limits, self._metering),
            tell=base.tell,
        )
        self.endpoints = endpoints = Endpoints(
            description.endpoints, site.serve, partial(_again, base.environ)
        )
        account = Account(keys, self._limits, partial(_terms, endpoints), self._metrics.used)
        webhooks = Allowed.of(settings.webhook_hosts)
        self._jobs = Jobs(
            store,
            endpoints,
            costs=account,
            limit=settings.jobs_limit,
            closed=keys.closed,
            webhooks=Webhooks(store, webhooks, instance=instance),
            instance=instance,
            drain_s=settings.drain_timeout_s,
        )
        endpoints.listen(partial(_wake, self._jobs))
        keys.heard.append(self._jobs.keys_changed)
        files = FileStore(
            store,
            settings.data_dir / "files",
            max_file_bytes=settings.max_file_bytes,
            max_stored_bytes=settings.max_stored_bytes,
        )
        means = Means(store, files, keys, endpoints, settings.max_body_bytes, self._metrics.used, instance)
        self._batches = BatchRuns(means)
        self._control = Control(endpoints, self._jobs.counts)
        self._metrics.watch(self._control.statuses, partial(_targets, endpoints))
        self._parts: list[Part] = [
            Files(files, endpoints, keys, batch_table.check_delete),
            Batches(self._batches, endpoints, keys),
            JobRoutes(self._jobs, endpoints, account, webhooks, partial(_workers, endpoints)),
            OpenAI(endpoints),
            Admin(store, base.following),
            self._control,
            Operations(keys, self._metrics, endpoints, open_metrics=is_loopback(settings.host)),
            Session(keys, endpoints),
            Page.open(),
        ]
        self._stack = AsyncExitStack()

    def gateway(self, keys: Doorkeeper) -> Gateway:
        """All of it, for those whom `keys` lets in."""
        return Gateway(self._parts, keys, self._metrics, self._limits, self._traces)

    async def __aenter__(self) -> Self:
        """Raises `StartError`, and has then left nothing behind."""
        with faults_told():
            accounts = (self._instance, self._levels, self._metering)
            async with AsyncExitStack() as stack:
                for part in (*accounts, self.endpoints, self._jobs, self._batches):
                    await stack.enter_async_context(part)
                self._stack = stack.pop_all()
        self._instance.adopters += [self._metering.adopt, self._jobs.adopt, self._batches.adopt]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def stop(self) -> None:
        """Begin nothing more, and have workers drain."""
        self._instance.adopters.clear()
        self._store.give_up()
        self._control.stop()
        self._jobs.stop_taking()
        self._batches.stop()
        self.endpoints.stop_taking()


@contextmanager
def faults_told() -> Iterator[None]:
    """Raises `StartError` for what the disk, the database or the system refuse."""
    try:
        yield
    except SQLAlchemyError as error:
        raise StoreUnusable(f"the gateway's database can't be used: {reason(error)}") from error
    except OSError as error:
        raise NoResources(f"the gateway can't start: {error}") from error


def _again(environ: Mapping[str, str]) -> Description:
    settings, description = describe(environ)
    if settings.endpoints_file is None:
        raise BadSettings(["no ENDPOINTS_FILE is set: what the environment says holds until the next start"])
    return description


def _wake(jobs: Jobs, changes: Changes) -> None:
    """Begin what was left for endpoints that are there again."""
    for endpoint_id in changes.added:
        jobs.wake(endpoint_id)


def _terms(endpoints: Endpoints, endpoint_id: str) -> tuple[str, Prices]:
    """The model of an endpoint, and what it costs."""
    settings = endpoints.described(endpoint_id)
    return settings.model_id, Prices(settings.price_input, settings.price_output)


def _workers(endpoints: Endpoints, endpoint_id: str) -> Mapping[str, int]:
    """The workers of an endpoint, as RunPod counts them."""
    return worker_counts((view.state, view.in_flight) for view in endpoints[endpoint_id].workers.views)


def _targets(endpoints: Endpoints) -> list[Target]:
    """The workers that say how they are."""
    return [
        Target(endpoint_id, worker_id, call)
        for endpoint_id, endpoint in endpoints.items()
        for worker_id, call in endpoint.workers.askable.items()
    ]
