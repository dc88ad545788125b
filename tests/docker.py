"""A Docker engine where there is none: Debian 13's, in a root of its own, for as long as a test takes.

`docker` runs in that root too; a build's context has to be in it. Images and caches are kept in
build/image for the next time. Debian 12 with its Python 3.11 stands in for the official Python image.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from tests.servers import ROOT

STORE = ROOT / "build" / "image"
ENGINE = STORE / "engine"
SOCKET = "unix:///var/docker.sock"
BASE = "python:3.11-slim-bookworm"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
FREE_BYTES = 25_000_000_000
START_TIMEOUT_S = 60.0
LOOK_S = 0.1

START = f"""
set -e
cd {ENGINE}
mount --make-rprivate /
mount --bind . .
cd {ENGINE}
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
mount -t tmpfs tmpfs run
cp /etc/resolv.conf /etc/hosts etc/
cp {CERTIFICATES} etc/ssl/certs/
mkdir -p before
pivot_root . before
umount --lazy /before
exec dockerd --host {SOCKET} --storage-driver overlay2 --bridge none --iptables=false --ip6tables=false
"""
"""The root is really another one, and not chroot's: else `docker exec` ends up in the one before."""

LIKE_OFFICIAL = (
    "--include=ca-certificates,python3-pip,python3-venv",
    '--aptopt=Dir::Cache::pkgcache ""',
    '--aptopt=Dir::Cache::srcpkgcache ""',
    '--customize-hook=ln -s python3 "$1/usr/bin/python"',
    '--customize-hook=rm "$1"/usr/lib/python3*/EXTERNALLY-MANAGED',
    f"--customize-hook=upload {CERTIFICATES} {CERTIFICATES}",
)
"""What makes a root like the official image, as far as the Dockerfile sees it."""


class Docker:
    """The client of the engine that `engine` has started."""

    def __call__(self, *arguments: str, environ: Mapping[str, str] | None = None) -> str:
        """What `docker ARGUMENTS` says; fails with what it complains of."""
        done = self._run(*arguments, environ=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert done.returncode == 0, f"docker {arguments[0]}: {(done.stdout + done.stderr)[-4000:]}"
        return done.stdout

    def build(self, *arguments: str, log: Path, environ: Mapping[str, str]) -> float:
        """Build what is in the folder of `context`; what is said goes to `log`. Returns the seconds."""
        line = ["buildx", "build", "--network", "host", "--progress", "plain", *arguments, "/context"]
        began_s = time.monotonic()
        with log.open("w") as opened:
            done = self._run(*line, environ=environ, stdout=opened, stderr=opened)
        assert done.returncode == 0, log.read_text()[-4000:]
        return time.monotonic() - began_s

    def logs(self, container: str) -> str:
        """What a container has written, errors too."""
        return self._run("logs", container, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout

    def layers(self, image: str) -> list[str]:
        """The digests of the layers of `image`, from the bottom."""
        found: list[str] = json.loads(self("image", "inspect", image, "--format", "{{json .RootFS.Layers}}"))
        return found

    def _run(
        self, *arguments: str, environ: Mapping[str, str] | None = None, **output: Any
    ) -> subprocess.CompletedProcess[str]:
        line = ["chroot", str(ENGINE), "docker", "--host", SOCKET, *arguments]
        own = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", **(environ or {})}
        return subprocess.run(line, env=own, text=True, check=False, **output)


def lacks() -> str | None:
    """Why no engine can run here, or None; installs mmdebstrap where it may."""
    if os.geteuid() != 0:
        return "only root can start a Docker engine"
    if shutil.which("mmdebstrap") is None:
        if shutil.which("apt-get") is None:
            return "mmdebstrap is missing, and this is no Debian"
        environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for line in (["update"], ["install", "-y", "--no-install-recommends", "mmdebstrap"]):
            done = subprocess.run(["apt-get", "-qq", *line], env=environ, capture_output=True, check=False)
        if done.returncode:
            return "apt-get can't install mmdebstrap"
    STORE.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(STORE).free
    if free_bytes < FREE_BYTES:
        return f"{STORE} has {free_bytes / 1e9:.0f} GB of free disk, and {FREE_BYTES / 1e9:.0f} are needed"
    return None


@contextmanager
def engine() -> Iterator[Docker]:
    """An engine, with the base image in it."""
    if not (ENGINE / "usr/sbin/dockerd").exists():
        _bootstrap("trixie", ENGINE, "--include=ca-certificates,docker.io,docker-buildx,docker-cli")
    docker, log = Docker(), STORE / "dockerd.log"
    with log.open("w") as opened:
        process = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", START],
            stdin=subprocess.DEVNULL,
            stdout=opened,
            stderr=opened,
        )
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while "API listen on" not in log.read_text():
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline_s, log.read_text()[-4000:]
            time.sleep(LOOK_S)
        if not docker("image", "ls", "--quiet", BASE):
            _bootstrap("bookworm", ENGINE / "base.tar", *LIKE_OFFICIAL)
            docker("import", "/base.tar", BASE)
            (ENGINE / "base.tar").unlink()
        yield docker
    finally:
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGTERM)
        process.wait()


def _bootstrap(suite: str, target: Path, *options: str) -> None:
    done = subprocess.run(
        ["mmdebstrap", "--variant=minbase", *options, suite, target],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@contextmanager
def context() -> Iterator[Path]:
    """A copy of what git knows of the repository, as the context of builds."""
    folder = ENGINE / "context"
    shutil.rmtree(folder, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for path in listed.stdout.split("\0")[:-1]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / path)
    yield folder
    shutil.rmtree(folder)


@contextmanager
def pip_settings() -> Iterator[str]:
    """What pip is set to on this machine, as a file; folders in it are served on loopback meanwhile."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    found = dict(re.findall(r"^\S+\.([\w-]+)=(.*)$", done.stdout, re.MULTILINE))
    values = {name: str(ast.literal_eval(value)).split() for name, value in found.items()}
    served: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if any(self.path.startswith(path) for path in served) and ".." not in self.path:
                super().do_GET()
            else:
                self.send_error(404)

        def log_message(self, *_: object) -> None:
            """Keep the output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory="/")) as server:

        def reachable(word: str) -> str:
            path = word.removeprefix("file://")
            if path == CERTIFICATES or not path.startswith("/") or not Path(path).exists():
                return word
            # The pages of an index in a folder name files beside it.
            served.append(str(Path(path).parent) if word != path else path)
            return f"http://127.0.0.1:{server.server_port}{path}{'/' if Path(path).is_dir() else ''}"

        lines = [f"{name} = {' '.join(map(reachable, words))}" for name, words in values.items()]
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield "\n".join(["[global]", *lines, ""])
        finally:
            server.shutdown()
            thread.join()
