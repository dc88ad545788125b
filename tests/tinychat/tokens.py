"""The tokenizer of the tiny chat model."""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.tinychat.form import SPECIAL_TOKENS, WORD_TOKENS, Segment

VOCABULARY = 2048


def make_tokenizer(corpus: Iterator[list[Segment]]) -> Tokenizer:
    """Byte-level BPE with each digit a token, made from the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(WORD_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((without_markers(text) for text in corpus), trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in WORD_TOKENS])
    return tokenizer


def without_markers(text: list[Segment]) -> str:
    """The text with a space for each token that is added whole, so that its parts earn no merges."""
    joined = "".join(segment.text for segment in text)
    for marker in SPECIAL_TOKENS + WORD_TOKENS:
        joined = joined.replace(marker, " ")
    return joined
