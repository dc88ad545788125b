"""One endpoint in service: what a change of its description means for its workers and for those who wait."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self

import pytest

from gateway.endpoints.admission import Admission
from gateway.endpoints.endpoints import Endpoints
from gateway.endpoints.file import Described, Description
from gateway.endpoints.served import Served
from gateway.settings import GatewaySettings
from gateway.upstreams import Pool
from handler.errors import NotAdmitted
from handler.messages import Call
from tests.pools import OwnedPool
from tests.scripted_app import ScriptedApp

LOCAL = {"MODEL_NAME": "org/m"}
HTTP = {**LOCAL, "UPSTREAM": "http", "UPSTREAM_URL": "http://127.0.0.1:9/v1"}
RUNPOD = {**LOCAL, "UPSTREAM": "runpod"}


class Site:
    """The `Means` of endpoints without processes."""

    def __init__(self) -> None:
        self.pools: list[OwnedPool] = []
        self.adjusted: list[Described] = []

    def pool(self, described: Described) -> OwnedPool:
        """One with a place."""
        self.pools.append(OwnedPool(ScriptedApp({}), places=1, scaling=described.settings.scaling))
        return self.pools[-1]

    def line(self, described: Described, pool: Pool) -> Admission:
        """A queue."""
        settings = described.settings
        return Admission(
            pool,
            limit=settings.queue_limit,
            queue_timeout_s=settings.queue_timeout_s,
            keep_alive_s=settings.keep_alive_s,
        )

    def adjust(self, line: Admission, described: Described) -> None:
        """It is asked to, and that is all."""
        self.adjusted.append(described)

    def guard(self, settings: GatewaySettings, ask: Call) -> Call:
        """Nobody is kept out."""
        return ask


def described(environ: dict[str, str], **workers: str) -> Described:
    """The endpoint of `environ`, whose workers' own is `workers`."""
    return Described(GatewaySettings.from_environ(environ), workers)


@asynccontextmanager
async def served(site: Site, first: Described) -> AsyncIterator[Served]:
    """The endpoint that is described first."""
    endpoint = await Served(first, site).open()
    try:
        yield endpoint
    finally:
        await endpoint.close()


@pytest.mark.parametrize(
    ("before", "change", "replaced"),
    [
        (LOCAL, {"MAX_WORKERS": "2"}, False),
        (LOCAL, {"PRICE_INPUT": "1"}, False),
        (LOCAL, {"QUEUE_LIMIT": "1", "QUEUE_TIMEOUT_S": "1"}, False),
        (LOCAL, {"START_TIMEOUT_S": "1"}, True),
        (LOCAL, HTTP, True),
        (HTTP, {"UPSTREAM_SLOTS": "1"}, True),
        (HTTP, {"UPSTREAM_METRICS": "on"}, True),
        (HTTP, {"QUEUE_TIMEOUT_S": "1"}, True),
        (RUNPOD, {"QUEUE_LIMIT": "1"}, True),
        (RUNPOD, {"MAX_WORKERS": "2"}, False),
    ],
)
async def test_workers_are_replaced_only_if_they_would_be_others(
    before: dict[str, str], change: dict[str, str], *, replaced: bool
) -> None:
    """Whatever changes holds from then on, for the queue too."""
    site, after = Site(), described({**before, **change})
    async with served(site, described(before)) as endpoint:
        await endpoint.change(after)
        assert [pool.life[:1] for pool in site.pools] == [["entered"]] * (1 + replaced)
        assert site.pools[-1].scaling == after.settings.scaling
        assert site.adjusted == [after]
        assert endpoint.endpoint.settings == after.settings
    assert ["left" in pool.life for pool in site.pools] == [True] * len(site.pools)


async def test_a_gateway_that_stops_is_not_reloaded() -> None:
    """Nobody starts workers to drain them."""
    site, one = Site(), described(LOCAL)
    other = described({**LOCAL, "ENDPOINT_ID": "other"})
    endpoints = Endpoints([one], lambda new: Served(new, site), lambda: Description((one, other)))
    async with endpoints:
        endpoints.stop_taking()
        with pytest.raises(NotAdmitted, match="stopping"):
            await endpoints.reload()
        assert (list(endpoints), len(site.pools)) == (["local"], 1)


async def test_another_environment_has_other_workers() -> None:
    """They have read the one that they were started in."""
    site = Site()
    async with served(site, described(LOCAL, MAX_MODEL_LEN="1")) as endpoint:
        await endpoint.change(described(LOCAL, MAX_MODEL_LEN="2"))
    assert len(site.pools) == 2


@pytest.mark.parametrize("opens", [True, False])
async def test_a_start_that_fails_leaves_no_workers(*, opens: bool) -> None:
    """Those that were there by then are ended, whether the next ones can't be made or can't be begun."""

    class Full(Site):
        def pool(self, described: Described) -> OwnedPool:
            if described.id != "other":
                return super().pool(described)
            if not opens:
                raise OSError(28, "No space left on device")
            pool = Unopened(ScriptedApp({}), places=1)
            self.pools.append(pool)
            return pool

    class Unopened(OwnedPool):
        async def __aenter__(self) -> Self:
            raise OSError(28, "No space left on device")

    site, all_ = Full(), [described({**LOCAL, "ENDPOINT_ID": name}) for name in ("one", "other", "third")]
    endpoints = Endpoints(all_, lambda new: Served(new, site), lambda: pytest.fail("nobody reloads"))
    with pytest.raises(OSError, match="No space"):
        async with endpoints:
            pass
    assert [pool.life[-1] for pool in site.pools] == ["left"] * (1 + opens)
