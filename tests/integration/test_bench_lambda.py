"""`make bench-lambda` in small: its paths, its line, and what it makes of what it heard."""

from __future__ import annotations

import argparse

import pytest

from bench import lambda_path
from bench.stream import Heard
from tests.integration.test_bench_stream import carried_out


def test_a_token_is_late_by_what_passes_after_it_was_made() -> None:
    """The first is made when it is asked for, the others at their rate."""
    assert lambda_path.delays_ms(Heard([0.002, 0.105, 0.201]), 10.0) == pytest.approx([2.0, 5.0, 1.0])


def test_the_benchmark_runs_and_ends_with_its_line() -> None:
    """Both paths, the real engine; no word on how fast they are."""
    table, found = carried_out("lambda_path", "--fast-tokens", "50")
    assert {"added_ttft_ms", "added_first_ms", "added_token_ms", "tokens_ratio"} <= found.keys()
    assert found["rounds"] == 1
    assert sum("through Lambda" in row for row in table) == 3


def test_the_defaults_are_those_of_the_page() -> None:
    """Five rounds of 300 tokens at 200/s."""
    options: argparse.Namespace = lambda_path.parser({}).parse_args([])
    assert (options.rounds, options.tokens, options.tokens_per_s) == (5, 300, 200.0)
