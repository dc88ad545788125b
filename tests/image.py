"""`make test-image`: the image for CPUs with the tests' small model in it, built, run and built again.

Needs root; says why if it can't run. `tests/containers.py` has what stands in for Docker.

1. The model comes from a hub on loopback that wants a token, which is given as a secret.
2. The image runs as a user that it does not know, without capabilities and without a network, all but
   /tmp read-only: what its health check says, an answer to the official client, SIGTERM.
3. It is built again after a change of our code and after one of the builder's: the layers below stay.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.containers import (
    LOG,
    STORE,
    Built,
    build,
    context,
    health,
    lacks,
    make_base,
    podman,
    running,
    said,
    sizes,
)
from tests.hub import Hub, serving
from tests.servers import MAX_MODEL_LEN, ROOT, START_TIMEOUT_S, STOP_TIMEOUT_S

IMAGE = "localhost/firsttoken:cpu-baked"
MODEL = "tests/tinychat"
TOKEN = "hf_a-token-that-must-be-nowhere"
KEY = "ft-a-key"
UID = 54321
LOOK_S = 0.5

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
    "the engine for GPUs: its base image, vllm/vllm-openai, is in a registry",
    "BuildKit: buildah reads the Dockerfile, without `--link`, which it does not know",
    "docker buildx bake: docker-bake.hcl is only read, by tests/unit/test_image.py",
)


def ready(name: str) -> float:
    """Seconds until the health check of a container says that it is healthy."""
    began_s = time.monotonic()
    seen: list[tuple[int, str]] = []
    while (now := health(name))[0]:
        seen += [now] if now not in seen else []
        assert time.monotonic() - began_s < START_TIMEOUT_S, said(name)[-4000:]
        assert podman("inspect", "--format", "{{.State.Status}}", name).strip() == "running", said(name)[
            -4000:
        ]
        time.sleep(LOOK_S)
    assert now == (0, "ready")
    assert (1, "starting") in seen, seen
    return time.monotonic() - began_s


def ended(name: str) -> int:
    """The exit code of a container, once it has ended."""
    return int(podman("wait", name))


def run() -> dict[str, Any]:
    """Run the image; returns figures."""
    user = ("--user", f"{UID}:{UID}")
    with running(IMAGE, *user) as name:
        assert ended(name) == 78, said(name)
        assert "there is no API_KEY" in said(name)
    with running(IMAGE, *user, API_KEY=KEY) as name:
        ready_s = ready(name)
        answer = podman("exec", name, "python", "-c", ASK).splitlines()
        assert answer == [MODEL, "The capital of France is Paris."], answer
        installed, not_compiled, writable, uid = map(int, podman("exec", name, "python", "-c", LOOK).split())
        assert (writable, uid) == (0, UID)
        assert not_compiled < installed / 100, (not_compiled, installed)  # others' templates, for no Python
        (report,) = (line for line in said(name).splitlines() if "cold start {" in line)
        podman("stop", "--time", str(int(STOP_TIMEOUT_S)), name)
        assert ended(name) == 0, said(name)[-4000:]
    with running(
        IMAGE, PLATFORM="runpod", RUNPOD_WEBHOOK_GET_JOB="http://127.0.0.1:1/job-take/$ID?gpu=x"
    ) as name:
        assert health(name) == (0, "the worker runs, process 1")
    cold_start = json.loads(report[report.index("{") : report.rindex("}") + 1])
    return {
        "ready_s": round(ready_s, 1),
        "total_s": cold_start["total_s"],
        "modules": installed,
        **cold_start["facts"],
    }


def holds_token() -> bool:
    """Whether the token is in the image, or in what is known of it."""
    known = podman("image", "inspect", IMAGE) + podman("history", "--no-trunc", IMAGE)
    found = subprocess.run(["grep", "-rqF", TOKEN, f"{STORE}/root"], check=False)
    return TOKEN in known or found.returncode == 0


def add_comment(path: Path) -> None:
    """Change a source in nothing that matters."""
    path.write_text(f"{path.read_text()}\n# {time.monotonic_ns()}\n")


def check() -> None:
    """All of it."""
    files = {path.name: path.read_bytes() for path in (ROOT / "tests/tinychat/model").iterdir()}
    with serving(Hub({MODEL: files}, token=TOKEN)) as hub, context() as folder:
        arguments = {
            "ENGINE": "cpu",
            "MODEL": MODEL,
            "HF_ENDPOINT": hub.url,
            "VLLM_EXTRA_ARGS": f"--max-model-len {MAX_MODEL_LEN}",
        }

        def built(what: str) -> Built:
            print(f"test-image: {what}; {LOG} has the steps", file=sys.stderr, flush=True)
            return build(folder, "baked", IMAGE, arguments, {"HF_TOKEN": TOKEN})

        make_base()
        first = built("building the image")
        figures = run()
        assert not holds_token()
        add_comment(folder / "handler" / "loader.py")
        second = built("building it with other code")
        *below, _, code = first.layers
        assert list(second.layers[:-2]) == below, "a change of our code moves more than caches and code"
        assert second.layers[-1] != code
        asked = len(hub.paths("GET"))
        add_comment(folder / "builder" / "fetch.py")
        third = built("building it with another builder")
        assert list(third.layers[:-2]) == below, "the same model, fetched again, is another layer"
        assert len(hub.paths("GET")) == asked, "the model was downloaded again"
    for size_bytes, step in sizes(IMAGE):
        print(f"{size_bytes / 1e6:9.1f} MB  {step[:90]}")
    print(json.dumps({"built_s": [round(image.took_s) for image in (first, second, third)], **figures}))


def main() -> int:
    """Run it; returns an exit code."""
    if reason := lacks():
        print(f"test-image did not run: {reason}")
        return 0
    check()
    print("not tried here:", *(f"  - {what}" for what in NOT_TRIED), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
