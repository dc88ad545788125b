"""The worker: settings, engine, platform."""

from __future__ import annotations

import gc

gc.disable()  # a third of the import time is collections that free nothing; `Engine` turns it on again

import argparse  # noqa: E402 - after the line above, here and below
import json  # noqa: E402
import logging  # noqa: E402
import multiprocessing  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import warnings  # noqa: E402
from collections.abc import MutableMapping, Sequence  # noqa: E402

from handler import logs, platforms  # noqa: E402
from handler.engine import Engine, flag_checks, make_parser  # noqa: E402
from handler.errors import BadSettings, StartError  # noqa: E402
from handler.flags import flag_faults  # noqa: E402
from handler.phases import Phases, process_started_s  # noqa: E402
from handler.settings import TABLE, Settings  # noqa: E402
from handler.supervision import Notifier, watch_lifeline  # noqa: E402
from handler.table import render_markdown  # noqa: E402

log = logging.getLogger("handler")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the worker; returns an exit code of sysexits.h (see `handler.errors`)."""
    parser = argparse.ArgumentParser(
        prog="python -m handler",
        description="Serve one model on this platform. Settings come from the environment.",
    )
    parser.add_argument("command", nargs="?", choices=["serve", "settings"], default="serve")
    if parser.parse_args(argv).command == "settings":
        print(render_markdown(TABLE))
        return 0
    try:
        serve(os.environ)
    except StartError as error:
        print(f"firsttoken: {error}", file=sys.stderr)
        Notifier(os.environ.get("NOTIFY_SOCKET")).failed(error.exit_code, " ".join(str(error).split()))
        return error.exit_code
    return 0


def serve(environ: MutableMapping[str, str]) -> None:
    """Load the model and serve it until the platform says stop. Raises `StartError`."""
    phases = Phases(process_started_s())
    phases.until_now("interpreter")
    settings = read_settings(environ)
    logs.to_stderr("handler", settings.log_level)
    warnings.simplefilter("ignore", FutureWarning)  # of vLLM and torch: who runs a worker can't act on them
    for note in settings.notes:
        log.warning("%s", note)
    notifier = Notifier(settings.notify_socket)
    phases.listen = notifier.status
    if settings.lifeline_fd is not None:
        watch_lifeline(settings.lifeline_fd)
    signal.signal(signal.SIGTERM, _give_up)
    engine = Engine.start(settings, phases, environ)
    try:
        platform = platforms.load(settings.platform or platforms.detect(environ))
        engine.wait_open()
        log.info("cold start %s", json.dumps(phases.report()))
        platform.run(settings, engine, phases, notifier)
    finally:
        engine.close()


def read_settings(environ: MutableMapping[str, str]) -> Settings:
    """The settings; what is wrong with them and with vLLM's flags is reported together."""
    try:
        return Settings.from_environ(environ)
    except BadSettings as ours:
        raise BadSettings(
            [*ours.faults, *flag_faults(make_parser(), environ, checks=flag_checks())]
        ) from None


def _give_up(*_: object) -> None:
    """SIGTERM before the model is loaded: nothing is held, so nothing need be waited for."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(0)


def end(code: int) -> None:
    """Leave at once: the interpreter takes seconds to tear torch down, and nothing is left to save."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end(main())
