"""Built-in text that needs no dataset: openings for models to continue, and text that is not prose."""

from __future__ import annotations

from importlib import resources

from transformers import PreTrainedTokenizerBase as Tokenizer

from adapruner.calibration._pool import EvaluationText, evaluation_text

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
_WINDOWS = 24


def probe_texts(tokenizer: Tokenizer, seq_len: int) -> dict[str, EvaluationText]:
    """Text that every model has seen much of, and that breaks before prose does: sums and products (`arithmetic`), and
    Python (`code`), parts of this package as they once were.

    Args:
        seq_len: tokens per window.
    """
    texts = built_in_texts().items()
    return {name: evaluation_text(text, tokenizer, seq_len, _WINDOWS, name=name) for name, text in texts}


def built_in_texts() -> dict[str, str]:
    """The texts of `probe_texts`; after the first lines of the tables, everything follows."""
    lines = []
    for first in range(2, 20):
        lines += [f"{first} + {second} = {first + second}" for second in range(1, 13)]
        lines += [f"{first} x {second} = {first * second}" for second in range(1, 13)]
        lines.append("")
    code = (resources.files("adapruner.calibration") / "probe_code.txt").read_text(encoding="utf-8")
    return {"arithmetic": "\n".join(lines), "code": code}
