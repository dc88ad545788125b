"""`python -m gateway keys`: make, list and revoke keys, whether a gateway runs or not."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from gateway.accounts import key_table
from gateway.accounts.keys import Key
from gateway.commands import kept
from gateway.commands.tables import table
from handler.errors import RequestError, UsageError

if TYPE_CHECKING:
    from gateway.commands import Subparsers

_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def add(commands: Subparsers) -> None:
    """`keys create`, `keys list`, `keys revoke`."""
    keys = commands.add_parser("keys", help="make, list and revoke keys", description=__doc__)
    actions = keys.add_subparsers(required=True, metavar="ACTION")

    create = actions.add_parser("create", help="make a key and print it, once")
    create.add_argument("--name", required=True, help="what it is for")
    create.add_argument(
        "--expires",
        metavar="WHEN",
        type=_seconds_to_come,
        help="a time from now (45m, 12h, 30d, 2w) or a date (2027-01-31: until that day begins, UTC)",
    )
    create.add_argument(
        "--endpoint",
        metavar="ID",
        action="append",
        help="an endpoint that it may use; again for more; without: all",
    )
    create.add_argument(
        "--model", metavar="NAME", action="append", help="a model that it may ask; again for more"
    )
    create.add_argument("--rpm", metavar="N", type=int, help="requests per minute")
    create.add_argument("--tpm", metavar="N", type=int, help="tokens per minute, of prompts and answers")
    create.add_argument("--admin", action="store_true", help="it may use /admin")
    create.set_defaults(run=_create)

    listing = actions.add_parser("list", help="show the keys")
    listing.add_argument("--json", action="store_true", help="as the admin API says it")
    listing.add_argument("--all", action="store_true", help="revoked ones too")
    listing.set_defaults(run=_list)

    revoke = actions.add_parser("revoke", help="let a key open nothing any more")
    revoke.add_argument("key", metavar="ID|NAME")
    revoke.set_defaults(run=_revoke)


def _create(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    now_s = time.time()
    fields = {
        "name": args.name,
        "admin": args.admin,
        "endpoints": args.endpoint,
        "models": args.model,
        "requests_per_minute": args.rpm,
        "tokens_per_minute": args.tpm,
        "expires_at": args.expires,
    }
    with kept(environ) as store:
        try:
            key, made = store.write_now(partial(key_table.create, new=key_table.parse(fields, now_s)))
        except RequestError as error:
            raise UsageError(error.message) from None
    print(f"{key.id} ({key.name}); it is not shown again:", file=sys.stderr)
    print(made)
    return 0


def _list(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    with kept(environ, made=False) as store:
        keys, _ = store.read_now(key_table.load)
    shown = [key for key in keys if args.all or key.revoked_s is None]
    if args.json:
        print(json.dumps({"data": [key.view() for key in shown]}, indent=2, ensure_ascii=False))
        return 0
    now_s = time.time()
    head = ("id", "name", "made", "used", "expires", "endpoints", "models", "rpm", "tpm", "")
    print(table([head, *(_row(key, now_s) for key in shown)], right={"rpm", "tpm"}), end="")
    return 0


def _row(key: Key, now_s: float) -> tuple[Any, ...]:
    marks = (
        ("admin", key.admin),
        ("revoked", key.revoked_s is not None),
        ("expired", key.expires_s is not None and key.expires_s <= now_s),
    )
    return (
        key.id,
        key.name,
        _day(key.created_s),
        _day(key.last_used_s) or "never",
        _day(key.expires_s) or "never",
        "all" if key.endpoints is None else " ".join(sorted(key.endpoints)),
        "all" if key.models is None else " ".join(sorted(key.models)),
        key.requests_per_minute or "",
        key.tokens_per_minute or "",
        " ".join(mark for mark, holds in marks if holds),
    )


def _revoke(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    with kept(environ, made=False) as store:
        try:
            key = store.write_now(partial(key_table.revoke, name=args.key, now_s=time.time()))
        except RequestError as error:
            raise UsageError(error.message) from None
    print(f"{key.id} ({key.name}) is revoked", file=sys.stderr)
    return 0


def _seconds_to_come(value: str) -> int:
    """Unix seconds of `30d` from now, or of a date."""
    if span := re.fullmatch(r"(\d{1,5})([mhdw])", value, re.ASCII):
        return int(time.time() + timedelta(**{_UNITS[span[2]]: int(span[1])}).total_seconds())
    try:
        at_s = int(datetime.strptime(value, "%Y-%m-%d").replace(tzinfo=UTC).timestamp())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is neither a span such as 30d nor a date") from None
    if at_s <= time.time():
        raise argparse.ArgumentTypeError(f"{value!r} has begun already, UTC")
    return at_s


def _day(at_s: int | None) -> str:
    return "" if at_s is None else datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d")
