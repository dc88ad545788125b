"""`make test-image`: the Dockerfile built for CPUs with the tests' small model in it, and the image run.

Needs root; installs buildah, podman, crun and mmdebstrap of Debian's where they are missing. Says why
if it can't run. Then, in storage of its own under build/image:

1. A root of Debian's with its Python 3.11, under the name of the official Python image.
2. The target `baked` of the Dockerfile, built by buildah: the model comes from a hub on loopback that
   wants the token, which is given as a secret.
3. The image, run by podman as a user that it does not know, without capabilities and without a network,
   all but /tmp read-only: what the health check says, a token, and SIGTERM.
4. The same again after a change of our code, and after one of the builder's: which layers are others.

What this does not try is printed at the end.
"""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.hub import Hub, serving
from tests.servers import MAX_MODEL_LEN, ROOT, START_TIMEOUT_S, STOP_TIMEOUT_S

PACKAGES = ("buildah", "podman", "crun", "mmdebstrap")
BASE = "docker.io/library/python:3.11-slim-bookworm"
IMAGE = "localhost/firsttoken:cpu-baked"
MODEL = "tests/tinychat"
TOKEN = "hf_a-token-that-must-be-nowhere"
KEY = "ft-a-key"
USER = "54321:54321"
STORE = ROOT / "build" / "image"
FREE_BYTES = 25_000_000_000
LOOK_S = 0.5

ASK = """
import openai
with openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="{key}", max_retries=0) as client:
    (model,) = (model.id for model in client.models.list())
    said = client.chat.completions.create(
        model=model, messages=[{{"role": "user", "content": "What is the capital of France?"}}], temperature=0
    )
    print(model, said.choices[0].message.content, sep="\\n")
"""

LOOK = """
import os, sys
from importlib.util import cache_from_source
from pathlib import Path
from handler.prerequisites import check
check()
sources = [path for folder in ("/opt/venv/lib", "/app") for path in Path(folder).rglob("*.py")]
missing = [path for path in sources if not os.path.exists(cache_from_source(str(path)))]
ours = [path for folder in ("/app", "/bake", "/opt") for path in Path(folder).rglob("*")]
writable = [path for path in ours if os.access(path, os.W_OK)]
print(len(sources), len(missing), len(writable), os.getuid())
"""

NOT_TRIED = (
    "the base image itself: Debian's Python 3.11 stands in for python:3.11-slim-bookworm",
    "the engine for GPUs: its base image vllm/vllm-openai is in a registry",
    "BuildKit: buildah reads the Dockerfile, without `--link` and `# syntax`, which it does not know",
    "docker buildx bake: docker-bake.hcl is only read, by tests/unit/test_image.py",
)


@dataclass(frozen=True, slots=True)
class Built:
    """An image: its layers from the bottom, and which instructions were taken from the cache."""

    layers: tuple[str, ...]
    cached: tuple[str, ...]
    took_s: float


def lacks() -> str | None:
    """Why it can't run here, or None; installs what it may."""
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


def tool(
    name: str, *arguments: str, timeout_s: float = 3600, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """`buildah` or `podman` with our storage; fails with the end of what it says."""
    storage = ["--root", f"{STORE}/root", "--runroot", f"{STORE}/run", "--storage-driver", "overlay"]
    if name == "podman":
        storage += ["--cgroup-manager", "cgroupfs", "--runtime", "crun", "--events-backend", "none"]
    done = subprocess.run(
        [name, *storage, *arguments],
        env={**os.environ, "DISABLE_HC_SYSTEMD": "true"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert not check or done.returncode == 0, f"{name} {arguments[0]}: {(done.stdout + done.stderr)[-4000:]}"
    return done


def make_base() -> None:
    """Import a root with Debian's Python under the name of the official image, unless it is there."""
    if tool("podman", "image", "exists", BASE, check=False).returncode == 0:
        return
    say("making the root of the base image")
    archive = STORE / "base.tar"
    hooks = (
        "ln -s python3 /usr/bin/python",
        "rm -f /usr/lib/python3*/EXTERNALLY-MANAGED",
    )  # as in the official one
    line = ["mmdebstrap", "--variant=minbase", "--include=ca-certificates,python3-pip,python3-venv"]
    line += [f"--customize-hook=chroot \"$1\" sh -c '{hook}'" for hook in hooks]
    done = subprocess.run([*line, "bookworm", archive], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    tool("podman", "import", str(archive), BASE)
    archive.unlink()


def pip_settings() -> tuple[str, list[str]]:
    """What pip is set to on this machine, as a file of its own, and the paths that are named in it."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    found = dict(re.findall(r"^\S+\.([\w-]+)=(.*)$", done.stdout, re.MULTILINE))
    values = {name: str(ast.literal_eval(value)) for name, value in found.items() if name != "index"}
    words = [word for value in values.values() for word in value.split()]
    # The pages of an index in a folder name files beside it.
    named = [word for word in words if word[0] == "/"]
    named += [str(Path(word.removeprefix("file://")).parent) for word in words if word.startswith("file:///")]
    lines = [f"{name} = {value}" for name, value in values.items()]
    return "\n".join(["[global]", *lines, ""]), [path for path in named if Path(path).exists()]


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


def build(folder: Path, hub: str, secrets: Path) -> Built:
    """The image that `folder` makes."""
    conf, paths = pip_settings()
    (secrets / "pip.conf").write_text(conf)
    (secrets / "token").write_text(TOKEN)
    arguments = {
        "ENGINE": "cpu",
        "MODEL": MODEL,
        "HF_ENDPOINT": hub,
        "VLLM_EXTRA_ARGS": f"--max-model-len {MAX_MODEL_LEN}",
    }
    line = ["build", "--isolation", "chroot", "--network", "host", "--layers", "--format", "docker"]
    line += [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
    line += [
        "--secret",
        f"id=HF_TOKEN,src={secrets}/token",
        "--secret",
        f"id=pip_conf,src={secrets}/pip.conf",
    ]
    line += [word for path in paths for word in ("--volume", f"{path}:{path}:ro")]
    began_s = time.monotonic()
    done = tool("buildah", *line, "--target", "baked", "--tag", IMAGE, str(folder))
    took_s = time.monotonic() - began_s
    said = done.stdout + done.stderr
    (STORE / "build.log").write_text(said)
    steps = re.split(r"^(?:\[\d+/\d+\] )?STEP \d+/\d+: ", said, flags=re.MULTILINE)[1:]
    cached = tuple(step.splitlines()[0] for step in steps if "--> Using cache" in step)
    (found,) = json.loads(tool("podman", "image", "inspect", IMAGE).stdout)
    return Built(tuple(found["RootFS"]["Layers"]), cached, took_s)


def sizes() -> list[tuple[str, str]]:
    """The layers of the image from the bottom: their sizes, and what made them."""
    history = json.loads(tool("podman", "history", "--no-trunc", "--format", "json", IMAGE).stdout)
    return [
        (f"{step['size'] / 1e6:9.1f} MB", " ".join(step["CreatedBy"].split())[:90])
        for step in reversed(history)
        if step["size"]
    ]


@contextmanager
def running(**environ: str) -> Iterator[str]:
    """A container of the image, by its id."""
    line = ["run", "--detach", "--network", "none", "--cgroups", "disabled", "--user", USER]
    line += ["--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp:rw,mode=1777"]
    line += ["--cap-drop", "all", "--security-opt", "no-new-privileges", "--log-driver", "k8s-file"]
    line += [word for name, value in environ.items() for word in ("--env", f"{name}={value}")]
    name = tool("podman", *line, IMAGE).stdout.strip()
    try:
        yield name
    finally:
        tool("podman", "rm", "--force", "--time", "0", name)


def log(name: str) -> str:
    """What a container has written."""
    done = tool("podman", "logs", name)
    return done.stdout + done.stderr


def ended(name: str) -> int:
    """The exit code of a container, once it has ended."""
    return int(tool("podman", "wait", name, timeout_s=START_TIMEOUT_S).stdout)


def health(name: str) -> tuple[int, str]:
    """What the image's HEALTHCHECK says: its exit code and its line."""
    code = tool("podman", "healthcheck", "run", name, check=False).returncode
    (found,) = json.loads(tool("podman", "inspect", name).stdout)
    state = found["State"].get("Health") or found["State"]["Healthcheck"]
    return code, str(state["Log"][-1]["Output"]).strip()


def within(name: str, program: str) -> list[str]:
    """The lines that a Python program prints in a container."""
    return tool("podman", "exec", name, "python", "-c", program).stdout.splitlines()


def run() -> dict[str, Any]:
    """Run the image; returns figures."""
    with running() as name:
        assert ended(name) == 78, log(name)
        assert "there is no API_KEY" in log(name)
    began_s = time.monotonic()
    seen: list[tuple[int, str]] = []
    with running(API_KEY=KEY) as name:
        while (now := health(name))[0]:
            seen += [now] if now not in seen else []
            assert time.monotonic() - began_s < START_TIMEOUT_S, log(name)[-4000:]
            assert "running" in tool("podman", "inspect", "--format", "{{.State.Status}}", name).stdout, log(
                name
            )
            time.sleep(LOOK_S)
        ready_s = time.monotonic() - began_s
        assert now == (0, "ready")
        assert (1, "starting") in seen, seen
        answer = within(name, ASK.format(key=KEY))
        assert answer == [MODEL, "The capital of France is Paris."], answer
        sources, missing, writable, uid = map(int, within(name, LOOK)[-1].split())
        assert (writable, uid) == (0, int(USER.partition(":")[0])), (writable, uid)
        assert missing < sources / 100, (
            missing,
            sources,
        )  # templates and tests of others that are not this Python
        report = next(line for line in log(name).splitlines() if "cold start {" in line)
        tool("podman", "stop", "--time", str(int(STOP_TIMEOUT_S)), name)
        assert ended(name) == 0, log(name)[-4000:]
    with running(
        API_KEY=KEY, PLATFORM="runpod", RUNPOD_WEBHOOK_GET_JOB="http://127.0.0.1:1/job-take/$ID?gpu=x"
    ) as name:
        while health(name) != (0, "the worker runs, process 1"):
            assert time.monotonic() - began_s < 2 * START_TIMEOUT_S, log(name)[-4000:]
            time.sleep(LOOK_S)
    return {
        "ready_s": round(ready_s, 1),
        "modules": sources,
        "not_compiled": missing,
        "phases": json.loads(report[report.index("{") : report.rindex("}") + 1]),
    }


def holds_secret() -> bool:
    """Whether the token is in the image, or in what is known of it."""
    told = tool("podman", "image", "inspect", IMAGE).stdout
    told += tool("podman", "history", "--no-trunc", IMAGE).stdout
    return (
        TOKEN in told or subprocess.run(["grep", "-rqF", TOKEN, f"{STORE}/root"], check=False).returncode == 0
    )


def add_comment(path: Path) -> None:
    """Change a source in nothing that matters."""
    path.write_text(f"{path.read_text()}\n# {time.monotonic_ns()}\n")


def main() -> int:
    """Run it; returns an exit code."""
    if reason := lacks():
        print(f"test-image did not run: {reason}")
        return 0
    files = {path.name: path.read_bytes() for path in (ROOT / "tests/tinychat/model").iterdir()}
    with serving(Hub({MODEL: files})) as hub, context() as folder, TemporaryDirectory() as secrets:
        make_base()
        say("building the image")
        first = build(folder, hub.url, Path(secrets))
        figures: Mapping[str, Any] = run()
        assert not holds_secret()

        say("building it again with other code")
        add_comment(folder / "handler" / "loader.py")
        other_code = build(folder, hub.url, Path(secrets))
        assert other_code.layers[:-2] == first.layers[:-2], (
            "a change of our code moved a layer below the caches"
        )
        assert other_code.layers[-1] != first.layers[-1]

        say("building it again with another builder")
        asked = len(hub.paths("GET"))
        add_comment(folder / "builder" / "fetch.py")
        other_builder = build(folder, hub.url, Path(secrets))
        assert other_builder.layers[:-2] == first.layers[:-2], (
            "a model that was fetched again is another layer"
        )
        assert len(hub.paths("GET")) == asked, "a model was downloaded again"

    for size, step in sizes():
        print(f"{size}  {step}")
    built_s = [round(built.took_s) for built in (first, other_code, other_builder)]
    print(json.dumps({"built_s": built_s, **figures}))
    print(f"the image was built and run on {platform.machine()}; not tried here:")
    print(*(f"  - {what}" for what in NOT_TRIED), sep="\n")
    return 0


def say(text: str) -> None:
    """One line for the person who waits."""
    print(f"test-image: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
