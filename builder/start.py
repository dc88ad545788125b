"""A start as a worker makes it, for what it leaves behind: `python -m builder.start`.

Settings come from the environment. Standard output has a line of JSON for each phase as it begins,
`{"phase"}`, and a last one, `{"report", "settings", "flags", "kv_cache", "architecture"}`. Exit codes
are the worker's.
"""

from __future__ import annotations

from handler.__main__ import end, exit_code, remember_start  # isort: skip
# First, because it turns garbage collection off, as a worker does.

import json
import os

from handler import preparation
from handler.engine import Engine
from handler.seam import architecture
from handler.shaping import NOT_SHAPING
from handler.start import begin, open_log, read_settings
from handler.supervision import watch_lifeline


def start() -> None:
    """Load the model, make a token, write down what the next start can use. Raises `StartError`."""
    phases = begin(os.environ)
    phases.listen = lambda name: print(json.dumps({"phase": name}), flush=True)
    settings = read_settings(os.environ)
    open_log(settings)
    if settings.lifeline_fd is not None:
        watch_lifeline(settings.lifeline_fd)
    preparation.check(settings, os.environ)
    prepared = preparation.prepare(settings, phases, os.environ)
    loaded = Engine.start(settings, phases, os.environ, prepared)
    try:
        loaded.wait_open()
        remember_start(loaded.save, os.environ)
        found = {
            "report": phases.report(),
            "settings": prepared.shaping,
            "flags": sorted(vars(prepared.args).keys() - NOT_SHAPING),
            "kv_cache": loaded.kv_cache(),
            "architecture": architecture(),
        }
        print(json.dumps(found), flush=True)
    finally:
        loaded.close()


if __name__ == "__main__":
    end(exit_code(start))
