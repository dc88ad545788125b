"""How much the tiny chat model knows: `python -m tests.tinychat.score MODEL`.

Prints, for each task, the share of new dialogues in which it says every answer to the letter.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from tests.tinychat.batches import IGNORED, encode, grouped, padded
from tests.tinychat.data import SHARES, passage
from tests.tinychat.form import TEMPLATE_FILE, chat_template, segments
from tests.tinychat.sample import Sample
from tests.tinychat.stories import story

INVENTED = frozenset({story.__name__, passage.__name__})
"""Tasks without one right answer."""


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.tinychat.score", description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="the model's folder")
    parser.add_argument("--dialogues", type=int, default=200, help="for each task (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="not the trainer's (default: %(default)s)")
    options = parser.parse_args(argv)
    model = LlamaForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    for make, _ in SHARES:
        if make.__name__ not in INVENTED:
            rng = Random(options.seed)
            share = exact_share(model, tokenizer, [make(rng) for _ in range(options.dialogues)])
            print(f"{make.__name__:12} {share:6.1%}")


def exact_share(model: LlamaForCausalLM, tokenizer: Tokenizer, dialogues: list[Sample]) -> float:
    """Share of the dialogues whose learned tokens are each the model's likeliest next one.

    Given that all before it were, that is what the model says at temperature 0.
    """
    template = chat_template(TEMPLATE_FILE.read_text())
    coded = [encode(tokenizer, segments(template, dialogue)) for dialogue in dialogues]
    exact = 0
    for batch in map(padded, grouped(sorted(coded, key=lambda sample: len(sample.ids)))):
        with torch.inference_mode():
            said = model(input_ids=batch.ids[:, :-1]).logits.argmax(dim=-1)
        targets = batch.labels[:, 1:]
        exact += int(((said == targets) | (targets == IGNORED)).all(dim=1).sum())
    return exact / len(dialogues)


if __name__ == "__main__":
    main()
