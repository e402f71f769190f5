"""Built-in text that needs no dataset: prompts whose answers people read, and text of several kinds."""

from __future__ import annotations

from importlib import resources

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer

from adapruner.calibration._pool import EvaluationText, evaluation_text
from adapruner.calibration._tokenizing import tokenize

# Of the prompts whose answers are shown.
_OPENINGS = (
    "The old bridge over the river was built",
    "To bake a loaf of bread, first",
    "Plants turn sunlight into",
    "Question: Why is the sky blue?\nAnswer:",
    "def mean(numbers):\n    ",
)
_QUESTIONS = (
    "Why is the sky blue?",
    "Write a polite email to say that I will be late tomorrow.",
    "What is the difference between a frog and a toad?",
    "What is 12 plus 30?",
    "Write a Python function that returns the largest number of a list.",
)
# The most windows of each built-in text.
_WINDOWS = 24


def prompts_to_show(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """The tokens of a few prompts by their text: questions in the form in which the model is asked, if the tokenizer
    has a chat template that takes a single question; else openings to continue."""
    asked = {question: as_chat(tokenizer, question) for question in _QUESTIONS}
    if not all(asked.values()):
        return {opening: list(tokenize(tokenizer, opening).input_ids) for opening in _OPENINGS}
    encoded = tokenize(tokenizer, list(asked.values()), add_special_tokens=False).input_ids
    return dict(zip(asked, encoded, strict=True))


def as_chat(tokenizer: Tokenizer, question: str) -> str:
    """The question in the chat template; empty if there is none, or it refuses the question."""
    if not tokenizer.chat_template:
        return ""
    chat = [{"role": "user", "content": question}]
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    except (TemplateError, ValueError):
        return ""


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
