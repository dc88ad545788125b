"""Which of a repository's files vLLM reads, and which of these are only taken where they are asked for."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from handler.errors import ModelNotFound, UsageError
from handler.fetched import NOTE

SUFFIXES = (".json", ".safetensors", ".model", ".jinja", ".tiktoken", ".txt")
"""Configuration, tokenizer and weights."""
PICKLES = (".bin", ".pt", ".pth")
"""Loading one runs what its maker put in."""
CODE = ".py"
"""vLLM imports it where TRUST_REMOTE_CODE is set."""

_POOLING = re.compile(r"\d_\w+/[^/]+")
"""What sentence-transformers keep of an embedding model beside the root."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What is taken of a repository beside the files that can't run anything."""

    pickles: tuple[str, ...] = ()
    """Paths in the repository, or patterns of them: `*` stands for anything but `/`."""
    code: bool = False

    def names(self, path: str) -> bool:
        """Whether `path` is a pickle that is asked for."""
        return path.endswith(PICKLES) and any(_matches(path, pattern) for pattern in self.pickles)


SAFE = Choice()


def needed(names: Iterable[str], choice: Choice = SAFE) -> list[str]:
    """Those of `names`, paths in a repository, that vLLM reads, sorted: no weights twice.

    Raises `ModelNotFound` where there are no weights but pickles that `choice` does not name, and
    `UsageError` where it names one that is not there.
    """
    there = sorted(filter(_inside, names))
    pickles = [name for name in there if choice.names(name)]
    for pattern in choice.pickles:
        if not any(_matches(name, pattern) for name in pickles):
            found = ", ".join(filter(_pickled, there)) or "none"
            raise UsageError(f"--pickle {pattern} names no pickle of the model's; there is {found}")
    data = [name for name in there if name.endswith(SUFFIXES) and _placed(name)]
    weights = [name for name in data if name.endswith(".safetensors") and "/" not in name]
    if not weights and not pickles:
        held = [PurePosixPath(name).suffix for name in there if _pickled(name) and "/" not in name]
        raise ModelNotFound(
            "it has no .safetensors files. Pickled weights (.bin, .pt, .pth) run the code of whoever made "
            "them and are not taken: convert them, or name a repository or a folder that has safetensors"
            + (f". If you trust who made these: --pickle '*{held[0]}'" if held else "")
        )
    # Mistral's own format lies beside the one that vLLM prefers.
    if any(not name.startswith("consolidated") for name in weights):
        data = [name for name in data if not name.startswith("consolidated")]
    return sorted({*data, *pickles, *(_code(there) if choice.code else ())})


def remarks(names: Iterable[str], taken: Collection[str]) -> Iterator[str]:
    """What is to be said where `taken` was taken of `names`: what can run somebody's code, a line each."""
    if pickles := sorted(filter(_pickled, taken)):
        yield f"warning: pickled, so loading it runs the code of whoever made it: {', '.join(pickles)}"
    if left := [name for name in _code(names) if name not in taken]:
        yield f"not taken, as it is Python code: {', '.join(left)}; --trust-remote-code takes it"


def _code(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(CODE))


def _inside(name: str) -> bool:
    """Whether a server that names a file `name` can only mean one in the model's folder, and not ours."""
    return name.isprintable() and name != NOTE and not {"", ".", ".."}.intersection(name.split("/"))


def _placed(name: str) -> bool:
    return "/" not in name or _POOLING.fullmatch(name) is not None


def _pickled(name: str) -> bool:
    return name.endswith(PICKLES)


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)
