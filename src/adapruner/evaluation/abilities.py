"""What a model can still do, and the verdict: how it reads what the original wrote, and greedy texts."""

import math
import random
from collections.abc import Callable, Container, Mapping, Sequence
from functools import cache
from itertools import takewhile
from statistics import fmean
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, computed_field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.evaluation.losses import Spelling, Text, read, token_losses, token_losses_spelt
from adapruner.model.generation import NO_TOKEN, continue_texts, end_tokens
from adapruner.model.layers import is_streamed
from adapruner.text.windows import tokenize
from adapruner.text.written import kinds, probe_texts, prompts_to_show, write_kinds

# Items of each task whose items are made up: so many that a model which has the ability differs from chance.
_ITEMS = {"sums": 30, "programs": 90}


class Choice(NamedTuple):
    """A prompt and the texts that may follow it; the first one is right."""

    prompt: str
    answers: list[str]


@cache
def built_in_tasks() -> dict[str, list[Choice]]:
    """The items of every task by its name: `sums`, and Python expressions with their values (`programs`). The same in
    every process."""
    made = {"sums": _sums, "programs": _programs}
    return {
        name: [make(number, random.Random(f"{name} {number}")) for number in range(_ITEMS[name])]
        for name, make in made.items()
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


# Windows of each kind that the original writes; of code so many that the error of its rise is a third of the rise that
# costs a tenth of the programs (research/experiments/verdict.md).
_ANSWER_WINDOWS, _WINDOWS_OF_CODE, _ANSWER_TOKENS = 6, 64, 128
# Tokens of each text that is shown.
_SHOWN_TOKENS = 96

# By kind of text, the windows that models read, [windows, tokens], int64; and under the name of a kind and `/predicted`
# the tokens that the original predicts in them, [windows, tokens - 1].
Answers = dict[str, Tensor]
_PREDICTED = "/predicted"


class Reading(BaseModel, frozen=True, ser_json_inf_nan="constants"):
    """How a model reads text of a kind that the original wrote.

    Attributes:
        losses: the mean negative log-likelihood of each window, in nats per token of the original, of those that both
            models have.
        spelt: the fraction of tokens that the pruned model does not have, and spells by others.
        agreement: the fraction of tokens at which the model and the original predict the same; 1 for the original;
            None layer by layer, or if their tokens differ.
    """

    losses: tuple[float, ...]
    spelt: float = 0.0
    agreement: float | None

    @computed_field
    @property
    def loss(self) -> float:
        """The mean over the windows."""
        return fmean(self.losses)


class Abilities(BaseModel, extra="forbid", frozen=True):
    """What a model can do, to be compared with what the original can.

    Attributes:
        reads: by kind of text.
        writes: greedy texts by their prompt, to be read by people. Empty layer by layer.
    """

    reads: dict[str, Reading]
    writes: dict[str, str]


def answer_counts() -> dict[str, int]:
    """The number of windows of each kind that a model writes."""
    return {kind: _WINDOWS_OF_CODE if kind == _CODE else _ANSWER_WINDOWS for kind in kinds()}


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
    written = write_kinds(
        original, tokenizer, answer_counts(), tokens, "report", 0, end_tokens(original, tokenizer), advance
    )
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
    spelling: Spelling | None = None,
    counted: Container[int] | None = None,
    advance: Callable[[int], None] | None = None,
) -> Abilities:
    """Measures what a model can do.

    Args:
        answers: of the original, see `write_answers`.
        tokenizer_of_answers: of the original, if its tokens are others.
        spelling: of the tokens of the original, if the model has some of them alone.
        counted: the tokens whose losses count, of both models the same; by default all.
        advance: called with the number of windows done.
    """
    reads = {}
    for kind, windows in windows_of(answers).items():
        predicted = answers.get(kind + _PREDICTED)
        if tokenizer_of_answers:
            texts = tokenizer_of_answers.batch_decode(windows)
            own = [tokenize(tokenizer, text, add_special_tokens=False).input_ids for text in texts]
            summed = [losses.double().sum() for losses, _ in read(model, [Text(row[:1], row[1:]) for row in own])]
            losses, agreed = torch.stack(summed)[:, None] / (windows.shape[1] - 1), None
        elif spelling:
            losses, agreed = torch.cat([*token_losses_spelt(model, windows, spelling)]), None
        elif is_streamed(model):
            losses, agreed = torch.cat([*token_losses(model, windows)]), None
        else:
            losses, chosen = (torch.stack(both) for both in zip(*read(model, _texts(windows)), strict=True))
            agreed = None if predicted is None else float((chosen == predicted).double().mean())
        is_counted = torch.ones_like(losses, dtype=torch.float64)
        if counted is not None:
            is_counted = torch.tensor([[token in counted for token in window[1:]] for window in windows.tolist()])
        of_windows = (losses.double() * is_counted).sum(1) / is_counted.sum(1).clamp(min=1)
        spelt = 1 - float(is_counted.double().mean())
        reads[kind] = Reading(losses=tuple(of_windows.tolist()), spelt=spelt, agreement=agreed)
        if advance:
            advance(len(windows))
    return Abilities(reads=reads, writes={} if is_streamed(model) else write(model, tokenizer))


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

# Of a usable model, the least over that of an unharmed one; of a broken one, the rise of a loss, in nats per token; the
# share of its tokens without which an ability is given up.
_USABLE, _BROKEN, _GIVEN_UP = 0.9, 1.0, 0.25
_CODE, _SHOWN_AS = "code", {"languages": "other languages"}
# A rise of the loss by r nats per token leaves exp(-c r) of an ability: c, its standard error, and the residual without
# a rise; of code of HumanEval, of other kinds as readers see it (research/experiments/verdict.md).
_LOST, _LOST_OF_CODE = (0.5, 0.25, 0.05), (5.5, 0.9, 0.1)
# The tasks that show whether the original has an ability at all.
_SHOWN_BY = {_CODE: "programs", "mathematics": "sums"}


class Estimate(BaseModel, extra="forbid", frozen=True, ser_json_inf_nan="constants"):
    """What is left of an ability of the original, of 1.

    Attributes:
        rise: of the loss on text of its kind, in nats per token.
        left: the estimate.
        least, most: its range: two standard errors below and above it.
        spelt: the share of tokens that were removed, see `Reading`; they count as lost.
        at_chance: the score of the original in the task that shows the ability, if that is near chance: there is
            nothing to judge.
    """

    rise: float
    left: float
    least: float
    most: float
    spelt: float = 0.0
    at_chance: str = ""

    @property
    def is_judged(self) -> bool:
        """False at chance, and if many of its tokens were removed: a choice, which is named and decides nothing."""
        return not self.at_chance and self.spelt <= _GIVEN_UP

    def __str__(self) -> str:
        return self.at_chance or f"{self.left:.0%} left ({self.least:.0%} to {self.most:.0%})"


def estimates(dense: Abilities, pruned: Abilities, chance: Mapping[str, str]) -> dict[str, Estimate]:
    """What is left of every ability, from how much worse a model reads text of its kind, window by window.

    Args:
        chance: see `at_chance`.
    """
    left = {}
    for kind, before in dense.reads.items():
        after, (per_nat, spread, floor) = pruned.reads[kind], _LOST_OF_CODE if kind == _CODE else _LOST
        rises = torch.tensor(after.losses, dtype=torch.float64) - torch.tensor(before.losses, dtype=torch.float64)
        rise, of_rise = float(rises.mean()), float(rises.std()) / math.sqrt(len(rises)) if len(rises) > 1 else 0.0
        lost, spelt = (
            max(rise, 0.0),
            after.spelt,
        )  # a loss that fell is no gain: without some tokens, others are likelier
        error = 2 * math.hypot(per_nat * of_rise, spread * lost, floor)
        log_left = (math.log1p(-spelt) if spelt < 1 else -math.inf) - per_nat * lost
        least, share, most = (math.exp(min(log_left + apart, 0.0)) for apart in (-error, 0.0, error))
        left[kind] = Estimate(
            rise=rise, left=share, least=least, most=most, spelt=spelt, at_chance=chance.get(kind, "")
        )
    return left


def at_chance(original: PreTrainedModel, tokenizer: Tokenizer) -> dict[str, str]:
    """By ability, the score of the original in the task that shows it, where that is within two standard errors of
    chance; nothing layer by layer, where tasks would read all weights for every batch."""
    tasks, scores = built_in_tasks(), dict[str, str]()
    solved = {} if is_streamed(original) else solve(original, tokenizer)
    for kind, task in _SHOWN_BY.items() if solved else ():
        right, count = solved[task].count("1"), len(solved[task])
        chance = fmean(1 / len(item.answers) for item in tasks[task])
        if right <= count * chance + 2 * math.sqrt(count * chance * (1 - chance)):
            shown = f"the original solves {right} of {count} {task}, chance is {count * chance:.0f}"
            scores[kind] = f"cannot be judged: {shown}"
    return scores


def judge(left: Mapping[str, Estimate]) -> Verdict:
    """Judges a pruned model by what is left of the abilities of the original: it can be used as it is, needs training,
    or has lost too much. The error counts against the model. What is at chance or was given up is not counted."""
    judged = [estimate for estimate in left.values() if estimate.is_judged]
    if judged and not damaged(left):
        return "usable"
    # A comparison with NaN is false.
    return "recover first" if all(estimate.rise <= _BROKEN for estimate in judged) else "broken"


def damaged(left: Mapping[str, Estimate]) -> list[str]:
    """The judged abilities because of which a model is not usable, with what is left of them, least first."""
    limits = {kind: _USABLE * math.exp(-2 * (_LOST_OF_CODE if kind == _CODE else _LOST)[2]) for kind in left}
    worst = sorted((one.least, kind) for kind, one in left.items() if one.is_judged and not one.least >= limits[kind])
    return [f"{kind}, {left[kind]}" for _, kind in worst]


def given_up(left: Mapping[str, Estimate]) -> str:
    """The abilities whose tokens were removed, as the verdict names them."""
    return " and ".join(_SHOWN_AS.get(kind, kind) for kind, estimate in left.items() if estimate.spelt > _GIVEN_UP)


def sentence(verdict: Verdict | None, left: Mapping[str, Estimate]) -> str:
    """The verdict with what was given up, or with the ability that decided it; empty without one."""
    names = given_up(left) if verdict == "usable" else ""
    return f"usable, but for {names}" if names else ": ".join([verdict or "", *damaged(left)[:1]])
