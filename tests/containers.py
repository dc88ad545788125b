"""The Dockerfile without Docker: built by buildah and run by podman, both Debian's, in storage of their own.

Debian's Python 3.11 stands in for the official Python image, under its name.
"""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.servers import ROOT

PACKAGES = ("buildah", "podman", "runc", "mmdebstrap")
BASE = "docker.io/library/python:3.11-slim-bookworm"
STORE = ROOT / "build" / "image"
LOG = STORE / "build.log"
FREE_BYTES = 25_000_000_000

LIKE_OFFICIAL = (
    "--variant=minbase",
    "--include=ca-certificates,python3-pip,python3-venv",
    '--aptopt=Dir::Cache::pkgcache ""',
    '--aptopt=Dir::Cache::srcpkgcache ""',
    '--customize-hook=ln -s python3 "$1/usr/bin/python"',
    '--customize-hook=rm "$1"/usr/lib/python3*/EXTERNALLY-MANAGED',
)
"""What makes mmdebstrap's root like the official image, as far as the Dockerfile sees it."""


@dataclass(frozen=True, slots=True)
class Built:
    """An image: its layers from the bottom, and how long its build took."""

    layers: tuple[str, ...]
    took_s: float


def lacks() -> str | None:
    """Why nothing can be built here, or None; installs what it may."""
    if os.geteuid() != 0:
        return "only root can make the root of an image"
    if missing := [package for package in PACKAGES if shutil.which(package) is None]:
        if shutil.which("apt-get") is None:
            return f"{', '.join(missing)} missing, and this is no Debian"
        environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for line in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
            done = subprocess.run(["apt-get", "-qq", *line], env=environ, capture_output=True, check=False)
        if done.returncode:
            return f"apt-get can't install {' '.join(missing)}"
    STORE.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(STORE).free
    if free_bytes < FREE_BYTES:
        return f"{STORE} has {free_bytes / 1e9:.0f} GB of free disk, and {FREE_BYTES / 1e9:.0f} are needed"
    return None


def podman(*arguments: str, timeout_s: float = 600) -> str:
    """What podman says, with our storage; fails with what it complains of."""
    done = run_podman(*arguments, timeout_s=timeout_s)
    assert done.returncode == 0, f"podman {arguments[0]}: {(done.stdout + done.stderr)[-4000:]}"
    return done.stdout


def run_podman(*arguments: str, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    """The same, whatever comes of it; output and errors are told apart."""
    own = ["--runtime", "runc", "--cgroup-manager", "cgroupfs", "--events-backend", "none"]
    return subprocess.run(
        ["podman", *_storage(), *own, *arguments],
        env={**os.environ, "DISABLE_HC_SYSTEMD": "true"},  # the timers of health checks
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def _storage() -> list[str]:
    return ["--root", f"{STORE}/root", "--runroot", f"{STORE}/run", "--storage-driver", "overlay"]


def make_base() -> None:
    """Make the stand-in for the base image, unless it is there."""
    if run_podman("image", "exists", BASE).returncode == 0:
        return
    archive = STORE / "base.tar"
    done = subprocess.run(
        ["mmdebstrap", *LIKE_OFFICIAL, "bookworm", archive], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    podman("import", str(archive), BASE)
    archive.unlink()


@contextmanager
def context() -> Iterator[Path]:
    """A copy of what git knows of the repository, in which buildah can read the Dockerfile."""
    with TemporaryDirectory(prefix="ft-image-") as name:
        folder = Path(name)
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for path in listed.stdout.split("\0")[:-1]:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, folder / path)
        dockerfile = (folder / "Dockerfile").read_text()
        assert "COPY --link" in dockerfile
        (folder / "Dockerfile").write_text(dockerfile.replace("COPY --link", "COPY"))
        yield folder


def build(
    folder: Path, target: str, tag: str, arguments: Mapping[str, str], secrets: Mapping[str, str]
) -> Built:
    """The image `tag`: the stage `target` of the Dockerfile in `folder`. What is said goes to `LOG`."""
    conf, paths = pip_settings()
    with TemporaryDirectory() as kept, LOG.open("w") as log:
        line = ["build", "--isolation", "chroot", "--network", "host", "--layers", "--format", "docker"]
        line += [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
        for name, value in {**secrets, "pip_conf": conf}.items():
            Path(kept, name).write_text(value)
            line += ["--secret", f"id={name},src={kept}/{name}"]
        line += [word for path in paths for word in ("--volume", f"{path}:{path}:ro")]
        line += ["--target", target, "--tag", tag, str(folder)]
        began_s = time.monotonic()
        done = subprocess.run(["buildah", *_storage(), *line], stdout=log, stderr=log, check=False)
        took_s = time.monotonic() - began_s
    assert done.returncode == 0, LOG.read_text()[-4000:]
    (found,) = json.loads(podman("image", "inspect", tag))
    return Built(tuple(found["RootFS"]["Layers"]), took_s)


def pip_settings() -> tuple[str, list[str]]:
    """What pip is set to on this machine, as a file of its own, and the paths that are named in it."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    found = dict(re.findall(r"^\S+\.([\w-]+)=(.*)$", done.stdout, re.MULTILINE))
    values = {name: str(ast.literal_eval(value)) for name, value in found.items()}
    words = [word for value in values.values() for word in value.split()]
    # The pages of an index in a folder name files beside it.
    named = [word for word in words if word[0] == "/"]
    named += [str(Path(word.removeprefix("file://")).parent) for word in words if word.startswith("file:///")]
    lines = [f"{name} = {value}" for name, value in values.items()]
    return "\n".join(["[global]", *lines, ""]), sorted({path for path in named if Path(path).exists()})


def sizes(tag: str) -> list[tuple[int, str]]:
    """The layers of the image from the bottom: their bytes, and what made them."""
    history = json.loads(podman("history", "--no-trunc", "--format", "json", tag))
    return [(step["size"], " ".join(step["CreatedBy"].split())) for step in reversed(history) if step["size"]]


@contextmanager
def running(tag: str, *options: str, **environ: str) -> Iterator[str]:
    """A container of the image with what the platforms allow it: little. Yields its id."""
    line = ["run", "--detach", "--network", "none", "--log-driver", "k8s-file"]
    line += ["--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp:rw,mode=1777"]
    line += ["--cap-drop", "all", "--security-opt", "no-new-privileges"]
    for name, limit in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC)):
        most = min(
            4096, resource.getrlimit(limit)[1] % 2**63
        )  # podman's own may be more than a machine allows
        line += ["--ulimit", f"{name}={most}:{most}"]
    line += [word for name, value in environ.items() for word in ("--env", f"{name}={value}")]
    name = podman(*line, *options, tag).strip()
    try:
        yield name
    finally:
        podman("rm", "--force", "--time", "0", name)


def said(name: str) -> str:
    """What a container has written."""
    done = run_podman("logs", name)
    return done.stdout + done.stderr


def health(name: str) -> tuple[int, str]:
    """What the image's HEALTHCHECK says: its exit code and its line."""
    code = run_podman("healthcheck", "run", name).returncode
    (found,) = json.loads(podman("inspect", name))
    state = found["State"].get("Health") or found["State"]["Healthcheck"]
    return code, str(state["Log"][-1]["Output"]).strip()
