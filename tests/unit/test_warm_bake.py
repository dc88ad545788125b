"""`builder.warm` without an engine: what a start is told, and what is kept of what it leaves."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from builder import warm as warming
from builder.console import Console
from builder.warm import start_environ, warm
from handler import baked
from handler.errors import BadSettings, EngineFailed, ModelNotFound
from handler.manifest import START

STARTED = """
import json, os
from pathlib import Path
cache = Path(os.environ["XDG_CACHE_HOME"])
number = len(list(cache.glob("vllm/*.json")))
for name in ("vllm", "firsttoken/readahead", "mesa"):
    (cache / name).mkdir(parents=True, exist_ok=True)
(cache / f"vllm/{number}.json").write_text("{}")
(cache / "vllm/passing.lock").write_text("")
(cache / "mesa/shader").write_text("")
if not (cache / "firsttoken/readahead/baked.txt").exists():
    lines = ["/usr/lib/a.so", f"{cache}/vllm/0.json", os.environ["MODEL_NAME"] + "/model.safetensors"]
    (cache / "firsttoken/readahead/abc.txt").write_text("\\n".join(lines) + "\\n")
print("a library's word")
print(json.dumps({"phase": "import vllm"}))
phases = [{"name": "import vllm", "begin_s": 0.5, "end_s": 2.25}]
report = {"total_s": 3.0 - number, "facts": {"engine_mode": "thread"}, "phases": phases}
found = {"report": report, "settings": {"dtype": "half"}, "flags": ["dtype"], "kv_cache": {"blocks": 4}}
found["architecture"] = "9.0"
print(json.dumps(found))
"""


@pytest.fixture
def bake(tmp_path: Path) -> Path:
    """A folder with a fetched model."""
    folder = tmp_path / "bake"
    (folder / "model").mkdir(parents=True)
    (folder / "model/fetched.json").write_text(json.dumps({"model": "org/name", "files": {}}))
    (folder / "model/model.safetensors").write_text("weights")
    return folder


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that leaves what a start may leave."""
    monkeypatch.setattr(warming, "START_COMMAND", (sys.executable, "-c", STARTED))


def warmed(bake: Path, **settings: str) -> tuple[bool, str]:
    """Whether there was anything to do, and what was said."""
    stream = io.StringIO()
    return warm(bake, environ=settings, console=Console(stream, "warm")), stream.getvalue()


@pytest.mark.usefixtures("started")
def test_what_the_starts_leave_is_kept(bake: Path) -> None:
    """Of both, by where the next one will look; nothing of a moment, nothing that is not ours to keep."""
    done, said = warmed(bake)
    assert done
    assert said.splitlines() == [
        "warm: making the caches: import vllm",
        "warm: a start with them: import vllm",
        "warm: org/name makes its first token 2.0 s after its start",
    ]
    cache = bake / "cache"
    assert sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()) == [
        "firsttoken/readahead/baked.txt",
        "start.json",
        "vllm/0.json",
        "vllm/1.json",
    ]
    assert (cache / "firsttoken/readahead/baked.txt").read_text() == "/usr/lib/a.so\n"
    assert json.loads((bake / START).read_text()) == {
        "made_with": {**baked.made_with(), "gpu_architecture": "9.0"},
        "settings": {"dtype": "half"},
        "start": {
            "facts": {"engine_mode": "thread"},
            "kv_cache": {"blocks": 4},
            "phases": {"import vllm": 1.75},
            "total_s": 2.0,
            "weights": ["model.safetensors"],
        },
    }


def test_a_bake_behind_a_link_is_the_same(bake: Path) -> None:
    """The list of files names none of its own, as the kernel calls them either."""
    link = bake.with_name("link")
    link.symlink_to(bake)
    given = STARTED.replace('os.environ["MODEL_NAME"]', f'"{bake}/model"')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warming, "START_COMMAND", (sys.executable, "-c", given))
        warmed(link)
    assert (bake / "cache/firsttoken/readahead/baked.txt").read_text() == "/usr/lib/a.so\n"


@pytest.mark.usefixtures("started")
def test_nothing_is_done_twice(bake: Path) -> None:
    """Until a setting, or the model, is another one."""
    warmed(bake, DTYPE="half", PATH="/bin")
    assert warmed(bake, DTYPE="half", PATH="/usr/bin") == (False, "")
    assert warmed(bake, DTYPE="half", SERVED_MODEL_NAME="mine") == (False, "")
    bake = bake.rename(bake.with_name("moved"))
    assert warmed(bake, DTYPE="half") == (False, "")
    assert warmed(bake, DTYPE="float32")[0]
    assert warmed(bake, DTYPE="float32", VLLM_USE_V2="1")[0]
    assert warmed(bake, DTYPE="float32", VLLM_USE_V2="1") == (False, "")
    (bake / "model/fetched.json").write_text(json.dumps({"model": "org/name", "commit": "c0ffee"}))
    assert warmed(bake, DTYPE="float32", VLLM_USE_V2="1")[0]


@pytest.mark.usefixtures("started")
def test_what_changes_is_no_longer_sealed(bake: Path) -> None:
    """A bake that was interrupted is none."""
    (bake / "manifest.json").write_text("{}")
    warmed(bake)
    assert not (bake / "manifest.json").exists()


@pytest.mark.parametrize(
    ("code", "error"), [(66, ModelNotFound), (70, EngineFailed), (78, BadSettings), (1, EngineFailed)]
)
def test_a_start_that_fails_ends_it(
    bake: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception]
) -> None:
    """With the exit code that the worker would have."""
    monkeypatch.setattr(warming, "START_COMMAND", (sys.executable, "-c", f"raise SystemExit({code})"))
    with pytest.raises(error):
        warmed(bake)


def test_a_start_is_told_no_secret(bake: Path) -> None:
    """Nor where one is; settings whose names sound alike are no secrets."""
    hugging_face = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")
    amazon = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_CREDENTIALS")
    others = ("API_KEY", "API_KEYS", "RUNPOD_AI_API_KEY", "DB_PASSWORD", "KEY_PASSPHRASE", "GH_PAT")
    secrets = dict.fromkeys((*hugging_face, *amazon, *others), "canary")
    secrets["HTTPS_PROXY"] = "http://user:canary@proxy:3128"
    harmless = {
        "HTTP_PROXY": "http://proxy:3128",
        "PATH": "/bin:/usr/bin",
        "TOKENIZER_MODE": "auto",
        "MAX_NUM_BATCHED_TOKENS": "64",
        "KEY_VALUE": "1",
        "MAX_MODEL_LEN": "8",
    }
    assert start_environ(bake, secrets | harmless | {"TRITON_CACHE_DIR": "/mine"}) == harmless | {
        "AUTH": "off",
        "LOG_LEVEL": "ERROR",
        "MODEL_NAME": str(bake / "model"),
        "SERVED_MODEL_NAME": "org/name",
    }


KILLED = """
import sys
from pathlib import Path
from builder import warm
from builder.console import Console

warm.START_COMMAND = (sys.executable, "-c", "import os; print('{\\"phase\\": \\"up\\"}', flush=True);"
    "os.read(int(os.environ['LIFELINE_FD']), 1)")
warm.warm(Path(sys.argv[1]), environ={}, console=Console(sys.stderr))
"""


def test_a_start_does_not_outlive_who_asked_for_it(bake: Path) -> None:
    """Also when that was killed."""
    # The start has its standard error, which ends when both are gone.
    command = [sys.executable, "-c", KILLED, str(bake)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "fetch: making the caches: up\n"
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)


LONG_START = """
import threading
from builder import start
from handler import preparation
preparation.check = lambda *_: threading.Event().wait()
start.start()
"""


def test_a_start_ends_with_who_asked_for_it(bake: Path) -> None:
    """As the pipe tells it, however far the start is."""
    theirs, ours = os.pipe()
    os.close(ours)
    environ = {"PATH": os.environ["PATH"], "MODEL_NAME": str(bake / "model"), "AUTH": "off"}
    done = subprocess.run(
        [sys.executable, "-c", LONG_START],
        env={**environ, "LIFELINE_FD": str(theirs)},
        pass_fds=(theirs,),
        capture_output=True,
        check=False,
        timeout=60,
    )
    os.close(theirs)
    assert done.returncode == -signal.SIGTERM
