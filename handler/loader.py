"""How the weights are read: chosen by where they lie, by the packages and by the device.

Standard library only and no import of what is chosen, so that it costs a start a millisecond.
What each way needs, and what it was measured to give, is in docs/coldstart.md.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from handler import machine
from handler.errors import NoResources
from handler.settings import Settings
from handler.table import STORES, in_store

FLAGS = (
    "load-format",
    "model-loader-extra-config",
    "safetensors-load-strategy",
    "safetensors-prefetch-block-size",
    "safetensors-prefetch-num-threads",
)
"""vLLM's flags on how weights are read: a user who sets one has chosen."""

NETWORK = frozenset(
    {
        *("9p", "afs", "beegfs", "ceph", "cifs", "fuse", "glusterfs", "gpfs", "lustre", "nfs", "nfs4"),
        *("orangefs", "pvfs2", "smb3", "virtiofs", "wekafs"),
    }
)
"""Types of file systems whose files come over a network or from another machine's kernel.

`fuse.NAME` counts too (s3fs, gcsfuse, JuiceFS), but for the ones in `LOCAL_FUSE`.
"""
LOCAL_FUSE = frozenset({"fuse.ext4", "fuse.fuse-overlayfs", "fuse.overlayfs"})

OWN_READER = frozenset({"bitsandbytes", "gguf", "torchao"})
"""Quantizations whose weights only vLLM's own choice of a reader puts together again."""

THREADS = 8
FITS = 0.9
"""Files are read ahead into memory if they take no more of what is free than this."""

Installed = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Choice:
    """A way to read weights: `flags` of vLLM that bring it, its `name`, and `why` in a clause.

    `weights_bytes` is the size of the files; None if they are not in a folder.
    """

    flags: tuple[str, ...]
    name: str
    why: str
    weights_bytes: int | None = None


def installed(package: str) -> bool:
    """Whether `package` is there; does not import it."""
    return importlib.util.find_spec(package) is not None


def mounts() -> str:
    """What is mounted where, as proc(5) says of mountinfo; empty where it can't be read."""
    try:
        return Path("/proc/self/mountinfo").read_text()
    except OSError:
        return ""


def choose(
    settings: Settings,
    *,
    accelerator: str | None,
    installed: Installed = installed,
    mounts: Callable[[], str] = mounts,
    free_bytes: Callable[[], int] = machine.free_memory_bytes,
) -> Choice:
    """The way to read the weights of `settings.model_name`.

    `accelerator` is what the engine runs on: `cuda`, `rocm`, or None for a CPU. Raises
    `NoResources` for an object store without the package that reads from it.
    """
    model = settings.model_name
    for place in (model, settings.tokenizer_name or ""):
        _check_store(place, installed)
    files = weight_files(model)
    size = sum(file.stat().st_size for file in files) if Path(model).is_dir() else None
    if given := set_by_user(settings):
        return Choice((), "as set", f"{given} is set", size)
    if in_store(model):
        return Choice(_load_format("runai_streamer"), "runai_streamer", f"object store ({model[:2]})")
    if size is None:
        return Choice((), "auto", "vLLM fetches the model")
    if unfit := _only_for_vllm(Path(model), files):
        return Choice((), "auto", unfit, size)
    kind = file_system(files[0], mounts())
    if is_network(kind):
        flags, name, why = _from_network(size, installed, free_bytes)
        where = "network volume"
    else:
        flags, name, why = _from_disk(len(files), accelerator, installed)
        where = "memory" if kind in {"ramfs", "tmpfs"} else "local disk"
    return Choice(flags, name, f"{where} ({kind or 'unknown'}){why}", size)


def set_by_user(settings: Settings) -> str | None:
    """Which of `FLAGS` the user has set, in the environment, VLLM_EXTRA_ARGS or VLLM_CONFIG_FILE."""
    for flag in FLAGS:
        if (name := flag.replace("-", "_").upper()) in settings.rest:
            return name
    either = "|".join(flag.replace("-", "[-_]") for flag in FLAGS)
    if re.search(rf"(?<!\S)--({either})\b", settings.vllm_extra_args or ""):
        return "VLLM_EXTRA_ARGS"
    try:
        lines = Path(settings.vllm_config_file or "").read_text()
    except (OSError, ValueError):
        return None  # reading the flags says it
    return "VLLM_CONFIG_FILE" if re.search(rf"""(?m)^\s*['"]?({either})\b""", lines) else None


def weight_files(model: str) -> list[Path]:
    """The files in the folder `model` that vLLM would read weights from: of the best format there is."""
    for pattern in ("*.safetensors", "*.bin", "*.pt", "*.gguf"):
        if found := sorted(Path(model).glob(pattern)):
            return found
    return []


def file_system(file: Path, mountinfo: str) -> str:
    """The type of the file system that holds `file`, links followed; empty if it can't be told."""
    path = str(file.resolve())
    best, kind = "", ""
    for point, type_ in _mounted(mountinfo):
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # of two on one place, the later hides the other
            best, kind = point, type_
    return kind


def is_network(kind: str) -> bool:
    """Whether a file system of the type `kind` is slow to answer single reads."""
    return kind in NETWORK or (kind.startswith("fuse.") and kind not in LOCAL_FUSE)


def _from_network(
    size: int, installed: Installed, free_bytes: Callable[[], int]
) -> tuple[tuple[str, ...], str, str]:
    if installed("runai_model_streamer"):
        return _load_format("runai_streamer"), "runai_streamer", ""
    if size > FITS * free_bytes():
        return (), "safetensors", ", larger than the free memory"
    return ("--safetensors-load-strategy=prefetch",), "safetensors prefetch", ""


def _from_disk(count: int, accelerator: str | None, installed: Installed) -> tuple[tuple[str, ...], str, str]:
    if accelerator is None:
        return (), "safetensors", ""  # mapped, and `handler.readahead` has asked the disk already
    if accelerator == "cuda" and installed("instanttensor"):
        return _load_format("instanttensor"), "instanttensor", ""
    if installed("fastsafetensors"):
        return _load_format("fastsafetensors"), "fastsafetensors", ""
    if installed("runai_model_streamer"):
        return _load_format("runai_streamer"), "runai_streamer", ""
    if count > 1:
        config = {"enable_multithread_load": True, "num_threads": min(THREADS, count)}
        return (
            (f"--model-loader-extra-config={json.dumps(config)}",),
            "safetensors threads",
            f", {count} files",
        )
    return (), "safetensors", ""


def _load_format(name: str) -> tuple[str, ...]:
    return (f"--load-format={name}",)


def _only_for_vllm(folder: Path, files: Sequence[Path]) -> str | None:
    """Why the weights in `folder` are left to vLLM's own choice, or None."""
    if not files or files[0].suffix != ".safetensors":
        return f"no safetensors but *{files[0].suffix}" if files else "no weights that are known"
    if any(file.name.startswith("consolidated") for file in files):
        return "Mistral's own format"
    try:
        config = json.loads((folder / "config.json").read_text())
        method = config["quantization_config"]["quant_method"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return f"quantized with {method}" if method in OWN_READER else None


def _mounted(mountinfo: str) -> Iterator[tuple[str, str]]:
    """Mount point and type of each line of mountinfo."""
    for line in mountinfo.splitlines():
        before, dash, after = line.partition(" - ")
        if dash and len(fields := before.split(" ")) > 4:
            yield re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4]), after.split(" ")[0]


def _check_store(place: str, installed: Installed) -> None:
    if not in_store(place):
        return
    extra = next(name for scheme, name in STORES.items() if place.startswith(scheme))
    if not (installed("runai_model_streamer") and installed(f"runai_model_streamer_{extra}")):
        raise NoResources(
            f"{place} is read with Run:ai's model streamer, which is not installed: "
            f"pip install 'runai-model-streamer[{extra}]'"
        )
