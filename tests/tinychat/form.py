"""Samples as the text that the model reads: by the chat template itself, never by a copy of it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tests.tinychat.sample import Dialogue, Sample

END_OF_TEXT = "<|endoftext|>"
START = "<|im_start|>"
END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, START, END)
"""Their ids are their positions here."""

WORD_TOKENS = ("<tool_call>", "</tool_call>")
"""Tokens of their own, but not special: they must survive in the text that a tool parser sees."""

TEMPLATE_FILE = Path(__file__).with_name("chat_template.jinja")

_ANSWER = re.compile(re.escape(f"{START}assistant\n") + "(.*?" + re.escape(END) + ")", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a sample's text, and whether the model learns to say it."""

    text: str
    learned: bool


def chat_template(source: str) -> Template:
    """The template as transformers and vLLM compile it."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = _to_json
    return environment.from_string(source)


def rendered(template: Template, dialogue: Dialogue) -> str:
    """The whole text of a dialogue."""
    return template.render(messages=dialogue.messages, tools=dialogue.tools, add_generation_prompt=False)


def segments(template: Template, sample: Sample) -> list[Segment]:
    """The text of a sample, cut where learning starts and stops."""
    if not isinstance(sample, Dialogue):
        return [Segment(sample.text + END, learned=True)]
    text = rendered(template, sample)
    cuts: list[Segment] = []
    done = 0
    for answer in _ANSWER.finditer(text):
        cuts.append(Segment(text[done : answer.start(1)], learned=False))
        cuts.append(Segment(answer.group(1), learned=True))
        done = answer.end()
    return cuts


def _to_json(value: Any) -> str:
    # jinja's own filter escapes HTML and sorts keys; transformers replaces it by this
    return json.dumps(value, ensure_ascii=False)
