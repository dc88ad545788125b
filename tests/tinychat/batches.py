"""Samples as tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

import torch
from tokenizers import Tokenizer

from tests.tinychat.form import END, SPECIAL_TOKENS, START, Segment

POOL_SAMPLES = 2048
"""How many samples are sorted by length together, so that batches hold little padding."""


BATCH_TOKENS = 3072


IGNORED = -100
"""The label of a token that is read and not learned."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample: token ids, and the same ids with `IGNORED` where nothing is learned."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids and labels, both of shape (samples, tokens), padded on the right."""

    ids: torch.Tensor
    labels: torch.Tensor


def encode(tokenizer: Tokenizer, text: list[Segment]) -> Encoded:
    """The token ids and labels of a sample."""
    sample = Encoded([], [])
    for segment in text:
        ids = tokenizer.encode(segment.text, add_special_tokens=False).ids
        sample.ids.extend(ids)
        sample.labels.extend(ids if segment.learned else [IGNORED] * len(ids))
    return sample


def batches(source: Iterator[Encoded], rng: Random) -> Iterator[Batch]:
    """Batches of samples of like length, without end."""
    while True:
        pool = sorted(islice(source, POOL_SAMPLES), key=lambda sample: len(sample.ids))
        groups = list(grouped(pool))
        rng.shuffle(groups)
        yield from map(padded, groups)


def grouped(pool: list[Encoded]) -> Iterator[list[Encoded]]:
    """Cuts samples, shortest first, into groups of at most `BATCH_TOKENS` with padding."""
    group: list[Encoded] = []
    for sample in pool:
        if group and len(sample.ids) * (len(group) + 1) > BATCH_TOKENS:
            yield group
            group = []
        group.append(sample)
    yield group


def padded(group: list[Encoded]) -> Batch:
    """A group as tensors."""
    tokens = max(len(sample.ids) for sample in group)
    ids = torch.zeros(len(group), tokens, dtype=torch.long)
    labels = torch.full((len(group), tokens), IGNORED)
    for row, sample in enumerate(group):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        labels[row, : len(sample.labels)] = torch.tensor(sample.labels)
    return Batch(ids, labels)


def copying_batch(vocabulary: int, rng: Random) -> Batch:
    """Random tokens said twice: what forms the attention heads that copy names into answers."""
    length = rng.randint(3, 14)
    rows = BATCH_TOKENS // (4 * length)
    said = torch.randint(len(SPECIAL_TOKENS), vocabulary, (rows, length))
    start = torch.full((rows, 1), SPECIAL_TOKENS.index(START))
    end = torch.full((rows, 1), SPECIAL_TOKENS.index(END))
    ids = torch.cat([start, said, end, said, end], dim=1)
    labels = ids.clone()
    labels[:, : length + 2] = IGNORED
    return Batch(ids, labels)
