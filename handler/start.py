"""What every start of an engine begins with, whoever asked for it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import MutableMapping

from handler import baked, logs, model, readahead
from handler.engine import flag_checks, make_parser
from handler.errors import BadSettings
from handler.flags import flag_faults
from handler.phases import Phases, process_started_s
from handler.settings import Settings

log = logging.getLogger("handler")


def begin(environ: MutableMapping[str, str]) -> Phases:
    """What comes before everything: a bake is found, files are asked for, the clock runs."""
    baked.adopt(environ)
    readahead.begin(environ)
    phases = Phases(process_started_s())
    phases.until_now("interpreter")
    return phases


def read_settings(environ: MutableMapping[str, str]) -> Settings:
    """The settings; what is wrong with them and with vLLM's flags is reported together."""
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
