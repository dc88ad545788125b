"""A model's config.json: what it says about text, and what is taken where it is silent.

vLLM reads it through a class of transformers, which has a default for each value, and a file that
was written by transformers leaves the defaults of its inner parts out. builder/families.json has them
for the model types whose layers are compared with vLLM's: `python -m scripts.model_families`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from handler.errors import BadModel

_NESTED = ("text_config", "llm_config", "language_config")
_OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": ("n_head_kv", "num_kv_heads", "multi_query_group_num", "num_attention_groups"),
    "hidden_size": ("n_embd", "n_embed", "d_model"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "layer_types": ("layers_block_type",),
    "dtype": ("torch_dtype",),
}


NOT_COMPARED = frozenset(
    {
        "qwen2_vl_text",
        "qwen2_5_vl_text",
        "qwen3_vl_text",
        "qwen3_vl_moe_text",
        "qwen3_5_text",
        "qwen3_5_moe_text",
    }
)
"""Types whose defaults are known and whose layers are not compared: their models in vLLM import torchvision,
which has no place beside an engine for CPUs. They are read as the types that they were made from."""


class Config:
    """What config.json says of a model's text part, with the defaults of its type."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self.whole = found
        self.text = _text(found)
        named = str(self.text.get("model_type") or found.get("model_type") or "unknown")
        # An older file of a model that sees has what is about text at its top.
        self.model_type = f"{named}_text" if f"{named}_text" in families() else named
        self._defaults = families().get(self.model_type, {})

    @property
    def compared(self) -> bool:
        """Whether the layers of models of this type are compared with vLLM's."""
        return self.model_type in families().keys() - NOT_COMPARED

    @property
    def architecture(self) -> str:
        """The class that the model is of."""
        named = self.whole.get("architectures") or self.text.get("architectures") or ["unknown"]
        return str(named[0])

    def get(self, name: str, default: Any = None) -> Any:
        """The value `name`, by any name that it goes by; `default` where it is null or nothing says it."""
        for key in (name, *_OTHER_NAMES.get(name, ())):
            if key in self.text:  # null is said, too, and is not what the type takes by itself
                return default if self.text[key] is None else self.text[key]
        return self._defaults.get(name, default)

    def number(self, name: str, default: int | None = None) -> int:
        """The whole number `name`. Raises `BadModel` where nothing says it."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            said = "nothing" if value is None else repr(value)
            raise BadModel(
                f"unknown attention shape: config.json says {said} of {name}, for the model type "
                f"{self.model_type!r}; a plan would be a guess without it"
            )
        return value


@cache
def families() -> Mapping[str, Mapping[str, Any]]:
    """What each model type that is compared with vLLM takes by default."""
    file = resources.files("builder").joinpath("families.json")
    found: dict[str, dict[str, Any]] = json.loads(file.read_text())
    return found


def _text(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """The innermost part that is about text: models that see or hear have one of their own for it."""
    thinker = found.get("thinker_config")
    outer: Mapping[str, Any] = thinker if isinstance(thinker, dict) else found
    for name in _NESTED:
        if isinstance(inner := outer.get(name), dict):
            return inner
    return outer
