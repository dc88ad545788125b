"""`handler.loader`: which way to read the weights is in order where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from handler.errors import NoResources
from handler.loader import Choice, choose, file_system, is_network
from handler.settings import Settings

RUNAI = "runai_model_streamer"
ALL = ("instanttensor", "fastsafetensors", RUNAI)
STORE = (RUNAI, f"{RUNAI}_s3")

MOUNTS = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
40 27 0:50 / /mnt/models rw shared:7 - nfs4 server:/models rw,vers=4.2
41 40 254:1 / /mnt/models/local rw - xfs /dev/vdb rw
42 27 0:52 / /mnt/two\040words rw - fuse.s3fs s3fs rw
43 27 0:53 / /mnt/twice rw - ext4 /dev/vdc rw
44 43 0:54 / /mnt/twice rw - lustre server:/fs rw
"""


def made(
    folder: Path, *names: str, size: int = 1000, config: object = None, environ: dict[str, str] | None = None
) -> Settings:
    """The settings of a model in `folder` that has weight files called `names`, each of `size` bytes."""
    (folder / "config.json").write_text(json.dumps(config or {}))
    for name in names:
        (folder / name).write_bytes(bytes(size))
    return Settings.from_environ({"MODEL_NAME": str(folder), **(environ or {})})


def chosen(
    settings: Settings, kind: str, *packages: str, on: str | None = None, free: int = 1 << 40
) -> Choice:
    """What is chosen on a file system of the type `kind`, with only `packages` installed."""
    return choose(
        settings,
        accelerator=on,
        installed=packages.__contains__,
        mounts=lambda: f"1 0 0:1 / / rw - {kind} source rw",
        free_bytes=lambda: free,
    )


def test_a_cpu_maps_a_local_file(tmp_path: Path) -> None:
    """Whatever is installed: the file was asked of the disk already, and threads would not read it sooner."""
    settings = made(tmp_path, "a.safetensors", "b.safetensors")
    assert chosen(settings, "ext4", *ALL) == Choice((), "safetensors", "local disk (ext4)", 2000)


@pytest.mark.parametrize(
    ("on", "packages", "name"),
    [
        ("cuda", ALL, "instanttensor"),
        ("cuda", ALL[1:], "fastsafetensors"),
        ("cuda", ALL[2:], "runai_streamer"),
        ("rocm", ALL, "fastsafetensors"),
    ],
)
def test_a_gpu_reads_a_local_disk_with_the_fastest_that_is_installed(
    on: str, packages: tuple[str, ...], name: str, tmp_path: Path
) -> None:
    """InstantTensor is for NVIDIA's alone."""
    settings = made(tmp_path, "model.safetensors")
    expected = Choice((f"--load-format={name}",), name, "local disk (xfs)", 1000)
    assert chosen(settings, "xfs", *packages, on=on) == expected


@pytest.mark.parametrize(("count", "threads"), [(2, 2), (8, 8), (30, 8)])
def test_a_gpu_without_packages_reads_several_files_at_once(count: int, threads: int, tmp_path: Path) -> None:
    """As many threads as there are files, and no more than eight."""
    settings = made(tmp_path, *(f"model-{n:02}.safetensors" for n in range(count)))
    choice = chosen(settings, "overlay", on="cuda")
    assert choice.name == "safetensors threads"
    assert choice.why == f"local disk (overlay), {count} files"
    (flag,) = choice.flags
    option, _, value = flag.partition("=")
    assert option == "--model-loader-extra-config"
    assert json.loads(value) == {"enable_multithread_load": True, "num_threads": threads}


def test_a_gpu_without_packages_maps_a_single_file(tmp_path: Path) -> None:
    """Threads take a file each: there is one."""
    settings = made(tmp_path, "model.safetensors")
    assert chosen(settings, "tmpfs", on="cuda") == Choice((), "safetensors", "memory (tmpfs)", 1000)


@pytest.mark.parametrize("on", [None, "cuda"])
def test_a_network_volume_is_streamed(on: str | None, tmp_path: Path) -> None:
    """Many requests at once hide the way to the server, whatever device waits for them."""
    settings = made(tmp_path, "model.safetensors")
    expected = Choice(("--load-format=runai_streamer",), "runai_streamer", "network volume (nfs4)", 1000)
    assert chosen(settings, "nfs4", *ALL, on=on) == expected


def test_a_network_volume_without_the_streamer_is_read_ahead(tmp_path: Path) -> None:
    """By vLLM's threads, into the page cache."""
    settings = made(tmp_path, "model.safetensors")
    assert chosen(settings, "fuse.juicefs", "instanttensor", on="cuda") == Choice(
        ("--safetensors-load-strategy=prefetch",),
        "safetensors prefetch",
        "network volume (fuse.juicefs)",
        1000,
    )


def test_nothing_is_read_ahead_that_does_not_fit_into_memory(tmp_path: Path) -> None:
    """What is read first would be gone when it is wanted."""
    settings = made(tmp_path, "model.safetensors")
    expected = Choice((), "safetensors", "network volume (nfs), larger than the free memory", 1000)
    assert chosen(settings, "nfs", free=1100) == expected
    assert chosen(settings, "nfs", free=1112).name == "safetensors prefetch"


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("gs", "gcs"), ("az", "azure")])
def test_an_object_store_is_streamed(scheme: str, extra: str) -> None:
    """With the part of the package that speaks to that store; without it the start says what to install."""
    settings = Settings.from_environ({"MODEL_NAME": f"{scheme}://bucket/name"})
    choice = chosen(settings, "ext4", RUNAI, f"{RUNAI}_{extra}")
    assert choice == Choice(
        ("--load-format=runai_streamer",), "runai_streamer", f"object store ({scheme})", None
    )
    with pytest.raises(NoResources, match=rf"pip install 'runai-model-streamer\[{extra}\]'"):
        chosen(settings, "ext4", RUNAI)


def test_a_tokenizer_in_an_object_store_needs_the_package_too(tmp_path: Path) -> None:
    """vLLM fetches it in the same way."""
    settings = made(tmp_path, "model.safetensors", environ={"TOKENIZER_NAME": "s3://bucket/name"})
    with pytest.raises(NoResources, match="s3://bucket/name"):
        chosen(settings, "ext4")
    assert chosen(settings, "ext4", *STORE).name == "safetensors"


def test_a_model_of_a_hub_is_left_to_vllm() -> None:
    """Where its files are is known once they were fetched."""
    settings = Settings.from_environ({"MODEL_NAME": "org/name"})
    assert chosen(settings, "nfs", *ALL, on="cuda") == Choice((), "auto", "vLLM fetches the model", None)


@pytest.mark.parametrize(
    ("names", "config", "why"),
    [
        (("pytorch_model.bin",), {}, "no safetensors but *.bin"),
        (("model.pt",), {}, "no safetensors but *.pt"),
        (("model-Q4_K_M.gguf",), {}, "no safetensors but *.gguf"),
        (("consolidated.safetensors",), {}, "Mistral's own format"),
        (
            ("model.safetensors",),
            {"quantization_config": {"quant_method": "torchao"}},
            "quantized with torchao",
        ),
    ],
)
def test_other_formats_are_left_to_vllm(
    names: tuple[str, ...], config: object, why: str, tmp_path: Path
) -> None:
    """None of the ways reads them, or reads them whole."""
    settings = made(tmp_path, *names, config=config)
    assert chosen(settings, "nfs", *ALL, on="cuda") == Choice((), "auto", why, 1000)


def test_a_folder_without_weights_is_left_to_vllm(tmp_path: Path) -> None:
    """It says what it looked for; `LOAD_FORMAT=dummy` needs none."""
    assert chosen(made(tmp_path), "ext4", on="cuda") == Choice((), "auto", "no weights that are known", 0)


@pytest.mark.parametrize("config", [[], "x", {"quantization_config": None}, {"quantization_config": {}}])
def test_a_config_of_another_shape_chooses_as_if_it_said_nothing(config: object, tmp_path: Path) -> None:
    """vLLM is the one to refuse it."""
    settings = made(tmp_path, "model.safetensors", config=config)
    assert chosen(settings, "ext4").name == "safetensors"


@pytest.mark.parametrize(
    ("environ", "given"),
    [
        ({"LOAD_FORMAT": "auto"}, "LOAD_FORMAT"),
        ({"SAFETENSORS_LOAD_STRATEGY": "eager"}, "SAFETENSORS_LOAD_STRATEGY"),
        ({"MODEL_LOADER_EXTRA_CONFIG": '{"num_threads": 4}'}, "MODEL_LOADER_EXTRA_CONFIG"),
        ({"VLLM_EXTRA_ARGS": "--seed 1 --load-format=dummy"}, "VLLM_EXTRA_ARGS"),
        ({"VLLM_EXTRA_ARGS": "--load_format dummy"}, "VLLM_EXTRA_ARGS"),
        ({"VLLM_EXTRA_ARGS": "--model-loader-extra-config.num_threads=4"}, "VLLM_EXTRA_ARGS"),
    ],
)
def test_what_the_user_sets_is_not_chosen_over(environ: dict[str, str], given: str, tmp_path: Path) -> None:
    """Any flag of reading, since vLLM refuses some of them together."""
    settings = made(tmp_path, "a.safetensors", "b.safetensors", environ=environ)
    assert chosen(settings, "nfs", on="cuda") == Choice((), "as set", f"{given} is set", 2000)


@pytest.mark.parametrize(
    "text", ["load-format: dummy\n", "seed: 1\nload_format: dummy\n", '"load-format": dummy\n']
)
def test_a_configuration_file_is_not_chosen_over(text: str, tmp_path: Path) -> None:
    """It is read as text: what parses YAML is not imported yet."""
    (tmp_path / "vllm.yaml").write_text(text)
    environ = {"VLLM_CONFIG_FILE": str(tmp_path / "vllm.yaml")}
    settings = made(tmp_path, "model.safetensors", environ=environ)
    assert chosen(settings, "nfs").why == "VLLM_CONFIG_FILE is set"


@pytest.mark.parametrize("text", ["# load-format: dummy\n", "seed: 1\n", None])
def test_other_settings_leave_the_choice(text: str | None, tmp_path: Path) -> None:
    """A comment, another flag, a file that is not there, a flag of another program."""
    if text is not None:
        (tmp_path / "vllm.yaml").write_text(text)
    environ = {
        "VLLM_CONFIG_FILE": str(tmp_path / "vllm.yaml"),
        "VLLM_EXTRA_ARGS": "--seed 1 --served-load-format-x 2",
        "LOAD_FORMAT": "mp3",
        "FOREIGN_NAMES": "LOAD_FORMAT",
    }
    settings = made(tmp_path, "model.safetensors", environ=environ)
    assert chosen(settings, "nfs").name == "safetensors prefetch"


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("/models/a.safetensors", "ext4"),
        ("/mnt/models/a.safetensors", "nfs4"),
        ("/mnt/models", "nfs4"),
        ("/mnt/models-2/a.safetensors", "ext4"),
        ("/mnt/models/local/a.safetensors", "xfs"),
        ("/mnt/two words/a.safetensors", "fuse.s3fs"),
        ("/mnt/twice/a.safetensors", "lustre"),
    ],
)
def test_the_longest_mount_point_holds_the_file(file: str, kind: str) -> None:
    """As the kernel resolves it; of two on one place the later one is seen."""
    assert file_system(Path(file), MOUNTS) == kind


def test_links_are_followed(tmp_path: Path) -> None:
    """The folder of a snapshot holds links: what they point to is what is read."""
    target = tmp_path / "volume" / "blob"
    target.parent.mkdir()
    target.touch()
    (tmp_path / "model.safetensors").symlink_to(target)
    mountinfo = f"{MOUNTS}50 27 0:60 / {target.parent} rw - cifs //server/share rw\n"
    assert file_system(tmp_path / "model.safetensors", mountinfo) == "cifs"


def test_without_mountinfo_the_disk_counts_as_local(tmp_path: Path) -> None:
    """Nothing is known against it."""
    settings = made(tmp_path, "model.safetensors")
    choice = choose(settings, accelerator=None, installed=lambda _: False, mounts=lambda: "")
    assert choice == Choice((), "safetensors", "local disk (unknown)", 1000)


@pytest.mark.parametrize(
    ("kind", "network"),
    [
        ("nfs", True),
        ("virtiofs", True),
        ("fuse", True),
        ("fuse.gcsfuse", True),
        ("fuse.fuse-overlayfs", False),
        ("fuseblk", False),
        ("overlay", False),
        ("zfs", False),
    ],
)
def test_what_comes_over_a_network(kind: str, network: bool) -> None:
    """FUSE is mostly somebody's object store; a container's own layers are not."""
    assert is_network(kind) is network


def test_this_machine_has_mounts_and_memory(tmp_path: Path) -> None:
    """The defaults read what Linux says: the folder of a test is on a file system that has a name."""
    choice = choose(made(tmp_path, "model.safetensors"), accelerator=None)
    assert "(unknown)" not in choice.why
