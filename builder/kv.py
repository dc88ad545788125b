"""How vLLM divides the memory of its KV cache, and how many sequences of a length that holds.

A model's layers are put into groups of as many layers each. The cache is a number of blocks, and a
block has a page for each layer of a group; all groups draw blocks from the same pool, so that a block is
as large as its largest group. Source: `get_kv_cache_groups`, `get_kv_cache_config_from_groups` and
`get_max_concurrency_for_kv_cache_config` in vllm/v1/core/kv_cache_utils.py of vLLM 0.32, and the
specifications in vllm/v1/kv_cache_interface.py. tests/integration/test_plan_vllm.py compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FULL = "full"
"""Every token is kept."""
LATENT = "latent"
"""Every token is kept, as one vector that all heads share (multi-head latent attention)."""
SLIDING = "sliding"
"""The last tokens are kept, those of a window."""
CHUNKED = "chunked"
"""The tokens since the last multiple of a window are kept."""
STATE = "state"
"""No token is kept but a state, of the same size however long the sequence is (Mamba and others)."""


@dataclass(frozen=True, slots=True)
class Layers:
    """What one GPU keeps for all layers of one kind."""

    kind: str
    count: int
    heads: int = 0
    """KV heads of a layer on this GPU."""
    width: int = 0
    """Numbers that a head keeps of a token: keys and values."""
    item_bytes: int = 0
    window: int = 0
    """Tokens that a `SLIDING` or `CHUNKED` layer looks back on, its own among them."""
    state_bytes: int = 0
    """What a `STATE` layer keeps of a sequence."""
    states: int = 1
    """How often: vLLM holds earlier states as well, where it caches prompts."""

    @property
    def token_bytes(self) -> int:
        """What one layer keeps of one token."""
        return self.heads * self.width * self.item_bytes

    @property
    def grows(self) -> bool:
        """Whether it keeps every token."""
        return self.kind in {FULL, LATENT}


@dataclass(frozen=True, slots=True)
class Group:
    """Groups of layers that need the same number of blocks."""

    layers: Layers
    block_tokens: int
    count: int
    """How many groups there are of them."""

    def blocks(self, tokens: int, in_flight: int) -> int:
        """How many blocks a sequence of `tokens` may need in each of the groups."""
        if self.layers.kind == STATE:
            return self.layers.states
        if self.layers.kind == SLIDING:
            kept = min(self.layers.window - 1 + in_flight, tokens)
            return _ceil(kept, self.block_tokens) + 1  # the window may begin inside a block
        if self.layers.kind == CHUNKED:
            return _ceil(min(self.layers.window + in_flight, tokens), self.block_tokens)
        return _ceil(tokens, self.block_tokens)


@dataclass(frozen=True, slots=True)
class Pool:
    """The blocks of a KV cache."""

    block_bytes: int
    groups: tuple[Group, ...]
    in_flight: int
    """Tokens that may be computed at a time: a window's blocks are given back only after a step."""

    def blocks(self, tokens: int) -> int:
        """How many blocks a sequence of `tokens` may need."""
        return sum(group.count * group.blocks(tokens, self.in_flight) for group in self.groups)

    def sequence_bytes(self, tokens: int) -> int:
        """What a sequence of `tokens` may need, in whole blocks."""
        return self.blocks(tokens) * self.block_bytes

    def sequences(self, cache_bytes: int, tokens: int) -> float:
        """How many sequences of `tokens` a cache of `cache_bytes` holds: vLLM's maximum concurrency.

        None at all where not even one fits beside the block that vLLM keeps for itself.
        """
        blocks = max(0, cache_bytes) // self.block_bytes
        needed = self.blocks(tokens)
        return blocks / needed if blocks > needed else 0.0

    def longest(self, cache_bytes: int, most: int) -> int:
        """The longest sequence, of at most `most` tokens, that a cache of `cache_bytes` holds."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.sequences(cache_bytes, middle) else (low, middle - 1)
        return low


def pool(layers: Sequence[Layers], *, block_tokens: int, in_flight: int) -> Pool | None:
    """The pool for `layers`, in blocks of `block_tokens` tokens where nothing asks for larger ones.

    None without layers, and where vLLM's way with such a mix of them is not known here.
    """
    if not layers:
        return None
    states = [kind for kind in layers if kind.kind == STATE]
    spaced = [kind for kind in layers if kind.kind != STATE]
    if not spaced:
        return _same(states, {kind: kind.state_bytes for kind in states}, block_tokens, in_flight)
    if states:
        if len({kind.token_bytes for kind in spaced}) > 1 or len(states) > 1:
            return None
        # A layer's page is as large as a state, so that both can be in the same blocks.
        block_tokens *= _ceil(states[0].state_bytes, block_tokens * spaced[0].token_bytes)
    pages = {kind: block_tokens * kind.token_bytes for kind in spaced}
    if not states and (len(spaced) == 1 or all(kind.grows for kind in spaced)):
        return _same(spaced, pages, block_tokens, in_flight)
    return _mixed(layers, pages, block_tokens, in_flight)


def _same(layers: Sequence[Layers], pages: dict[Layers, int], block_tokens: int, in_flight: int) -> Pool:
    """All layers in one group, because they need blocks for the same tokens."""
    size_bytes = sum(kind.count * pages[kind] for kind in layers)
    return Pool(size_bytes, (Group(layers[0], block_tokens, 1),), in_flight)


def _mixed(
    layers: Sequence[Layers], pages: dict[Layers, int], block_tokens: int, in_flight: int
) -> Pool | None:
    """Groups of as many layers each, with pages of one size: the largest."""
    page = max(pages.values())
    tokens = {kind: block_tokens * (page // size if page % size == 0 else 1) for kind, size in pages.items()}
    if any(page % size and kind.kind == LATENT for kind, size in pages.items()):
        return None
    fewest, most = min(kind.count for kind in layers), max(kind.count for kind in layers)
    size = most if most < fewest * 1.5 else fewest
    groups = (Group(kind, tokens.get(kind, block_tokens), _ceil(kind.count, size)) for kind in layers)
    return Pool(size * page, tuple(groups), in_flight)


def _ceil(amount: int, unit: int) -> int:
    return -(-amount // unit)
