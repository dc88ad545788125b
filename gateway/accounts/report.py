"""Questions about usage and their answers, as rows, JSON's values and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, and_, case, func, literal, or_, select

from gateway.accounts.key_table import TABLE as KEYS
from gateway.accounts.keys import ENV_ID, ENV_NAME, OWNER_ID, OWNER_NAME
from gateway.accounts.usage import USAGE
from handler.errors import BadRequest

_IDS = {ENV_NAME: ENV_ID, OWNER_NAME: OWNER_ID}
"""Of what has no row among the keys."""
_NAME = case(
    (USAGE.c.key_id == OWNER_ID, literal(OWNER_NAME)), else_=func.coalesce(KEYS.c.name, literal(ENV_NAME))
)
_GROUPS: Mapping[str, Mapping[str, ColumnElement[Any]]] = {
    "day": {"day": USAGE.c.day},
    "key": {"key_id": USAGE.c.key_id, "key_name": _NAME},
    "endpoint": {"endpoint": USAGE.c.endpoint},
    "model": {"model": USAGE.c.model},
}
_SUMS = ("requests", "prompt_tokens", "completion_tokens", "cost_nano")


@dataclass(frozen=True, slots=True)
class Question:
    """Which usage is asked for, both days included, and what it is grouped `by`. None is all."""

    first_day: date | None = None
    last_day: date | None = None
    key: str | None = None
    """Id or name."""
    endpoint: str | None = None
    model: str | None = None
    by: tuple[str, ...] = tuple(_GROUPS)

    @classmethod
    def parse(cls, fields: Mapping[str, str], called: Callable[[str], str] = str) -> Question:
        """The question that `fields` (from, to, key, endpoint, model, group) ask.

        Raises `BadRequest`, which names every fault, and fields as who asks has `called` them.
        """
        faults = [f"`{name}` is not a field of a question" for name in sorted(fields.keys() - _FIELDS)]

        def day(name: str) -> date | None:
            try:
                return date.fromisoformat(text) if (text := fields.get(name)) else None
            except ValueError:
                faults.append(f"`{called(name)}` must be a day, such as 2027-01-31")
                return None

        first_day, last_day = day("from"), day("to")
        if first_day and last_day and first_day > last_day:
            faults.append(f"`{called('from')}` must not be after `{called('to')}`")
        by = tuple(name.strip() for name in fields.get("group", "").split(",") if name.strip())
        if set(by) - set(_GROUPS) or len(set(by)) < len(by):
            faults.append(f"`{called('group')}` must be some of {', '.join(_GROUPS)}, each once")
        if faults:
            raise BadRequest(f"That can't be answered: {'; '.join(faults)}.", code="invalid_question")
        named = {name: fields.get(name) or None for name in ("key", "endpoint", "model")}
        return cls(first_day, last_day, **named, by=by or tuple(_GROUPS))


_FIELDS = {"from", "to", "key", "endpoint", "model", "group"}


@dataclass(frozen=True, slots=True)
class Report:
    """What was used: a row for each group, in order, and the sums of all. `cost_nano` is in billionths."""

    by: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    totals: Mapping[str, int]

    def view(self) -> dict[str, Any]:
        """What the admin API says."""
        return {"data": [_view(row) for row in self.rows], "totals": _view(self.totals)}

    def csv(self) -> str:
        """A line of names, then one for each row. No cell is a formula to who opens it as a table."""
        out = io.StringIO()
        names = [*(name for group in self.by for name in _GROUPS[group]), *_SUMS[:-1], "cost"]
        lines = csv.DictWriter(out, names, lineterminator="\r\n")
        lines.writeheader()
        for row in self.rows:
            cells = {**_view(row), "cost": money(row["cost_nano"])}
            lines.writerow({name: _no_formula(cell) for name, cell in cells.items()})
        return out.getvalue()


def report(connection: Connection, question: Question) -> Report:
    """The answer to `question`."""
    groups = {name: column for group in question.by for name, column in _GROUPS[group].items()}
    sums = [func.coalesce(func.sum(USAGE.c[name]), 0).label(name) for name in _SUMS]
    asked = and_(*_conditions(question))
    joined = USAGE.outerjoin(KEYS, USAGE.c.key_id == KEYS.c.id)
    labelled = [column.label(name) for name, column in groups.items()]
    rows = connection.execute(
        select(*labelled, *sums)
        .select_from(joined)
        .where(asked)
        .group_by(*groups.values())
        .order_by(*groups.values())
    )
    totals = connection.execute(select(*sums).select_from(joined).where(asked))
    return Report(question.by, tuple(map(_numbers, rows.mappings())), _numbers(totals.mappings().one()))


def _conditions(question: Question) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = [literal(value=True)]
    if question.first_day is not None:
        found.append(USAGE.c.day >= question.first_day)
    if question.last_day is not None:
        found.append(USAGE.c.day <= question.last_day)
    if question.key is not None:
        name = _IDS.get(question.key, question.key)
        found.append(or_(USAGE.c.key_id == name, KEYS.c.name == name))
    if question.endpoint is not None:
        found.append(USAGE.c.endpoint == question.endpoint)
    if question.model is not None:
        found.append(USAGE.c.model == question.model)
    return found


def _numbers(row: RowMapping) -> dict[str, Any]:
    # PostgreSQL's sums of whole numbers are Decimals.
    return {str(name): int(value) if name in _SUMS else value for name, value in row.items()}


def _no_formula(cell: object) -> object:
    """`cell` with an apostrophe before it if it is a text that a spreadsheet would work out."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@")) else cell


def _view(row: Mapping[str, Any]) -> dict[str, Any]:
    shown = {name: value for name, value in row.items() if name != "cost_nano"}
    if "day" in shown:
        shown["day"] = shown["day"].isoformat()
    return {**shown, "cost": row["cost_nano"] / 10**9}


def money(nano: int) -> str:
    """Billionths as a decimal number, exactly, with at least two decimals."""
    whole, rest = divmod(nano, 10**9)
    return f"{whole}.{f'{rest:09d}'.rstrip('0'):0<2}"
