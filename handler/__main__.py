"""The worker: settings, engine, platform."""

from __future__ import annotations

import gc
import os

from handler import levers

if levers.pulled("gc", os.environ):
    gc.disable()  # a third of the import time is collections that free nothing; `Engine` turns it on again

import argparse
import json
import logging
import multiprocessing
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from handler import explain, freeze, logs, machine, platforms, readahead, traces
from handler.engine import Engine
from handler.errors import BadSettings, StartError, Unfit, UsageError
from handler.freezable import FreezableEngine
from handler.listener import listen_unix
from handler.phases import Phases
from handler.settings import TABLE, Settings, readable
from handler.start import begin, open_log, read_settings
from handler.supervision import Notifier, watch_lifeline
from handler.table import render_markdown
from handler.warm import Fork, Parent

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
    warm = commands.add_parser("zygote", help="import once, then fork workers; replace one whose engine died")
    warm.add_argument(
        "--socket", metavar="PATH", type=Path, help="fork workers for the clients of this unix socket"
    )
    freezing = commands.add_parser("freeze", help="load the model, wait to be captured, serve once resumed")
    freezing.add_argument("--barrier", metavar="DIR", type=Path, required=True, help="see docs/coldstart.md")
    freezing.add_argument("--timeout", metavar="SECONDS", type=float, help="how long to wait; none: for ever")
    on_ray = commands.add_parser("ray", help="the same worker as replicas of Ray Serve: docs/scaling.md")
    on_ray.add_argument("action", choices=("up", "status", "down"))
    args = parser.parse_args(argv)
    match args.command:
        case "settings":
            return exit_code(lambda: print(render_markdown(TABLE)))
        case "explain":
            return exit_code(lambda: explain_start(args.log, args.svg, os.environ))
        case "zygote":
            return exit_code(lambda: keep_parent(os.environ, args.socket))
        case "ray":
            return exit_code(lambda: on_cluster(args.action, os.environ))
        case "freeze":
            return exit_code(lambda: freeze_and_serve(os.environ, args.barrier.absolute(), args.timeout))
    return exit_code(lambda: serve(os.environ))


def exit_code(work: Callable[[], int | None]) -> int:
    """Do `work`; what it raises is told to who started this process, and is its exit code."""
    try:
        return work() or 0
    except StartError as error:
        print(f"firsttoken: {error}", file=sys.stderr)
        Notifier(os.environ.get("NOTIFY_SOCKET")).failed(error.exit_code, error.line)
        return error.exit_code
    except BrokenPipeError:  # `... | head` has seen enough
        return 0


def serve(environ: MutableMapping[str, str], fork: Fork | None = None) -> None:
    """Load the model and serve it until the platform says stop. Raises `StartError`."""
    phases = begin(environ) if fork is None else fork.phases
    name = platforms.chosen(environ)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _give_up)
    try:
        settings = read_settings(environ)
    except BadSettings as failure:
        if not platforms.answers_failure(name, environ):
            if name in platforms.TOLD:
                platforms.load(name, readable(environ)).refuse(failure)
            raise
        settings = readable(environ)
        open_log(settings)
        stay(platforms.load(name, settings), failure, tell_parent(settings, phases))
        return
    open_log(settings)
    notifier = tell_parent(settings, phases)
    platform = platforms.load(name, settings)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, partial(_refuse_and_give_up, platform))
    prepared = fork.prepared_for(settings) if fork else None
    traced = traces.open(settings)
    try:
        engine = Engine.start(settings, phases, environ, prepared, platform.fit)
        platform.prepare()
        engine.wait_open()
    except StartError as failure:
        if isinstance(failure, Unfit) or not platforms.answers_failure(name, environ):
            for signum in (signal.SIGTERM, signal.SIGINT):
                signal.signal(signum, signal.SIG_IGN)  # it is ending
            platform.refuse(failure)
            raise
        stay(platform, failure, notifier)
        return
    try:
        log.info("cold start %s", json.dumps(phases.report()))
        keep = fork.teach if fork else engine.save
        remember = partial(remember_start, keep, environ)
        threading.Thread(target=remember, name="remember", daemon=True).start()
        platform.run(engine, phases, notifier)
    finally:
        engine.close()
        if traced is not None:
            traced.close()


def on_cluster(action: str, environ: MutableMapping[str, str]) -> None:
    """Do `action` (`up`, `status` or `down`) with Ray Serve. Raises `StartError`."""
    if not environ.get("RAY_ADDRESS"):
        # Ray reads it as it is imported. It is the one way to have its own ports on loopback, as on macOS.
        environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        ray_serve = platforms.find("ray_serve")
    except ModuleNotFoundError as error:
        raise UsageError(f"Ray Serve is not installed: pip install 'firsttoken[ray]' ({error})") from None
    getattr(ray_serve, action)(environ, partial(print, flush=True))


def stay(platform: platforms.Platform, failure: StartError, notifier: Notifier) -> None:
    """Be up though the worker can't start, and say why to whoever asks."""
    log.error("worker can't start and says so to every request", extra={"reason": str(failure)})
    platform.fail(failure, notifier)


def freeze_and_serve(environ: MutableMapping[str, str], folder: Path, timeout_s: float | None) -> None:
    """Load the model and wait in `folder` to be captured; each copy serves. Raises `StartError`."""
    barrier = freeze.Barrier(folder)
    barrier.clear()
    phases = begin(environ)
    given = dict(environ)
    settings = freeze.settings_to_freeze(read_settings(environ), accelerator=machine.has_accelerator())
    open_log(settings)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _give_up)
    engine = FreezableEngine.start(settings, phases, environ)
    try:
        platforms.find(platforms.chosen(environ))  # so that a copy need not import it
        engine.wait_open()
        log.info("cold start %s", json.dumps(phases.report()))
        remember_start(engine.save, environ)
        frozen = freeze.freeze(engine, environ)
        barrier.announce(frozen, settings.model_id, phases.report())
        log.info("frozen", extra={"slept": frozen.slept, "barrier": str(folder)})
        print(f"frozen: capture process {os.getpid()}, then {folder / freeze.RESUME} resumes it", flush=True)
        late = barrier.wait(timeout_s)

        phases = Phases(time.monotonic())
        phases.facts["parent"] = "snapshot"
        environ.update(late)
        settings = freeze.resumed_settings(given, late)
        logging.getLogger("handler").setLevel(settings.log_level)
        notifier = tell_parent(settings, phases)
        platform = platforms.load(platforms.chosen(environ), settings)
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, partial(_refuse_and_give_up, platform))
        try:
            platform.fit()
            platform.prepare()
            freeze.thaw(engine, frozen, phases, keep_seed=freeze.seeded(settings))
        except StartError as failure:
            platform.refuse(failure)
            raise
        barrier.tell(frozen, phases.report())
        log.info("cold start %s", json.dumps(phases.report()))
        platform.run(engine, phases, notifier)
    finally:
        engine.close()


def tell_parent(settings: Settings, phases: Phases) -> Notifier:
    """Speak to who started or resumed this worker, and end when they are gone."""
    notifier = Notifier(settings.notify_socket)
    phases.listen = notifier.status
    if settings.lifeline_fd is not None:
        watch_lifeline(settings.lifeline_fd)
    return notifier


def keep_parent(environ: MutableMapping[str, str], socket_path: Path | None) -> int:
    """Be a warm parent: of the workers that clients of `socket_path` ask for, or of one worker of its own."""
    listener = listen_unix(socket_path) if socket_path else None  # clients may come before all is imported
    parent = Parent(begin(environ))
    logs.to_stderr("handler", "INFO")
    warnings.simplefilter("ignore", FutureWarning)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _give_up)
    given = dict(environ)  # a worker's own: preparing adds to the environment
    lifeline = environ.get("LIFELINE_FD")
    # Who started the parent waits for its first worker, and hears what keeps that waiting.
    parent.phases.listen = Notifier(environ.get("NOTIFY_SOCKET")).status
    with suppress(BadSettings):  # the worker finds it again, and tells who asked for it
        parent.warm_up(read_settings(environ), environ)
    zygote = parent.zygote(lambda fork: exit_code(lambda: serve(os.environ, fork)))
    if listener is None:
        return zygote.keep(given)
    return zygote.serve(listener, None if lifeline is None else int(lifeline))


def remember_start(keep: Callable[[], None], environ: Mapping[str, str]) -> None:
    """Note for the next start what this one has found out, which `keep` does, and which files it has read."""
    keep()
    try:
        readahead.record(readahead.place(environ))
    except OSError as error:
        log.info("no list for read-ahead was kept", extra={"reason": error.strerror})


def explain_start(source: str | None, picture: Path | None, environ: MutableMapping[str, str]) -> None:
    """Show a cold start from the log `source`, or make one and show that."""
    if source is None:
        phases = begin(environ)
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


def _refuse_and_give_up(platform: platforms.Platform, *_: object) -> None:
    """A signal while the model loads: who waits for it is told, and that is all."""
    platform.refuse(None)
    _give_up()


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
