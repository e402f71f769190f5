"""What a model can still do, and the verdict: how it reads what the original wrote, built-in tasks, greedy texts."""

import json
import math
import random
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from itertools import takewhile
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.evaluation.losses import Text, read, window_losses
from adapruner.model.generation import NO_TOKEN, continue_texts, end_tokens
from adapruner.model.layers import is_streamed
from adapruner.text.windows import tokenize
from adapruner.text.written import kinds, probe_texts, prompts_to_show, write_kinds

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
    shown: tuple[str, Sequence[object]] = (
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
    texts = list[Text]()
    for prompt, answers in items:
        before = tokenize(tokenizer, prompt).input_ids
        for answer in answers:
            tokens = tokenize(tokenizer, prompt + answer).input_ids
            # Some tokenizers put a token behind every text.
            place = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, tokens, strict=False)))
            texts.append(Text(tokens[:place], tokens[place:]))
    losses = (float(losses.sum()) for losses, _ in read(model, texts))
    right = {}
    for name, of_task in tasks.items():
        compared = ([next(losses) for _ in item.answers] for item in of_task)
        right[name] = "".join(str(int(first < min(others))) for first, *others in compared)
    return right


# Of each kind that the original writes.
_ANSWER_WINDOWS, _ANSWER_TOKENS = 5, 128
# Tokens of each text that is shown.
_SHOWN_TOKENS = 96

# By kind of text, the windows that models read, [windows, tokens], int64; and under the name of a kind and `/predicted`
# the tokens that the original predicts in them, [windows, tokens - 1].
Answers = dict[str, Tensor]
_PREDICTED = "/predicted"


class Reading(BaseModel, extra="forbid", frozen=True, ser_json_inf_nan="constants"):
    """How a model reads text of a kind that the original wrote.

    Attributes:
        loss: the mean negative log-likelihood in nats per token of the original.
        agreement: the fraction of tokens at which the model and the original predict the same; 1 for the original;
            None layer by layer, or if their tokens differ.
    """

    loss: float
    agreement: float | None


class Abilities(BaseModel, extra="forbid", frozen=True):
    """What a model can do, to be compared with what the original can.

    Attributes:
        reads: by kind of text.
        solved: by built-in task, a digit for every item: 1 if it is solved. Empty layer by layer.
        writes: greedy texts by their prompt, to be read by people. Empty layer by layer.
    """

    reads: dict[str, Reading]
    solved: dict[str, str]
    writes: dict[str, str]

    @property
    def share_solved(self) -> float | None:
        """The fraction of the items of all tasks."""
        items = "".join(self.solved.values())
        return items.count("1") / len(items) if items else None


def number_of_answers() -> int:
    """The number of windows that a model writes."""
    return len(kinds()) * _ANSWER_WINDOWS


def write_answers(
    original: PreTrainedModel,
    tokenizer: Tokenizer,
    advance: Callable[[float], None] | None = None,
    positions: int | None = None,
) -> Answers:
    """Text of every kind of `mix` that the original writes, with random numbers and functions of the standard library
    that calibration does not use; layer by layer, where every token would read all weights, the built-in texts.

    Args:
        advance: called with fractions of the number of windows.
        positions: of the model that also reads the text, if it may have fewer.
    """
    tokens = min(filter(None, (_ANSWER_TOKENS, positions, getattr(original.config, "max_position_embeddings", None))))
    if is_streamed(original):
        return {name: text.windows for name, text in probe_texts(tokenizer, tokens).items()}
    counts = dict.fromkeys(kinds(), _ANSWER_WINDOWS)
    written = write_kinds(original, tokenizer, counts, tokens, "report", 0, end_tokens(original, tokenizer), advance)
    # The tokenizer may not serve a kind.
    answers = {kind: windows for kind, windows in written.items() if len(windows)}
    return answers | {
        kind + _PREDICTED: torch.stack([predicted for _, predicted in read(original, _texts(windows))])
        for kind, windows in answers.items()
    }


def windows_of(answers: Answers) -> dict[str, Tensor]:
    """The windows by kind."""
    return {name: tensor for name, tensor in answers.items() if not name.endswith(_PREDICTED)}


def _texts(windows: Tensor) -> list[Text]:
    return [Text(window[:1], window[1:]) for window in windows.tolist()]


def measure_abilities(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    answers: Answers,
    tokenizer_of_answers: Tokenizer | None = None,
    advance: Callable[[int], None] | None = None,
) -> Abilities:
    """Measures what a model can do.

    Args:
        answers: of the original, see `write_answers`.
        tokenizer_of_answers: of the original, if its tokens are others.
        advance: called with the number of windows done.
    """
    reads = {}
    for kind, windows in windows_of(answers).items():
        predicted = answers.get(kind + _PREDICTED)
        if tokenizer_of_answers:
            texts = tokenizer_of_answers.batch_decode(windows)
            own = [tokenize(tokenizer, text, add_special_tokens=False).input_ids for text in texts]
            losses = torch.cat([losses for losses, _ in read(model, [Text(row[:1], row[1:]) for row in own])])
            reads[kind] = Reading(loss=float(losses.double().sum()) / windows[:, 1:].numel(), agreement=None)
        elif is_streamed(model):
            reads[kind] = Reading(loss=float(window_losses(model, windows).mean()), agreement=None)
        else:
            losses, chosen = (torch.stack(both) for both in zip(*read(model, _texts(windows)), strict=True))
            agreed = None if predicted is None else float((chosen == predicted).double().mean())
            reads[kind] = Reading(loss=float(losses.double().mean()), agreement=agreed)
        if advance:
            advance(len(windows))
    if is_streamed(model):
        return Abilities(reads=reads, solved={}, writes={})
    return Abilities(reads=reads, solved=solve(model, tokenizer), writes=write(model, tokenizer))


def write(model: PreTrainedModel, tokenizer: Tokenizer) -> dict[str, str]:
    """Greedy texts after a few prompts, which are cut on the left where the model has few positions."""
    prompts = prompts_to_show(tokenizer)
    room = getattr(model.config, "max_position_embeddings", None) or 2 * _SHOWN_TOKENS
    tokens = [prompt[-(room // 2) :] for prompt in prompts.values()]
    longest = max(map(len, tokens))
    new_tokens, ends = min(_SHOWN_TOKENS, room - longest), end_tokens(model, tokenizer)
    written = continue_texts(model, tokens, new_tokens, torch.zeros(len(tokens)), seed=0, ends=ends)[:, longest:]
    return {
        prompt: str(tokenizer.decode(row[row != NO_TOKEN], skip_special_tokens=True))
        for prompt, row in zip(prompts, written, strict=True)
    }


Verdict = Literal["usable", "recover first", "broken"]

# What must be left of every ability of a usable model, and of each by which a model is broken.
_USABLE, _NOT_BROKEN = 0.9, 0.6
# A rise of the loss by r nats per token leaves about exp(-c r) of an ability: of code, as HumanEval shows it, because
# programs must be right to the last token; of the others, as readers see it (research/experiments/verdict.md).
_LOST_PER_NAT, _LOST_PER_NAT_OF_CODE = 0.5, 9.0
# A model that solves fewer of the built-in programs cannot program, and has nothing to lose.
_CAN_PROGRAM = 0.5


def kept_of(dense: Abilities, pruned: Abilities) -> dict[str, float]:
    """What is left of every ability, as an estimate; of the built-in tasks, the share of the solved items."""
    programs = dense.solved.get("programs", "0")
    can_program = programs.count("1") >= _CAN_PROGRAM * len(programs)
    kept = {
        kind: _left(dense, pruned, kind, _LOST_PER_NAT_OF_CODE if kind == "code" and can_program else _LOST_PER_NAT)
        for kind in dense.reads
    }
    if dense.share_solved and pruned.share_solved is not None:
        kept["built-in tasks"] = pruned.share_solved / dense.share_solved
    return kept


def judge(dense: Abilities, pruned: Abilities) -> Verdict:
    """Judges a pruned model: it can be used as it is, needs training, or has lost too much.

    What it can do is compared with what the dense model can, so that a pruned model is not called broken for a weakness
    of its dense model. What was not measured is not judged.
    """
    kept = kept_of(dense, pruned)
    # A comparison with NaN is false.
    if all(left >= _USABLE for left in kept.values()):
        return "usable"
    # Who cannot program any more may still be repaired.
    if "code" in kept:
        kept["code"] = _left(dense, pruned, "code", _LOST_PER_NAT)
    return "recover first" if all(left >= _NOT_BROKEN for left in kept.values()) else "broken"


def damaged(dense: Abilities, pruned: Abilities) -> list[str]:
    """The abilities because of which a model is not usable, with what is left of them, the worst first."""
    kept = kept_of(dense, pruned)
    worst = sorted((left, name) for name, left in kept.items() if not left >= _USABLE)
    return [f"{name} ({left:.0%} left)" for left, name in worst]


def _left(dense: Abilities, pruned: Abilities, kind: str, lost_per_nat: float) -> float:
    rise = pruned.reads[kind].loss - dense.reads[kind].loss
    return 1.0 if rise <= 0 else math.exp(-lost_per_nat * rise)
