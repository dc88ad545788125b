"""`python -m gateway status`: endpoints, their workers, who waits, and the tokens of today."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from gateway.commands import INTERRUPTED, client
from gateway.commands.client import Client, Place, connected
from gateway.commands.tables import shown_on, table

if TYPE_CHECKING:
    from gateway.commands import Subparsers

HOME_AND_CLEAR = "\x1b[H\x1b[J"
EVERY_MIN_S = 0.05


def add(commands: Subparsers) -> None:
    """`status`."""
    parser = commands.add_parser("status", help="what a running gateway does now", description=__doc__)
    parser.add_argument("--watch", action="store_true", help="again and again, until Ctrl-C")
    parser.add_argument("--every", metavar="SECONDS", type=float, default=2.0, help="how often (default: 2)")
    parser.add_argument("--json", action="store_true", help="as the admin API says it, one line each time")
    client.arguments(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    try:
        asyncio.run(_show(Place.of(args, environ), args))
    except KeyboardInterrupt:
        return 0 if args.watch else INTERRUPTED
    return 0


async def _show(place: Place, args: argparse.Namespace) -> None:
    async with connected(place) as asked:
        while True:
            status = await asked.get("/admin/status")
            if args.json:
                print(shown_on(sys.stdout)(json.dumps(status, ensure_ascii=False)), flush=True)
            else:
                shown = "".join(tables(status, await _tokens_today(asked), time.time()))
                clear = HOME_AND_CLEAR if args.watch and sys.stdout.isatty() else ""
                print(f"{clear}{shown}", end="", flush=True)
            if not args.watch:
                return
            await asyncio.sleep(max(EVERY_MIN_S, args.every))


async def _tokens_today(asked: Client) -> Mapping[str, int]:
    """The tokens of today, prompts and answers, by endpoint."""
    today = datetime.now(UTC).date().isoformat()
    usage = await asked.get("/admin/usage", {"from": today, "group": "endpoint"})
    return {row["endpoint"]: row["prompt_tokens"] + row["completion_tokens"] for row in usage["data"]}


def tables(status: Mapping[str, Any], tokens: Mapping[str, int], now_s: float) -> Iterator[str]:
    """What `/admin/status` says, as text."""
    up_s = max(0.0, now_s - status["started_at"])
    yield f"firsttoken {status['version']}, up {span(up_s)}\n\n"
    head = ("endpoint", "model", "workers", "running", "waiting", "places", "jobs", "tokens today", "")
    rows = [_endpoint(shown, tokens) for shown in status["endpoints"]]
    yield table([head, *rows], right={"running", "waiting", "places", "jobs", "tokens today"})
    workers = [
        _worker(shown["id"], worker, now_s) for shown in status["endpoints"] for worker in shown["workers"]
    ]
    if workers:
        head = ("endpoint", "worker", "state", "pid", "devices", "running", "started", "cold start", "")
        yield "\n" + table([head, *workers], right={"pid", "running", "cold start"})


def _endpoint(shown: Mapping[str, Any], tokens: Mapping[str, int]) -> tuple[Any, ...]:
    states = Counter(worker["state"] for worker in shown["workers"])
    now = ", ".join(
        f"{number} {state}" for state, number in states.items() if state not in {"failed", "ended"}
    )
    return (
        shown["id"],
        shown["model"],
        f"{now or 'none'} (of {shown['min_workers']} to {shown['max_workers']})",
        shown["in_flight"],
        shown["waiting"],
        shown["capacity"],
        sum(shown.get("jobs", {}).get(state, 0) for state in ("IN_QUEUE", "IN_PROGRESS")),
        tokens.get(shown["id"], 0),
        (shown["error"] or "").partition("\n")[0],
    )


def _worker(endpoint_id: str, worker: Mapping[str, Any], now_s: float) -> tuple[Any, ...]:
    ready_s = worker["ready_after_s"]
    return (
        endpoint_id,
        worker["id"],
        worker["state"],
        worker["pid"] or "",
        ",".join(worker["devices"]),
        f"{worker['in_flight']}/{worker['slots']}" if worker["slots"] else worker["in_flight"],
        f"{span(now_s - worker['started_at'])} ago",
        "" if ready_s is None else f"{ready_s:.1f} s",
        worker["reason"] or worker["phase"] or "",
    )


def span(seconds: float) -> str:
    """About how long `seconds` are: `42 s`, `5 min`, `3 h`, `2 d`."""
    for size_s, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size_s:
            return f"{seconds / size_s:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
