"""What the endpoints of a gateway have in common: the machine they run on, and who hears of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.accounts.clients import Clients
from gateway.accounts.usage import Prices
from gateway.endpoints.admission import Admission
from gateway.endpoints.file import Described
from gateway.endpoints.served import Served, refusals
from gateway.metrics import Metrics
from gateway.settings import GatewaySettings
from gateway.upstreams import Pool
from gateway.upstreams.control_plane import ControlPlane
from gateway.upstreams.devices import Devices
from gateway.upstreams.events import Event, Ready
from gateway.upstreams.http import HttpPool, Upstream
from gateway.upstreams.launch import Fresh, Launcher, WarmParent
from gateway.upstreams.line import Line
from gateway.upstreams.local import LocalPool
from gateway.upstreams.pool import Keep
from gateway.upstreams.runpod import RunpodPool
from gateway.upstreams.successive import OwnPool
from handler.messages import Call

if TYPE_CHECKING:
    from handler.otel import Traces


class Site:
    """Makes endpoints of their descriptions (`gateway.endpoints.served.Means`).

    Their workers are `command`, run on the devices that `environ` lets this process see, and what they write
    is kept in a folder of `logs` for each endpoint. `tell` hears, on the loop, what happens to whose workers.
    """

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        *,
        logs: Path,
        metrics: Metrics,
        traces: Traces | None,
        clients: Clients,
        tell: Callable[[str, Event], None],
    ) -> None:
        self._command = command
        self._logs = logs
        self._metrics = metrics
        self._traces = traces
        self._clients = clients
        self._tell = tell
        self._devices = Devices.of_machine(environ)

    def serve(self, described: Described) -> Served:
        """The endpoint that is described, not opened yet."""
        return Served(described, self)

    def pool(self, described: Described) -> OwnPool:
        """Workers, of whom none is started yet."""
        settings = described.settings
        own = self._metrics.endpoint(described.id)

        def tell(event: Event) -> None:
            own.tell(event)
            if self._traces is not None and isinstance(event, Ready):
                self._traces.started(event.cold_start, of=described.id)
            self._tell(described.id, event)

        if settings.upstream == "http":
            assert settings.upstream_url is not None, "checked with the settings"
            return HttpPool(
                Upstream(
                    settings.upstream_url,
                    settings.upstream_key,
                    settings.upstream_slots,
                    settings.upstream_metrics,
                ),
                queue_timeout_s=settings.queue_timeout_s,
                keep_alive_s=settings.keep_alive_s,
                tell=tell,
            )

        def launcher(private: Path) -> Launcher:
            warm = settings.warm_parent
            return WarmParent(self._command, private / "parent.sock") if warm else Fresh(self._command)

        keep = Keep(
            at_once=settings.start == "now",
            start_timeout_s=settings.start_timeout_s,
            drain_timeout_s=settings.drain_timeout_s,
            scaling=settings.scaling,
            devices=self._devices,
            logs=self._logs / described.id,
            shared_by=described.shared_by,
            tell=tell,
        )
        if settings.upstream == "local":
            return LocalPool(launcher, described.environ, keep)
        line = Line(
            own,
            limit=settings.queue_limit,
            queue_timeout_s=settings.queue_timeout_s,
            execution_timeout_s=settings.execution_timeout_s,
        )
        return RunpodPool(launcher, described.environ, ControlPlane(described.id, line, own), keep)

    def line(self, described: Described, pool: Pool) -> Admission:
        """The queue in front of `pool`."""
        settings, own = described.settings, self._metrics.endpoint(described.id)
        return Admission(
            pool,
            limit=settings.queue_limit,
            queue_timeout_s=settings.queue_timeout_s,
            keep_alive_s=settings.keep_alive_s,
            check=refusals(described),
            tell=own.admitted,
        )

    def adjust(self, line: Admission, described: Described) -> None:
        """Have `line` keep to the bounds that are described."""
        settings = described.settings
        line.adjust(
            limit=settings.queue_limit,
            queue_timeout_s=settings.queue_timeout_s,
            keep_alive_s=settings.keep_alive_s,
            check=refusals(described),
        )

    def guard(self, settings: GatewaySettings, ask: Call) -> Call:
        """The call that clients have: the limits of their keys and metering around `ask`."""
        return self._clients.call(
            ask,
            endpoint_id=settings.endpoint_id,
            model_id=settings.model_id,
            prices=Prices(settings.price_input, settings.price_output),
        )
