"""The worker: settings, engine, platform."""

from __future__ import annotations

import gc

gc.disable()  # a third of the import time is collections that free nothing; `Engine` turns it on again

import argparse  # noqa: E402 - after the line above, here and below
import json  # noqa: E402
import logging  # noqa: E402
import multiprocessing  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
import warnings  # noqa: E402
from collections.abc import MutableMapping, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402

from handler import explain, logs, platforms, readahead  # noqa: E402
from handler.engine import Engine, flag_checks, make_parser  # noqa: E402
from handler.errors import BadSettings, StartError, UsageError  # noqa: E402
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
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("serve", help="serve; also without a command")
    commands.add_parser("settings", help="print every setting as Markdown")
    explaining = commands.add_parser("explain", help="show where the time of a cold start went")
    explaining.add_argument(
        "log", nargs="?", help="a worker's log, - for stdin; without it a start is made and explained"
    )
    explaining.add_argument("--svg", metavar="FILE", type=Path, help="draw it into FILE")
    args = parser.parse_args(argv)
    try:
        if args.command == "settings":
            print(render_markdown(TABLE))
        elif args.command == "explain":
            explain_start(args.log, args.svg, os.environ)
        else:
            serve(os.environ)
    except StartError as error:
        print(f"firsttoken: {error}", file=sys.stderr)
        Notifier(os.environ.get("NOTIFY_SOCKET")).failed(error.exit_code, " ".join(str(error).split()))
        return error.exit_code
    except BrokenPipeError:  # `... | head` has seen enough
        return 0
    return 0


def serve(environ: MutableMapping[str, str]) -> None:
    """Load the model and serve it until the platform says stop. Raises `StartError`."""
    readahead.begin(environ)
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
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _give_up)
    engine = Engine.start(settings, phases, environ)
    try:
        platform = platforms.load(settings.platform or platforms.detect(environ))
        platform.prepare(settings)
        engine.wait_open()
        log.info("cold start %s", json.dumps(phases.report()))
        threading.Thread(target=remember_files, args=(environ,), name="remember", daemon=True).start()
        platform.run(settings, engine, phases, notifier)
    finally:
        engine.close()


def remember_files(environ: MutableMapping[str, str]) -> None:
    """Write down what this start has read, for the next one."""
    try:
        readahead.record(readahead.place(environ))
    except OSError as error:
        log.info("no list for read-ahead was kept", extra={"reason": error.strerror})


def explain_start(source: str | None, picture: Path | None, environ: MutableMapping[str, str]) -> None:
    """Show a cold start from the log `source`, or make one and show that."""
    if source is None:
        phases = Phases(process_started_s())
        phases.until_now("interpreter")
        engine = Engine.start(read_settings(environ), phases, environ)
        try:
            engine.wait_open()
        finally:
            engine.close()
        report: explain.Report = phases.report()
    elif source == "-":
        report = explain.find(sys.stdin)
    else:
        try:
            report = explain.find(Path(source).read_text(errors="replace").splitlines())
        except OSError as error:
            raise UsageError(f"{source}: {error.strerror}") from error
    if picture is not None:
        picture.write_text(explain.svg(report))
    print(explain.waterfall(report, width=shutil.get_terminal_size().columns))


def read_settings(environ: MutableMapping[str, str]) -> Settings:
    """The settings; what is wrong with them and with vLLM's flags is reported together."""
    try:
        return Settings.from_environ(environ)
    except BadSettings as ours:
        raise BadSettings(
            [*ours.faults, *flag_faults(make_parser(), environ, checks=flag_checks())]
        ) from None


def _give_up(*_: object) -> None:
    """A signal before the model is loaded: nothing is held, so nothing need be waited for."""
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
