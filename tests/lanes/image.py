"""`make test-image`: the image for CPUs with the tests' small model in it, built, run and built again.

Needs root; says why if it can't run. `tests/docker.py` is where the engine and the base image come from.

1. docker-bake.hcl says how to build. The model comes from a hub on loopback that wants a token, which is
   given as a secret.
2. The image runs as a user that it does not know, without capabilities and without a network, all but
   /tmp read-only: what its health check says, an answer to the official client, SIGTERM.
3. It is built again with other code, and with another builder, which fetches the model again: layers stay.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.docker import ENGINE, STORE, Docker, context, engine, lacks, pip_settings
from tests.hub import Hub, serving
from tests.servers import MAX_MODEL_LEN, ROOT, START_TIMEOUT_S, STOP_TIMEOUT_S

TARGETS = ("cpu", "cpu-baked", "gpu", "gpu-baked")
MODEL = f"tests/tinychat-{os.getpid()}"
"""Another one each time: what the builder keeps of earlier ones is not what is tried."""
TOKEN = "hf_a-token-that-must-be-nowhere"
KEY = "ft-a-key"
UID = 54321
LOG = STORE / "build.log"
LOOK_S = 0.5

HARDENED = (
    *("--user", f"{UID}:{UID}", "--network", "none", "--read-only", "--tmpfs", "/tmp:exec"),
    *("--cap-drop", "all", "--security-opt", "no-new-privileges", "--health-interval", "1s"),
)

ASK = f"""
import openai
with openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key={KEY!r}, max_retries=0) as client:
    (model,) = (model.id for model in client.models.list())
    said = client.chat.completions.create(
        model=model, messages=[{{"role": "user", "content": "What is the capital of France?"}}], temperature=0
    )
    print(model, said.choices[0].message.content, sep="\\n")
"""

LOOK = """
import os
from importlib.util import cache_from_source
from pathlib import Path
from handler.prerequisites import check
check()
installed = [path for folder in ("/opt/venv/lib", "/app") for path in Path(folder).rglob("*.py")]
ours = [path for folder in ("/app", "/bake", "/opt") for path in Path(folder).rglob("*")]
print(
    len(installed),
    sum(not os.path.exists(cache_from_source(str(path))) for path in installed),
    sum(os.access(path, os.W_OK) for path in ours),
    os.getuid(),
)
"""

NOT_TRIED = (
    "the base image itself: Debian's Python 3.11 stands in for python:3.11-slim-bookworm",
    "the engine for GPUs: its base image, vllm/vllm-openai, is in a registry; nor caches of a GPU",
    "a newer frontend than the engine's own",
)


@contextmanager
def running(docker: Docker, image: str, *options: str) -> Iterator[str]:
    """A container of `image` with what a strict platform allows it; yields its id."""
    name = docker("run", "--detach", *HARDENED, *options, image).strip()
    try:
        yield name
    finally:
        docker("rm", "--force", name)


def health(docker: Docker, name: str) -> tuple[str, str]:
    """What Docker thinks of a container, and what its last check has said."""
    state = json.loads(docker("inspect", name, "--format", "{{json .State.Health}}"))
    return state["Status"], "".join(check["Output"] for check in state["Log"][-1:]).strip()


def healthy(docker: Docker, name: str) -> tuple[float, set[str]]:
    """Seconds until Docker calls a container healthy, and what its checks have said before."""
    began_s = time.monotonic()
    said: set[str] = set()
    while (now := health(docker, name))[0] != "healthy":
        said.add(now[1])
        assert time.monotonic() - began_s < START_TIMEOUT_S, (now, docker.logs(name)[-4000:])
        assert now[0] == "starting", (now, docker.logs(name)[-4000:])
        time.sleep(LOOK_S)
    return time.monotonic() - began_s, said - {""}


def run(docker: Docker, image: str) -> dict[str, Any]:
    """Run the image; returns figures."""
    with running(docker, image) as name:
        assert docker("wait", name) == "78\n", docker.logs(name)
        assert "there is no API_KEY" in docker.logs(name)
    with running(docker, image, "--env", f"API_KEY={KEY}") as name:
        healthy_s, said = healthy(docker, name)
        assert said == {"starting"}, said
        assert health(docker, name) == ("healthy", "ready")
        answer = docker("exec", name, "python", "-c", ASK).splitlines()
        assert answer == [MODEL, "The capital of France is Paris."], answer
        installed, not_compiled, writable, uid = map(int, docker("exec", name, "python", "-c", LOOK).split())
        assert (writable, uid) == (0, UID)
        assert not_compiled < installed / 100, (not_compiled, installed)  # others' templates, for no Python
        (report,) = (line for line in docker.logs(name).splitlines() if "cold start {" in line)
        docker("stop", "--time", str(int(STOP_TIMEOUT_S)), name)
        assert docker("wait", name) == "0\n", docker.logs(name)[-4000:]
    jobs = (
        "--env",
        "PLATFORM=runpod",
        "--env",
        "RUNPOD_WEBHOOK_GET_JOB=http://127.0.0.1:1/job-take/$ID?gpu=x",
    )
    with running(docker, image, *jobs) as name:
        healthy(docker, name)
        assert health(docker, name)[1] == "the worker runs, process 1"
    cold_start = json.loads(report[report.index("{") : report.rindex("}") + 1])
    return {"healthy_s": round(healthy_s, 1), "total_s": cold_start["total_s"], **cold_start["facts"]}


def plan(docker: Docker) -> dict[str, Any]:
    """How docker-bake.hcl says that the image is built."""
    chosen = {"MODEL": MODEL, "VLLM_EXTRA_ARGS": f"--max-model-len {MAX_MODEL_LEN}"}
    line = ["/context/docker-bake.hcl", "--print", *TARGETS]
    found = json.loads(docker("buildx", "bake", "--file", *line, environ=chosen))["target"]
    assert found.keys() == set(TARGETS)
    target: dict[str, Any] = found["cpu-baked"]
    return target


def holds_token(docker: Docker, image: str) -> bool:
    """Whether the token is in the image, or anywhere in what the engine keeps."""
    known = docker("image", "inspect", image) + docker("history", "--no-trunc", image)
    found = subprocess.run(["grep", "-rqF", TOKEN, f"{ENGINE}/var/lib/docker"], check=False)
    return TOKEN in known or found.returncode == 0


def change(path: Path) -> None:
    """Change a file in nothing that matters."""
    path.write_text(f"{path.read_text()}\n# {time.monotonic_ns()}\n")


def check(docker: Docker, folder: Path) -> None:
    """All of it, with the repository in `folder`."""
    target = plan(docker)
    (image,) = target["tags"]
    files = {path.name: path.read_bytes() for path in (ROOT / "tests/tinychat/model").iterdir()}
    with serving(Hub({MODEL: files}, token=TOKEN)) as hub, pip_settings() as pip_conf:
        options = ["--target", target["target"], "--tag", image]
        for name, value in {**target["args"], "HF_ENDPOINT": hub.url}.items():
            options += ["--build-arg", f"{name}={value}"]
        for secret in (*target["secret"], "id=pip_conf,env=PIP_CONF"):
            options += ["--secret", secret]
        secrets = {"HF_TOKEN": TOKEN, "PIP_CONF": pip_conf}

        def build(what: str, *more: str) -> tuple[list[str], int]:
            print(f"test-image: {what}; {LOG} has the steps", file=sys.stderr, flush=True)
            took_s = docker.build(*options, *more, log=LOG, environ=secrets)
            return docker.layers(image), round(took_s)

        first, first_s = build("building the image")
        figures = run(docker, image)
        assert not holds_token(docker, image)
        change(folder / "handler" / "loader.py")
        change(folder / "pyproject.toml")
        second, second_s = build("building it with other code")
        assert second[:-2] == first[:-2], "a change of our code moves more than caches and code"
        assert second[-1] != first[-1]
        asked = len(hub.paths("GET"))
        change(folder / "builder" / "fetch.py")
        # BuildKit takes what it has copied before for the same, whatever its dates; on another machine not.
        third, third_s = build("building it with another builder", "--no-cache-filter", "baked")
        assert third[:-2] == first[:-2], "the same model, fetched again, is another layer"
        assert len(hub.paths("GET")) == asked, "the model was downloaded again"
    history = docker("history", "--human=false", "--format", "{{.Size}}\t{{.CreatedBy}}", image)
    for size_bytes, step in (line.split("\t", 1) for line in reversed(history.splitlines())):
        if int(size_bytes):
            print(f"{int(size_bytes) / 1e6:9.1f} MB  {step[:60]}")
    print(json.dumps({"built_s": [first_s, second_s, third_s], **figures}))


def main() -> int:
    """Run it; returns an exit code."""
    if reason := lacks():
        print(f"test-image did not run: {reason}")
        return 0
    with engine() as docker, context() as folder:
        check(docker, folder)
    print("not tried here:", *(f"  - {what}" for what in NOT_TRIED), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
