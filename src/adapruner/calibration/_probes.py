"""Built-in text that needs no dataset: openings and questions for models, and text of several kinds."""

from __future__ import annotations

import json
from importlib import resources
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer

from adapruner.calibration._pool import EvaluationText, evaluation_text
from adapruner.calibration._tokenizing import tokenize

# Beginnings of texts of different kinds.
OPENINGS = (
    "The old bridge over the river was built",
    "To bake a loaf of bread, first",
    "My sister called yesterday and told me that",
    "Plants turn sunlight into",
    "The committee decided on Tuesday to",
    "In the year 1850, the town",
    "The easiest way to learn a new language is",
    "A triangle has three sides, and",
    "When the train finally arrived,",
    "Scientists who study the ocean have found",
    "The king had two sons. The elder",
    "Question: Why is the sky blue?\nAnswer:",
    "Dear Mr. Brown,\n\nThank you for",
    "The price of oil rose last week because",
    "Here is a list of things to pack for a journey:\n1.",
    "def mean(numbers):\n    ",
)
# Tokens per window of the built-in texts, of which there is little.
PROBED_TOKENS = 128
_WINDOWS = 24


class Question(NamedTuple):
    """A question and the answers to choose from; the first one is right."""

    question: str
    choices: list[str]


def prompts(tokenizer: Tokenizer) -> dict[str, dict[str, list[int]]]:
    """The tokens of prompts by their text: `openings` to continue and, if the tokenizer has a chat template that
    takes a single question, `questions` in the form in which the model is asked."""
    tokens = {"openings": {opening: list(tokenize(tokenizer, opening).input_ids) for opening in OPENINGS}}
    asked = {question: as_chat(tokenizer, question) for question in _read("questions_to_answer.txt").splitlines()}
    if all(asked.values()):
        encoded = tokenize(tokenizer, list(asked.values()), add_special_tokens=False).input_ids
        tokens["questions"] = dict(zip(asked, encoded, strict=True))
    return tokens


def as_chat(tokenizer: Tokenizer, question: str) -> str:
    """The question in the chat template; empty if there is none, or it refuses the question."""
    if not tokenizer.chat_template:
        return ""
    chat = [{"role": "user", "content": question}]
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    except (TemplateError, ValueError):
        return ""


def questions() -> list[Question]:
    """Simple questions of general knowledge with two to four choices."""
    return [Question(**json.loads(line)) for line in _read("questions_to_choose.jsonl").splitlines()]


def probe_texts(tokenizer: Tokenizer, seq_len: int) -> dict[str, EvaluationText]:
    """Texts that every model has seen the like of, in windows of `seq_len` tokens: sums and products (`arithmetic`),
    Python (`code`, parts of this package as they once were), a story (`prose`), conversations (`dialogue`), and tasks
    with answers (`instructions`)."""
    texts = built_in_texts().items()
    return {name: evaluation_text(text, tokenizer, seq_len, _WINDOWS, name=name) for name, text in texts}


def built_in_texts() -> dict[str, str]:
    """The texts of `probe_texts`; after the first lines of the tables, everything follows."""
    lines = []
    for first in range(2, 20):
        lines += [f"{first} + {second} = {first + second}" for second in range(1, 13)]
        lines += [f"{first} x {second} = {first * second}" for second in range(1, 13)]
        lines.append("")
    written = ("code", "prose", "dialogue", "instructions")
    return {"arithmetic": "\n".join(lines), **{name: _read(f"probe_{name}.txt") for name in written}}


def _read(name: str) -> str:
    return (resources.files("adapruner.calibration") / name).read_text(encoding="utf-8")
