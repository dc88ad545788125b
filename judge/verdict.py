"""What two runs of the same tests say about the two servers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

UNFINISHED = "it did not finish"
PASSED, FAILED, ERROR, SKIPPED = OUTCOMES = ("passed", "failed", "error", "skipped")


@dataclass(frozen=True, slots=True)
class Run:
    """One side: the outcome of every selected test, why it isn't a pass, what was left out and why."""

    outcomes: Mapping[str, str]
    why: Mapping[str, str]
    left_out: Mapping[str, str]

    @property
    def passed(self) -> int:
        """How many passed."""
        return sum(outcome == PASSED for outcome in self.outcomes.values())


def read(lines: Iterable[str]) -> Run:
    """The report of one side (see `judge.report`).

    A test that was selected and never finished, because its process died, is an error.
    One that fails outside its own body (in a fixture) is an error too, as in pytest.
    """
    outcomes: dict[str, str] = {}
    why: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for line in lines:
        fields = json.loads(line)
        name = fields["nodeid"]
        if "when" not in fields:
            if fields["left_out"] is not None:
                left_out[name] = fields["left_out"]
            else:
                outcomes[name], why[name] = ERROR, UNFINISHED
            continue
        if fields["outcome"] == PASSED:
            if fields["when"] == "call":
                outcomes[name], why[name] = PASSED, ""
            continue
        outcome = FAILED if fields["outcome"] == FAILED else SKIPPED
        outcomes[name] = ERROR if outcome == FAILED and fields["when"] != "call" else outcome
        why[name] = fields["why"]
    return Run(outcomes, why, left_out)


def merged(runs: Iterable[Run]) -> Run:
    """Runs of different tests against one side as one run."""
    outcomes: dict[str, str] = {}
    why: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for run in runs:
        outcomes |= run.outcomes
        why |= run.why
        left_out |= run.left_out
    return Run(outcomes, why, left_out)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Both sides of one selection."""

    vllm: Run
    ours: Run

    @property
    def only_vllm(self) -> list[str]:
        """Tests that pass against vLLM's own server alone."""
        return self._only(self.vllm, self.ours)

    @property
    def only_ours(self) -> list[str]:
        """Tests that pass against ours alone."""
        return self._only(self.ours, self.vllm)

    @property
    def ok(self) -> bool:
        """Whether at least as many pass against ours, and any at all."""
        return self.ours.passed >= self.vllm.passed > 0

    @staticmethod
    def _only(one: Run, other: Run) -> list[str]:
        return sorted(
            name
            for name, outcome in one.outcomes.items()
            if outcome == PASSED and other.outcomes.get(name) != PASSED
        )

    def json(self) -> str:
        """The last line of the judge."""
        return json.dumps(
            {
                "vllm_passed": self.vllm.passed,
                "ours_passed": self.ours.passed,
                "only_vllm": self.only_vllm,
                "only_ours": self.only_ours,
            }
        )

    def text(self) -> str:
        """A table with a row per test file, what was left out, and each difference with its reason."""
        rows = [
            (
                "test file",
                *(f"vllm {outcome}" for outcome in OUTCOMES),
                *(f"ours {outcome}" for outcome in OUTCOMES),
            )
        ]
        files = sorted({_file(name) for run in (self.vllm, self.ours) for name in run.outcomes})
        rows += [(file, *_counts(self.vllm, file), *_counts(self.ours, file)) for file in files]
        rows += [("all", *_counts(self.vllm), *_counts(self.ours))]
        lines = _table(rows)
        reasons = Counter(self.vllm.left_out.values())
        lines += [
            "",
            *(
                f"left out on both sides: {count} tests: {reason}"
                for reason, count in sorted(reasons.items())
            ),
        ]
        for title, names, run in (
            ("passes against vLLM's own server alone", self.only_vllm, self.ours),
            ("passes against ours alone", self.only_ours, self.vllm),
        ):
            lines += ["", f"{title}: {len(names)}"]
            lines += [
                f"  {name}\n    {run.outcomes.get(name, 'not run')}: {run.why.get(name, '')}"
                for name in names
            ]
        return "\n".join(lines)


def _file(name: str) -> str:
    return name.partition("::")[0]


def _counts(run: Run, file: str | None = None) -> list[str]:
    found = Counter(outcome for name, outcome in run.outcomes.items() if file in (None, _file(name)))
    return [str(found[outcome]) for outcome in OUTCOMES]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
