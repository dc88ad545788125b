"""Which of a repository's files vLLM reads."""

from __future__ import annotations

import re
from collections.abc import Iterable

from handler.errors import ModelNotFound

SUFFIXES = (".json", ".safetensors", ".model", ".jinja", ".tiktoken", ".txt", ".py")
"""Configuration, tokenizer and weights. Python is read only where vLLM's TRUST_REMOTE_CODE is set."""

_POOLING = re.compile(r"\d_\w+/[^/]+")
"""What sentence-transformers keep of an embedding model beside the root."""


def needed(names: Iterable[str]) -> list[str]:
    """Those of `names`, paths in a repository, that vLLM reads, sorted: no pickles, no weights twice.

    Raises `ModelNotFound` where there are no safetensors.
    """
    kept = (name for name in names if name.endswith(SUFFIXES))
    chosen = sorted(name for name in kept if "/" not in name or _POOLING.fullmatch(name))
    weights = [name for name in chosen if name.endswith(".safetensors") and "/" not in name]
    if not weights:
        raise ModelNotFound(
            "it has no .safetensors files. Pickled weights (.bin, .pt) run the code of whoever made them "
            "and are not taken: convert them, or name a repository or a folder that has safetensors"
        )
    # Mistral's own format lies beside the one that vLLM prefers.
    if any(not name.startswith("consolidated") for name in weights):
        chosen = [name for name in chosen if not name.startswith("consolidated")]
    return chosen
