"""What every start of an engine begins with, whoever asked for it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import MutableMapping

from handler import baked, logs, model, readahead
from handler.errors import BadSettings
from handler.flags import flag_faults
from handler.phases import Phases, process_started_s
from handler.preparation import flag_checks
from handler.seam import make_parser
from handler.settings import Settings

log = logging.getLogger("handler")


def begin(environ: MutableMapping[str, str]) -> Phases:
    """Find the bake, ask the disk for files, start the clock: what comes before everything else."""
    baked.adopt(environ)
    readahead.begin(environ)
    phases = Phases(process_started_s())
    phases.until_now("interpreter")
    return phases


def read_settings(environ: MutableMapping[str, str]) -> Settings:
    """The settings of `environ`. Raises `BadSettings` with every fault of theirs and of vLLM's flags."""
    try:
        return model.fetched(model.at_hand(Settings.from_environ(environ)), environ)
    except BadSettings as ours:
        raise BadSettings(
            [*ours.faults, *flag_faults(make_parser(), environ, checks=flag_checks())]
        ) from None


def open_log(settings: Settings) -> None:
    """Log to stderr, first what `settings` give reason to say."""
    logs.to_stderr("handler", settings.log_level)
    warnings.simplefilter("ignore", FutureWarning)  # of vLLM and torch: who runs a worker can't act on them
    for note in settings.notes:
        log.warning("%s", note)
