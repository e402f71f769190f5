"""Short built-in tasks: of a few answers to a prompt, the right one must be the likeliest."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from itertools import takewhile
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.calibration._tokenizing import tokenize
from adapruner.evaluation._continuations import Text, read

# Items of each task whose items are made up.
_ITEMS = 30


class Choice(NamedTuple):
    """A prompt and the texts that may follow it; the first one is right."""

    prompt: str
    answers: list[str]


@cache
def built_in_tasks() -> dict[str, list[Choice]]:
    """The items of every task by its name: `facts` that many know, `sums`, Python expressions and their values
    (`programs`), and a word of the text before to find again (`recall`). The same in every process."""
    lines = (resources.files("adapruner.evaluation") / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    facts = [json.loads(line) for line in lines]
    made = {"sums": _sums, "programs": _programs, "recall": _recall}
    return {
        "facts": [
            Choice(f"Question: {fact['question']}\nAnswer:", [f" {choice}" for choice in fact["choices"]])
            for fact in facts
        ],
        **{
            name: [make(number, random.Random(f"{name} {number}")) for number in range(_ITEMS)]
            for name, make in made.items()
        },
    }


def _sums(number: int, order: random.Random) -> Choice:
    first, second = order.randint(2, 60), order.randint(2, 39)
    small, factor = first % 12 + 2, second % 9 + 2
    sum_, result = (
        (f"{first} + {second}", first + second),
        (f"{first + second} - {second}", first),
        (f"{small} * {factor}", small * factor),
    )[number % 3]
    near = {result + 1, result - 1, result + 10, abs(result - 10)} - {result}
    return Choice(
        f"3 + 4 = 7\n12 - 5 = 7\n6 * 3 = 18\n{sum_} =", [f" {value}" for value in (result, *sorted(near)[:3])]
    )


def _programs(number: int, order: random.Random) -> Choice:
    word = order.choice(("apple", "stone", "river", "cloud", "green", "music", "paper", "table"))
    numbers = order.sample(range(2, 30), 3)
    total, largest, index = sum(numbers), max(numbers), order.randrange(3)
    shown: tuple[str, Sequence[Any]] = (
        (f"max({numbers})", [largest, *(value for value in numbers if value != largest)]),
        (f"sum({numbers})", [total, total + 1, total - 1]),
        (f"{numbers}[{index}]", [numbers[index], *(value for value in numbers if value != numbers[index])]),
        (f"{word!r}.upper()", [word.upper(), word, word.title()]),
        (f"sorted({numbers})", [sorted(numbers), sorted(numbers)[::-1], [*sorted(numbers)[1:], min(numbers)]]),
        (f"{word!r}[::-1]", [word[::-1], word, word.upper()]),
    )[number % 6]
    return Choice(f">>> len([1, 2])\n2\n>>> 'a' + 'b'\n'ab'\n>>> {shown[0]}\n", [repr(value) for value in shown[1]])


def _recall(number: int, order: random.Random) -> Choice:
    names = order.sample(("Anna", "Peter", "Maria", "David", "Laura", "Simon", "Clara", "Victor"), 3)
    things = order.sample(("key", "book", "lamp", "coat", "map", "ring"), 3)
    places = order.sample(("kitchen", "garden", "office", "cellar", "garage", "library"), 3)
    story = " ".join(
        f"{name} left the {thing} in the {place}." for name, thing, place in zip(names, things, places, strict=True)
    )
    index = order.randrange(3)
    question, answers = (
        (f"The {things[index]} was left in the {places[index]} by", names),
        (f"To find the {things[index]}, we must go to the", places),
    )[number % 2]
    return Choice(
        f"{story} {question}", [f" {answer}" for answer in (answers[index], *answers[:index], *answers[index + 1 :])]
    )


def solve(model: PreTrainedModel, tokenizer: Tokenizer) -> dict[str, str]:
    """By task, a digit for every item: 1 if the right answer is likelier than each of the others."""
    tasks = built_in_tasks()
    items = [item for of_task in tasks.values() for item in of_task]
    losses = (float(losses.sum()) for losses, _ in read(model, [*_texts(tokenizer, items)]))
    right = {}
    for name, of_task in tasks.items():
        compared = ([next(losses) for _ in item.answers] for item in of_task)
        right[name] = "".join(str(int(first < min(others))) for first, *others in compared)
    return right


def _texts(tokenizer: Tokenizer, items: Sequence[Choice]) -> Iterator[Text]:
    for prompt, answers in items:
        before = tokenize(tokenizer, prompt).input_ids
        for answer in answers:
            tokens = tokenize(tokenizer, prompt + answer).input_ids
            # Some tokenizers put a token behind every text.
            place = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, tokens, strict=False)))
            yield Text(tokens[:place], tokens[place:])
