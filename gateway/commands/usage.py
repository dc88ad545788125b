"""`python -m gateway usage`: what was used, whether a gateway runs or not."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from gateway.accounts.report import Question, money, report
from gateway.commands import kept
from gateway.commands.tables import shown_on, table
from handler.errors import RequestError, UsageError

if TYPE_CHECKING:
    from gateway.commands import Subparsers

_NUMBERS = ("requests", "prompt", "completion", "cost")


def add(commands: Subparsers) -> None:
    """`usage`, with its filters."""
    usage = commands.add_parser("usage", help="show what was used, and its cost", description=__doc__)
    usage.add_argument("--from", dest="from_", metavar="DAY", help="2027-01-31, UTC; without: from the first")
    usage.add_argument("--to", metavar="DAY", help="that day included")
    usage.add_argument("--key", metavar="ID|NAME")
    usage.add_argument("--model", metavar="NAME")
    usage.add_argument("--endpoint", metavar="ID")
    usage.add_argument(
        "--by", metavar="day,key,endpoint,model", default="day,key", help="default: %(default)s"
    )
    form = usage.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true")
    form.add_argument("--json", action="store_true", help="as the admin API says it")
    usage.set_defaults(run=_run)


def _run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    fields = {
        "from": args.from_,
        "to": args.to,
        "key": args.key,
        "endpoint": args.endpoint,
        "model": args.model,
        "group": args.by,
    }
    try:
        given = {name: value for name, value in fields.items() if value is not None}
        question = Question.parse(given, lambda name: "--by" if name == "group" else f"--{name}")
    except RequestError as error:
        raise UsageError(error.message) from None
    with kept(environ, made=False) as store:
        found = store.read_now(partial(report, question=question))
    shown = shown_on(sys.stdout)
    if args.json:
        print(shown(json.dumps(found.view(), indent=2, ensure_ascii=False)))
        return 0
    if args.csv:
        print(shown(found.csv()), end="")
        return 0
    names = ["key_name" if name == "key" else name for name in question.by]
    rows = [[*(row[name] for name in names), *_counts(row)] for row in found.rows]
    total = ["total", *[""] * (len(names) - 1), *_counts(found.totals)]
    print(table([[*question.by, *_NUMBERS], *rows, total], right=_NUMBERS), end="")
    return 0


def _counts(row: Mapping[str, int]) -> tuple[object, ...]:
    return row["requests"], row["prompt_tokens"], row["completion_tokens"], money(row["cost_nano"])
