"""Text that needs no dataset: `mix`, which a model writes itself in several kinds, and built-in prompts and texts.

A model answers prompts and continues openings; half of the code is functions of the standard library of Python, and
half of the mathematics is sums that are right."""

import contextlib
import hashlib
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from itertools import product
from traceback import walk_tb
from types import FrameType
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.base.files import parse_yaml
from adapruner.model.generation import NO_TOKEN, continue_texts
from adapruner.text.installed import python_functions
from adapruner.text.reading import is_of_part
from adapruner.text.sources import Part
from adapruner.text.windows import (
    EvaluationText,
    cut_into_windows,
    evaluation_text,
    start_of_windows,
    tokenize,
    tokens_to_continue,
)

# The most tokens of a text, after its prompt, and how many it has in the mean, for the number of texts; the most of a
# prompt where positions have no end.
_NEW_TOKENS, _MEAN_TOKENS, _LONGEST_BEGINNING = 192, 150, 512
_TEMPERATURE = 0.8
_SUMS = 12
# A language that a tokenizer serves has at least so many bytes per token.
_BYTES_PER_TOKEN = 1.7


class Kind(NamedTuple):
    """What a text of a kind begins with: questions for a chat, and openings."""

    prompts: list[str]
    openings: list[str]

    @property
    def fingerprint(self) -> str:
        """A hash of the content."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()


@cache
def kinds() -> dict[str, Kind]:
    """The kinds of text of `mix` by name, with all that their texts may begin with, in the order of mix.yaml."""
    text = (resources.files("adapruner.text") / "mix.yaml").read_text(encoding="utf-8")
    return {
        name: Kind(*([*_filled(kind[part], kind["words"])] for part in ("prompts", "openings")))
        for name, kind in parse_yaml(text).items()
    }


def _filled(templates: Sequence[str], words: dict[str, list[str]]) -> Iterator[str]:
    """Every template with all combinations of its words; the combinations of a template are scattered, and the first
    of every template come first."""
    filled = []
    for template in templates:
        names = sorted(set(re.findall(r"(?<!\{)\{(\w+)\}", template)))
        combinations = [*product(*(words[name] for name in names))]
        random.Random(template).shuffle(combinations)
        filled.append([template.format(**dict(zip(names, values, strict=True))) for values in combinations])
    for number in range(max(map(len, filled))):
        yield from (texts[number] for texts in filled if number < len(texts))


def served_kinds(tokenizer: Tokenizer) -> dict[str, Kind]:
    """The kinds, without the beginnings that the tokenizer splits into pieces of hardly more than a byte."""

    def served(texts: list[str]) -> list[str]:
        others = [text for text in texts if not text.isascii()]
        pieces = tokenize(tokenizer, others, add_special_tokens=False).input_ids if others else []
        pairs = zip(others, pieces, strict=True)
        split = {text for text, tokens in pairs if len(text.encode()) < _BYTES_PER_TOKEN * len(tokens)}
        return [text for text in texts if text not in split]

    found = {name: Kind(served(kind.prompts), served(kind.openings)) for name, kind in kinds().items()}
    return {name: kind for name, kind in found.items() if kind.openings}


def _sums(order: random.Random) -> Iterator[str]:
    """Calculations with one or two signs, and their results."""
    while True:
        first, second, third = (order.randint(2, 99) for _ in range(3))
        yield order.choice(
            (
                f"{first} + {second} = {first + second}",
                f"{first + second} - {second} = {first}",
                f"{first} * {third % 11} = {first * (third % 11)}",
                f"{first} + {second} * {third % 11} = {first + second * (third % 11)}",
                f"({first} + {second}) * {third % 11} = {(first + second) * (third % 11)}",
                f"{first * (third % 11 + 1)} / {third % 11 + 1} = {first}",
            )
        )


def _known(name: str, tokenizer: Tokenizer, count: int, part: Part, seed: str) -> list[int]:
    """The tokens of text of a kind that no model has to write, at most so many; none of most kinds."""
    order, tokens = random.Random(seed), list[int]()
    if name == "code":
        functions = [function for function in python_functions() if is_of_part(function, part)]
        order.shuffle(functions)
        texts: Iterable[str] = (f"{function}\n\n\n" for function in functions)
    elif name == "mathematics":
        sums = _sums(order)
        texts = iter(lambda: "\n".join(next(sums) for _ in range(_SUMS)) + "\n\n", "")
    else:
        texts = ()
    for text in texts:
        if len(tokens) >= count:
            break
        tokens += tokenize(tokenizer, text, add_special_tokens=False).input_ids
    return tokens[:count]


def write_kinds(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    counts: Mapping[str, int],
    seq_len: int,
    part: Part,
    seed: int,
    ends: Sequence[int],
    advance: Callable[[float], None] | None = None,
) -> dict[str, Tensor]:
    """Windows of every kind that a model writes, sampled at temperature 0.8. Half of the texts are answers to prompts,
    if there is a chat template; the others continue openings. The windows go through them from one to the next, and
    every window begins as the tokenizer begins a text, which the texts inside of it then do not.

    Args:
        counts: the number of windows of each kind.
        part: each part has its own functions of the standard library and its own random numbers.
        ends: the tokens that end a text.
        advance: called with fractions of the number of all windows.

    Returns:
        By kind, [windows, seq_len], int64: the same for the same seed on the same machine; none of a language that the
        tokenizer does not serve.
    """
    served, stream, start = served_kinds(tokenizer), f"{part} {seed}", start_of_windows(tokenizer, seq_len)
    size, first = seq_len - len(start), start.tolist()
    drawn = {name: _beginnings(tokenizer, served[name], f"{stream} {name}") for name in counts if name in served}
    pieces = {name: _known(name, tokenizer, count // 2 * size, part, stream) for name, count in counts.items()}
    lacking = {name: count * size - len(pieces[name]) for name, count in counts.items() if count and name in drawn}
    rounds, asked = 0, list[tuple[str, list[int]]]()
    # A model with few positions has room for its own words too.
    room = (getattr(model.config, "max_position_embeddings", None) or 2 * _LONGEST_BEGINNING) // 2

    def step(texts: float) -> None:
        if advance and not rounds:  # in which most is written
            advance(texts * sum(counts.values()) / len(asked))

    while lacking:
        numbers = {name: math.ceil(tokens / _MEAN_TOKENS) for name, tokens in lacking.items()}
        asked = [(name, next(drawn[name])[-room:]) for name, number in numbers.items() for _ in range(number)]
        asked.sort(key=lambda beginning: len(beginning[1]))  # those of a batch are padded to one length
        texts = continue_texts(
            model,
            [tokens for _, tokens in asked],
            min(_NEW_TOKENS, max(lacking.values())),
            torch.full((len(asked),), _TEMPERATURE),
            random.Random(f"{stream} {rounds}").getrandbits(62),
            ends,
            step,
        )
        for (name, _), row in zip(asked, texts, strict=True):
            tokens = row[row != NO_TOKEN].tolist()
            pieces[name] += tokens[len(first) :] if tokens[: len(first)] == first else tokens
        rounds += 1
        lacking = {name: rest for name in lacking if (rest := counts[name] * size - len(pieces[name])) > 0}
    tokens_of_kind = {name: torch.tensor(pieces[name][: count * size]) for name, count in counts.items()}
    return {
        name: cut_into_windows(tokens, start, seq_len) if len(tokens) else torch.empty((0, seq_len), dtype=torch.int64)
        for name, tokens in tokens_of_kind.items()
    }


def _beginnings(tokenizer: Tokenizer, kind: Kind, seed: str) -> Iterator[list[int]]:
    """The tokens of prompts in the chat template and of openings in turn, in a random order, again and again."""
    order, has_chat = random.Random(seed), bool(kind.prompts and as_chat(tokenizer, kind.prompts[0]))
    while True:
        sources = [[*kind.prompts], [*kind.openings]] if has_chat else [[*kind.openings]]
        for source in sources:
            order.shuffle(source)
        for *prompts, opening in zip(*sources, strict=False):
            for chat in filter(None, (as_chat(tokenizer, prompt) for prompt in prompts)):
                yield list(tokenize(tokenizer, chat, add_special_tokens=False).input_ids)
            yield tokens_to_continue(tokenizer, opening)


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
        return {opening: tokens_to_continue(tokenizer, opening) for opening in _OPENINGS}
    encoded = tokenize(tokenizer, list(asked.values()), add_special_tokens=False).input_ids
    return dict(zip(asked, encoded, strict=True))


# Lines of a chat template that are run for a question, and characters that it may write: far more than any needs.
_MOST_LINES, _MOST_WRITTEN = 100_000, 1_000_000


def as_chat(tokenizer: Tokenizer, question: str) -> str:
    """The question in the chat template; empty if there is none, or it refuses the question, fails, or does not end."""
    templates = tokenizer.chat_template
    template = templates.get("default") if isinstance(templates, dict) else templates
    if not isinstance(template, str) or not template:
        return ""
    chat = [{"role": "user", "content": question}]
    try:
        with _bounded_template():
            return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    except Exception as error:
        modules = [frame.f_globals.get("__name__", "").split(".")[0] for frame, _ in walk_tb(error.__traceback__)]
        # Errors outside Jinja, or of this package inside it, are bugs; a template may recurse in both.
        is_ours = modules[-1] == "adapruner" and not isinstance(error, RecursionError)
        if not isinstance(error, TemplateError) and (is_ours or "jinja2" not in modules):
            raise
        return ""


@contextlib.contextmanager
def _bounded_template() -> Iterator[None]:
    """While it lasts, a Jinja template that runs too many lines or writes too much in this thread fails. Its sandbox
    bounds one loop, and not loops in loops."""
    lines, written, outer = 0, 0, sys.gettrace()

    def watch(_: FrameType, event: str, value: object) -> Any:
        nonlocal lines, written
        lines += event == "line"
        written += len(value) if event == "return" and isinstance(value, str) else 0
        if lines > _MOST_LINES or written > _MOST_WRITTEN:
            raise TemplateError("the chat template does not end")
        return watch

    sys.settrace(lambda frame, *_: watch if frame.f_code.co_filename == "<template>" else None)
    try:
        yield
    finally:
        sys.settrace(outer)


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
    files = {name: f"probe_{name}.txt" for name in ("code", "prose", "dialogue", "instructions")}
    folder = resources.files("adapruner.text")
    return {"arithmetic": "\n".join(lines)} | {
        name: (folder / file).read_text(encoding="utf-8") for name, file in files.items()
    }
