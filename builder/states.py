"""What models with a state keep of a sequence: Mamba, gated delta nets, short convolutions, and hybrids.

A state has the same size however long the sequence is. Source: `MambaStateShapeCalculator` in
vllm/model_executor/layers/mamba/mamba_utils.py of vLLM 0.32, and what each model gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from builder.config import Config
from builder.kv import FULL, STATE, Layers
from builder.layers import Unknown, head_dim, heads_kept
from builder.lengths import ITEM_BYTES
from handler.errors import UsageError

ATTENTION = frozenset({"attention", "full_attention", "*"})
STATEFUL = frozenset({"mamba", "linear_attention", "conv", "M"})
MAMBA2_STATES = 3
"""One more than others: it notes the state at the end of a block in the middle of a step."""


@dataclass(frozen=True, slots=True)
class State:
    """How many numbers a layer keeps of a sequence, whole: the last inputs, and what was made of all."""

    inputs: int
    memory: int = 0


def kept(
    config: Config, tensor_parallel: int, item_bytes: int, model_item_bytes: int, state_item_bytes: int | None
) -> list[Layers]:
    """What one of `tensor_parallel` GPUs keeps for the attention layers and for those with a state.

    `item_bytes` has a number of a key, `model_item_bytes` one of the last inputs, and
    `state_item_bytes` one of the memory, unless that is None and the model decides. Raises
    `Unknown`, `BadModel` and `UsageError`.
    """
    family = FAMILIES[config.model_type]
    of_memory = state_item_bytes or ITEM_BYTES.get(str(config.get(family.dtype, "")), model_item_bytes)
    state = family.state(config, tensor_parallel)
    if state.inputs % tensor_parallel or state.memory % tensor_parallel:
        raise UsageError(f"the state of {config.model_type} can't be divided among {tensor_parallel} GPUs")
    state_bytes = (state.inputs * model_item_bytes + state.memory * of_memory) // tensor_parallel
    kinds = family.kinds(config)
    full = sum(kind in ATTENTION for kind in kinds)
    stateful = len(kinds) if family.both else sum(kind in STATEFUL for kind in kinds)
    # A model of states alone caches no prompts.
    found = [Layers(STATE, stateful, state_bytes=state_bytes, states=family.states if full else 1)]
    if full:
        heads = heads_kept(config, tensor_parallel)
        found.insert(0, Layers(FULL, full, heads, 2 * head_dim(config), item_bytes))
    return [layers for layers in found if layers.count]


def _listed(config: Config) -> Sequence[str]:
    """The kind of each layer as config.json lists them."""
    found: Sequence[str] | None = config.get("hybrid_override_pattern") or config.get("layer_types")
    if not found:
        raise Unknown("config.json does not list which of its layers keep a state")
    return found


def _every_fourth(config: Config) -> Sequence[str]:
    if listed := config.get("layer_types"):
        return list(listed)
    every = config.number("full_attention_interval", 4)
    count = config.number("num_hidden_layers")
    return ["linear_attention" if number % every else "attention" for number in range(1, count + 1)]


def _jamba_kinds(config: Config) -> Sequence[str]:
    period, offset = config.number("attn_layer_period"), config.number("attn_layer_offset")
    count = config.number("num_hidden_layers")
    return ["attention" if number % period == offset else "mamba" for number in range(count)]


def _lfm2_kinds(config: Config) -> Sequence[str]:
    if listed := config.get("layer_types"):
        return list(listed)
    full = config.get("full_attn_idxs")
    return [
        "attention" if full is None or number in full else "conv"
        for number in range(config.number("num_hidden_layers"))
    ]


def _all(kind: str) -> Callable[[Config], Sequence[str]]:
    return lambda config: [kind] * config.number("num_hidden_layers")


def _mamba(config: Config, _: int) -> State:
    wide = config.number("intermediate_size", config.number("expand", 2) * config.number("hidden_size"))
    return State(wide * (config.number("conv_kernel") - 1), wide * config.number("state_size"))


def _jamba(config: Config, _: int) -> State:
    wide = config.number("mamba_expand") * config.number("hidden_size")
    return State(wide * (config.number("mamba_d_conv") - 1), wide * config.number("mamba_d_state"))


def _mamba2(wide: int, groups: int, heads: int, head: int, size: int, kernel: int, gpus: int) -> State:
    # Where the groups can't be divided, each GPU keeps those that its heads need.
    groups += 0 if groups % gpus == 0 else gpus - groups
    return State((wide + 2 * groups * size) * (kernel - 1), heads * head * size)


def _plain_mamba2(config: Config, gpus: int) -> State:
    number = config.number
    heads, head = number("num_heads"), number("head_dim")
    wide = number("expand") * number("hidden_size")
    return _mamba2(wide, number("n_groups"), heads, head, number("state_size"), number("conv_kernel"), gpus)


def _granite(config: Config, gpus: int) -> State:
    number = config.number
    heads, wide = number("mamba_n_heads"), number("mamba_expand") * number("hidden_size")
    if (said := config.get("mamba_d_ssm")) is not None:
        wide = int(said)
    head = wide // heads if config.get("mamba_d_head", "auto") == "auto" else number("mamba_d_head")
    size, kernel = number("mamba_d_state"), number("mamba_d_conv")
    return _mamba2(wide, number("mamba_n_groups"), heads, head, size, kernel, gpus)


def _nemotron(config: Config, gpus: int) -> State:
    number = config.number
    heads, head = number("mamba_num_heads"), number("mamba_head_dim")
    size, kernel = number("ssm_state_size"), number("conv_kernel", 4)
    return _mamba2(heads * head, number("n_groups"), heads, head, size, kernel, gpus)


def _delta_net(config: Config, _: int) -> State:
    number = config.number
    keys, values = number("linear_num_key_heads"), number("linear_num_value_heads")
    key, value = number("linear_key_head_dim"), number("linear_value_head_dim")
    inputs = (2 * keys * key + values * value) * (number("linear_conv_kernel_dim") - 1)
    return State(inputs, values * value * key)


def _short_convolution(config: Config, _: int) -> State:
    wide = config.number("conv_dim", config.number("hidden_size"))
    return State(wide * (config.number("conv_L_cache") - 1))


@dataclass(frozen=True, slots=True)
class Family:
    """How models of a type are read."""

    state: Callable[[Config, int], State]
    kinds: Callable[[Config], Sequence[str]]
    dtype: str = ""
    """The name in config.json of the memory's type, where it is not the model's."""
    both: bool = False
    """Whether each layer has attention and a state."""
    states: int = 2
    """States of a sequence that vLLM holds besides attention: the last one and that of a prompt it caches."""


FAMILIES: Mapping[str, Family] = {
    "mamba": Family(_mamba, _all("mamba")),
    "falcon_mamba": Family(_mamba, _all("mamba")),
    "mamba2": Family(_plain_mamba2, _all("mamba")),
    "jamba": Family(_jamba, _jamba_kinds),
    "granitemoehybrid": Family(_granite, _listed, states=MAMBA2_STATES),
    "falcon_h1": Family(_granite, _all("attention"), both=True, states=MAMBA2_STATES),
    "nemotron_h": Family(_nemotron, _listed, "mamba_ssm_cache_dtype", states=MAMBA2_STATES),
    "qwen3_next": Family(_delta_net, _every_fourth),
    "qwen3_5_text": Family(_delta_net, _every_fourth, "mamba_ssm_dtype"),
    "qwen3_5_moe_text": Family(_delta_net, _every_fourth, "mamba_ssm_dtype"),
    "lfm2": Family(_short_convolution, _lfm2_kinds),
    "lfm2_moe": Family(_short_convolution, _lfm2_kinds),
}
"""Of each model type with a state."""
