"""Makes the tiny chat model: `python -m tests.tinychat.train OUT --steps 3200`."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tinychat.batches import IGNORED, Batch, Encoded, batches, copying_batch, encode
from tests.tinychat.data import samples
from tests.tinychat.form import (
    END,
    END_OF_TEXT,
    SPECIAL_TOKENS,
    TEMPLATE_FILE,
    Segment,
    chat_template,
    segments,
)
from tests.tinychat.tokens import VOCABULARY, make_tokenizer

CONTEXT_TOKENS = 2048
CORPUS_SAMPLES = 20_000
"""How many samples the tokenizer is made from."""

LEARNING_RATE = 4e-3
WARM_UP_STEPS = 60
REPORT_STEPS = 50


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to train: a number of steps (repeatable) or seconds of CPU time."""

    steps: int | None
    cpu_s: float

    def spent(self, step: int) -> float:
        """The part that is used up: 0 at the start, 1 and more when it is over."""
        if self.steps is not None:
            return step / self.steps
        return time.process_time() / self.cpu_s


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, trains, and writes the model folder."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rng = Random(options.seed)
    texts = rendered_samples(rng)
    tokenizer = make_tokenizer(islice(texts, CORPUS_SAMPLES))
    model = make_model()
    source = (encode(tokenizer, text) for text in texts)
    train(model, tokenizer, source, rng, Budget(options.steps, options.minutes * 60))
    save(model, tokenizer, options.out)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options: `out`, `minutes`, `steps`, `threads`, `seed`."""
    parser = argparse.ArgumentParser(prog="python -m tests.tinychat.train", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write the model to")
    parser.add_argument(
        "--minutes", type=float, default=30, help="minutes of CPU time (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, help="a number of steps instead: repeatable")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the data and the weights (default: %(default)s)"
    )
    return parser.parse_args(argv)


def rendered_samples(rng: Random) -> Iterator[list[Segment]]:
    """Samples without end, as text."""
    template = chat_template(TEMPLATE_FILE.read_text())
    for sample in samples(rng):
        yield segments(template, sample)


def make_model() -> LlamaForCausalLM:
    """The untrained model: 2 million parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL_TOKENS.index(END_OF_TEXT),
        eos_token_id=SPECIAL_TOKENS.index(END),
        pad_token_id=SPECIAL_TOKENS.index(END_OF_TEXT),
    )
    return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM, tokenizer: Tokenizer, source: Iterator[Encoded], rng: Random, budget: Budget
) -> None:
    """Trains the model in place until the budget is spent."""
    optimizers = make_optimizers(model)
    progress = Progress()
    source_batches = batches(source, rng)
    step = 0
    while (spent := budget.spent(step)) < 1:
        copying = rng.random() < copying_share(spent)
        batch = copying_batch(tokenizer.get_vocab_size(), rng) if copying else next(source_batches)
        set_learning_rate(optimizers, LEARNING_RATE * warm_up(step) * cool_down(spent))
        loss = learn(model, optimizers, batch)
        step += 1
        progress.add(step, loss, batch, copying=copying)


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the embedding and the norms."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and "embed" not in name
        (matrices if inner else others).append(parameter)
    return [
        torch.optim.Muon(
            matrices, lr=LEARNING_RATE, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def warm_up(step: int) -> float:
    """Rises to 1 over the first steps."""
    return min(1.0, (step + 1) / WARM_UP_STEPS)


def cool_down(spent: float) -> float:
    """Falls from 1 at four tenths of the budget to a fiftieth at its end."""
    return min(1.0, max(0.02, (1 - spent) / 0.6))


def copying_share(spent: float) -> float:
    """The share of batches that only practise copying: many at first, none in the second half."""
    if spent < 0.25:
        return 0.5
    return 0.2 if spent < 0.5 else 0.0


def set_learning_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """Sets the rate of every optimizer."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def learn(model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], batch: Batch) -> float:
    """One step; returns the mean loss of the learned tokens, in nats."""
    hidden = model.model(input_ids=batch.ids[:, :-1]).last_hidden_state
    targets = batch.labels[:, 1:]
    learned = targets != IGNORED
    loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[learned]), targets[learned])
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return float(loss.detach())


class Progress:
    """Says on standard output how training goes."""

    def __init__(self) -> None:
        self.tokens = 0
        self.loss: float | None = None

    def add(self, step: int, loss: float, batch: Batch, *, copying: bool) -> None:
        """Counts one step."""
        self.tokens += batch.ids.numel()
        if not copying:
            self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss
        if step % REPORT_STEPS == 0:
            cpu_s = time.process_time()
            print(
                f"step {step} loss {self.loss:.4f} tokens {self.tokens / 1e6:.2f}M cpu {cpu_s:.0f}s",
                flush=True,
            )


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Writes a model folder that transformers and vLLM load."""
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    shutil.copyfile(TEMPLATE_FILE, out / "chat_template.jinja")
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END,
            "pad_token": END_OF_TEXT,
            "model_max_length": CONTEXT_TOKENS,
            "clean_up_tokenization_spaces": False,
        },
    )
    write_json(
        out / "generation_config.json",
        {
            "bos_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
            "eos_token_id": SPECIAL_TOKENS.index(END),
            "pad_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
        },
    )


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON file that reads well."""
    path.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    main()
