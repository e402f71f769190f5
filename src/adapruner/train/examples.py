"""Training examples: instructions, text, or what the teacher writes; how many a training needs, and their order."""

import functools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.base.errors import AdaPrunerError
from adapruner.model.generation import NO_TOKEN, continue_texts, end_tokens
from adapruner.model.stored import StoredWeight
from adapruner.options import RecoveryOptions
from adapruner.text.blends import BlendPart
from adapruner.text.reading import read_records
from adapruner.text.windows import evenly_spaced, text_windows, tokenize
from adapruner.text.written import as_chat, write_kinds

IGNORED = -100
# By default, the number of examples that a model writes to fine-tune on: for each dataset, and of a blend of kinds.
DEFAULT_GENERATED_RECORDS = 1024
# Greedy answers of small models repeat themselves; at temperature 1, they are often wrong.
_TEMPERATURE, _ANSWERS_AT_ONCE = 0.7, 128
# The largest part of an example that a prompt may be if the teacher answers it.
_LONGEST_PROMPT = 0.75

# Passes over all examples, where nothing else gives the length.
DEFAULT_EPOCHS = 2
# Validations with a checkpoint in a training; a long one has them every 200 steps, as LLM-Pruner does.
_VALIDATIONS, _MOST_STEPS_BETWEEN = 5, 200
# All validations together read at most this part of the examples that are trained on, without a backward pass.
_VALIDATED = 0.1
_FEWEST_HELD_OUT = 16
# Prompts of instructions alone have nearly as many tokens.
_FEWEST_TOKENS = 64

# The prompt of Stanford Alpaca, LLM-Pruner and the paper; other tools of this format expect it.
_PROMPT = (
    "Below is an instruction that describes a task{and_input}. Write a response that appropriately completes the"
    " request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
Row = dict[str, str | None]


class Taught(NamedTuple):
    """Predictions of a teacher for the learnt tokens of an example: rows of the tensors in a file."""

    file: str
    begin: int
    end: int

    def read(self) -> tuple[Tensor, Tensor]:
        """[learnt tokens, tokens that are known], int64, and their log-probabilities, float32."""
        rows = (slice(self.begin, self.end), slice(None))
        tokens, log_probabilities = (StoredWeight(self.file, name)[rows] for name in ("tokens", "log_probabilities"))
        return tokens.long(), log_probabilities


class Example(TypedDict):
    """Tokens and labels of equal length (-100 for tokens that are not learnt), and the weight of the loss of the
    labels; the divergence from the teacher, who is run or whose predictions are on disk, has the rest."""

    input_ids: list[int]
    labels: list[int]
    label_weight: float
    taught: NotRequired[Taught]


@dataclass(frozen=True)
class Examples:
    """Examples of a dataset.

    Attributes:
        name: of the dataset.
        share: the fraction of all examples that are learnt.
        skipped: records left out because their answer is empty or beyond the cut-off.
    """

    name: str
    training: Sequence[Example]
    validation: Sequence[Example]
    share: float = 1.0
    skipped: int = 0

    @property
    def mean_tokens(self) -> float:
        """The mean number of tokens in a training example, prompts included."""
        return fmean(len(example["input_ids"]) for example in self.training)

    @property
    def largest_token(self) -> int:
        """The largest number of a token in any example."""
        return max(max(example["input_ids"]) for example in [*self.training, *self.validation])


@dataclass(frozen=True)
class Unwritten:
    """Examples that the teacher has yet to write.

    Attributes:
        count: the number of examples.
        prompts: the tokens of the prompts that it answers; none for a kind of `mix`, which has its own.
        skipped: prompts left out because they are too long.
    """

    part: BlendPart
    count: int
    prompts: list[list[int]]
    skipped: int = 0

    @property
    def name(self) -> str:
        """The name of the dataset."""
        return self.part.name

    @property
    def largest_token(self) -> int:
        """The largest number of a token in any prompt."""
        return max((max(prompt) for prompt in self.prompts), default=0)

    def write(
        self,
        teacher: PreTrainedModel,
        tokenizer: Tokenizer,
        seq_len: int,
        seed: int,
        progress: Callable[[float], None] | None = None,
    ) -> Tensor:
        """[count, seq_len], int64: the prompts and what the teacher writes, at temperature 0.7; `NO_TOKEN` where there
        is none. Of a kind of `mix`, windows of such texts."""
        ends = end_tokens(teacher, tokenizer)
        if not self.prompts:
            counts = {self.name: self.count}
            return write_kinds(teacher, tokenizer, counts, seq_len, "calibration", seed, ends, progress)[self.name]
        rows = torch.empty((self.count, seq_len), dtype=torch.int64)
        # Texts of a batch are as long as its longest prompt allows.
        by_length = torch.tensor([len(prompt) for prompt in self.prompts]).argsort(stable=True)
        for first, numbers in enumerate(by_length.split(_ANSWERS_AT_ONCE)):
            prompts = [self.prompts[number] for number in numbers]
            new_tokens, temperatures = seq_len - max(map(len, prompts)), torch.full((len(prompts),), _TEMPERATURE)
            rows[numbers] = continue_texts(teacher, prompts, new_tokens, temperatures, seed + first, ends, progress)
        return rows

    def examples(self, written: Tensor, options: RecoveryOptions) -> Examples:
        """The examples of what `write` gave: the predictions of the teacher are learnt, and none for the prompts."""
        starts = [len(prompt) for prompt in self.prompts] or [1] * len(written)
        made = [_example(row[row != NO_TOKEN].tolist(), start, 0.0) for row, start in zip(written, starts, strict=True)]
        return _split(made, self.part, options, self.skipped)


def read_examples(
    blend: Sequence[BlendPart], tokenizer: Tokenizer, options: RecoveryOptions, label_weight: float
) -> list[Examples | Unwritten]:
    """The examples of every dataset of a blend: instructions if it has the columns `instruction` and `output`, else
    windows of its text. No more are tokenized than the training needs, if it says how long it is.

    Args:
        label_weight: of text that nobody has yet to write; 1 without a teacher.
    """
    return [_read(part, tokenizer, options, label_weight) for part in blend]


def _read(part: BlendPart, tokenizer: Tokenizer, options: RecoveryOptions, label_weight: float) -> Examples | Unwritten:
    default = DEFAULT_GENERATED_RECORDS if part.is_written else None
    if part.source is None:  # one to learn, one to validate
        default = max(2, math.ceil(part.share * DEFAULT_GENERATED_RECORDS))
    known = (options.records or default, most_examples(options, part.share, part.is_written))
    limit = min((number for number in known if number is not None), default=None)
    if part.source is None:
        return Unwritten(part, limit or 0, [])
    if part.is_written:
        return _read_prompts(part, tokenizer, options, limit or 0)
    options = options.model_copy(update={"records": limit})
    records = read_records(part.source) if not part.source.holds_windows else []
    if records and {"instruction", "output"} <= records[0].keys():
        return instruction_examples(records, part, tokenizer, options, label_weight)
    return window_examples(text_windows(part.source, tokenizer, options.seq_len, limit), part, options, label_weight)


def window_examples(windows: Tensor, part: BlendPart, options: RecoveryOptions, label_weight: float = 1.0) -> Examples:
    """Windows of running text, with every token learnt. The last windows are for validation.

    Args:
        windows: [windows, tokens], int64.
    """
    windows = evenly_spaced(windows, options.records)
    return _split(examples_of_windows(windows, label_weight), part, options)


def examples_of_windows(windows: Iterable[Tensor], label_weight: float) -> list[Example]:
    """Windows of running text, [tokens] each, int64, with every token learnt."""
    return [_example(window.tolist(), 1, label_weight) for window in windows]


def instruction_examples(
    records: list[Row], part: BlendPart, tokenizer: Tokenizer, options: RecoveryOptions, label_weight: float = 1.0
) -> Examples:
    """Prompts in the form of Stanford Alpaca. Only the answers are learnt, each followed by the end token.

    Args:
        records: with `instruction`, `output` and perhaps `input`.
    """
    examples: list[Example] = []
    skipped = 0
    for record in _shuffled(records, part, options, "instruction", "output"):
        if len(examples) == options.records:
            break
        if example := _instruction_example(record, tokenizer, options.seq_len, label_weight):
            examples.append(example)
        else:
            skipped += 1
    return _split(examples, part, options, skipped)


def _read_prompts(part: BlendPart, tokenizer: Tokenizer, options: RecoveryOptions, limit: int) -> Unwritten:
    """The prompts of a dataset of instructions: through the chat template of the tokenizer, or that of Alpaca."""
    assert part.source is not None
    records = [] if part.source.holds_windows else read_records(part.source)
    if not records or "instruction" not in records[0]:
        raise AdaPrunerError(f"{part.name} needs a dataset of instructions: {part.source} has no column instruction")
    prompts: list[list[int]] = []
    skipped = 0
    for record in _shuffled(records, part, options, "instruction"):
        if len(prompts) == limit:
            break
        asked = (str(record["instruction"]).strip(), (record.get("input") or "").strip())
        if chat := as_chat(tokenizer, "\n\n".join(filter(None, asked))):
            prompt = list(tokenize(tokenizer, chat, add_special_tokens=False).input_ids)
        else:
            prompt = _prompt(record, tokenizer)
        if len(prompt) <= _LONGEST_PROMPT * options.seq_len:
            prompts.append(prompt)
        else:
            skipped += 1
    _refuse_too_few(len(prompts), part.name, options)
    return Unwritten(part, len(prompts), prompts, skipped)


def _shuffled(records: list[Row], part: BlendPart, options: RecoveryOptions, *fields: str) -> list[Row]:
    """Records in random order; refuses one without one of the fields."""
    for number, record in enumerate(records, start=1):
        for field in fields:
            if record[field] is None or (field == "instruction" and not str(record[field]).strip()):
                raise AdaPrunerError(f"record {number} of {part.description} has no {field}")
    shuffled = list(records)
    random.Random(options.seed).shuffle(shuffled)
    return shuffled


def _prompt(record: Row, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a prompt in the form of Stanford Alpaca, without the special tokens with which some tokenizers end
    every text."""
    context = (record.get("input") or "").strip()
    text = _PROMPT.format(
        instruction=str(record["instruction"]).strip(),
        and_input=", paired with an input that provides further context" if context else "",
        input=f"### Input:\n{context}\n\n" if context else "",
    )
    encoding = tokenize(tokenizer, text, return_special_tokens_mask=True)
    tokens: list[int] = encoding.input_ids
    while tokens and encoding.special_tokens_mask[len(tokens) - 1]:
        tokens = tokens[:-1]
    return tokens


def _instruction_example(record: Row, tokenizer: Tokenizer, seq_len: int, label_weight: float) -> Example | None:
    """None if nothing of an answer is left to learn."""
    answer = str(record["output"]).strip()
    if not answer:
        return None
    start = _prompt(record, tokenizer)
    if len(start) >= seq_len:
        return None
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    learnt = [*tokenize(tokenizer, answer, add_special_tokens=False).input_ids, *end]
    return _example([*start, *learnt][:seq_len], len(start), label_weight)


def _example(tokens: list[int], start: int, label_weight: float) -> Example:
    """An example of which the tokens from `start` on are learnt. Nothing predicts the first
    token of all; the Trainer would count it in some families."""
    labels = [*[IGNORED] * start, *tokens[start:]]
    return {"input_ids": tokens, "labels": labels, "label_weight": label_weight}


def _split(examples: list[Example], part: BlendPart, options: RecoveryOptions, skipped: int = 0) -> Examples:
    """Holds the last examples back for validation."""
    _refuse_too_few(len(examples), part.description, options)
    most = round(most_held_out(options, len(examples) / part.share) * part.share)
    held_out = max(1, min(len(examples) // 10, most))
    return Examples(part.description, examples[:-held_out], examples[-held_out:], part.share, skipped)


def _refuse_too_few(count: int, name: str, options: RecoveryOptions) -> None:
    if count < 2:
        raise AdaPrunerError(
            f"{name} gives {count} examples of at most {options.seq_len} tokens; to train and to validate, 2 are needed"
        )


def most_examples(options: RecoveryOptions, share: float, is_written: bool) -> int | None:
    """The largest number of examples of a dataset with that share which a training needs, those for validation
    included; None if it needs all. If the teacher writes them, too many cost more than to read too many."""
    if options.steps is not None:
        seen = float(options.steps * options.batch_size)
    elif options.tokens is not None:
        seen = int(options.tokens) / (options.seq_len if is_written else min(_FEWEST_TOKENS, options.seq_len))
    else:
        return None
    # Shares are met up to one example, and at least two are needed.
    return math.ceil((seen + most_held_out(options, seen)) * share) + 2


def most_held_out(options: RecoveryOptions, examples: float) -> int:
    """The largest number of examples for validation, out of all examples; the length of a training decides first."""
    if options.tokens is not None:
        few = _VALIDATED / _VALIDATIONS * int(options.tokens) / options.seq_len
    else:
        seen = (
            examples * (options.epochs or DEFAULT_EPOCHS)
            if options.steps is None
            else options.steps * options.batch_size
        )
        few = _VALIDATED * seen / max(_VALIDATIONS, seen / options.batch_size / _MOST_STEPS_BETWEEN)
    return min(options.validation, max(_FEWEST_HELD_OUT, int(few)))


def steps_between_validations(steps: int) -> int:
    """The number of steps between two validations, in a training of so many steps."""
    return max(1, min(_MOST_STEPS_BETWEEN, steps // _VALIDATIONS))


# Shares are met exactly over so many examples, whose order repeats.
_CYCLE = 4096


class MixedExamples(Dataset[Example]):
    """The training examples of several datasets in the order in which they are learnt: evenly mixed by their shares,
    each dataset in a seeded order of its own for every pass. One that ends is begun again.

    Args:
        count: the number of all examples.
    """

    def __init__(self, blend: Sequence[Examples], count: int, seed: int) -> None:
        self._blend, self._count = blend, count
        # The examples of a dataset are wanted at equal intervals.
        wanted = [(torch.arange(_CYCLE, dtype=torch.float64) + 0.5) / examples.share for examples in blend]
        order = torch.cat(wanted).argsort(stable=True)[:_CYCLE]
        self._part, self._number = order // _CYCLE, order % _CYCLE
        self._per_cycle = self._part.bincount(minlength=len(blend)).tolist()
        self._order = functools.lru_cache(maxsize=2 * len(blend))(
            lambda count, number: torch.randperm(count, generator=torch.Generator().manual_seed(seed + number))
        )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, position: int) -> Example:
        cycles, place = divmod(position, _CYCLE)
        part = int(self._part[place])
        examples = self._blend[part].training
        passes, place = divmod(cycles * self._per_cycle[part] + int(self._number[place]), len(examples))
        return examples[int(self._order(len(examples), passes)[place])]

    def learnt(self, count: int) -> list[int]:
        """The number of examples of every dataset among the first `count`, some of them repeated."""
        cycles, rest = divmod(count, _CYCLE)
        begun = self._part[:rest].bincount(minlength=len(self._blend)).tolist()
        return [cycles * full + part for full, part in zip(self._per_cycle, begun, strict=True)]


def examples_to_learn(blend: Sequence[Examples], options: RecoveryOptions) -> int:
    """The number of examples that a training reads, some of them repeated."""
    if options.steps is not None:
        return options.steps * options.batch_size
    if options.tokens is None:
        return (options.epochs or DEFAULT_EPOCHS) * sum(len(examples.training) for examples in blend)
    per_step = options.batch_size * sum(examples.share * examples.mean_tokens for examples in blend)
    return max(1, round(int(options.tokens) / per_step)) * options.batch_size


def collate(examples: Sequence[Example]) -> dict[str, Any]:
    """[examples, tokens of the longest]: padded tokens and labels, and the attention mask; and [examples], float32: the
    weight of the labels. From a teacher on disk, `taught` has its predictions for the learnt tokens of all examples."""

    def padded(rows: list[list[int]], padding: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding)

    batch: dict[str, Any] = {
        "input_ids": padded([example["input_ids"] for example in examples], 0),
        "labels": padded([example["labels"] for example in examples], IGNORED),
        "attention_mask": padded([[1] * len(example["input_ids"]) for example in examples], 0),
        "label_weight": torch.tensor([example["label_weight"] for example in examples]),
    }
    if taught := [example["taught"].read() for example in examples if "taught" in example]:
        return batch | {"taught": tuple(map(torch.cat, zip(*taught, strict=True)))}
    return batch
