"""Training examples: instructions with their answers, or windows of running text."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase as Tokenizer

from adapruner.calibration import Source, evenly_spaced, read_records, text_windows
from adapruner.config import RecoveryOptions
from adapruner.errors import AdaPrunerError

IGNORED = -100
# The default number of windows that a model writes for fine-tuning.
DEFAULT_GENERATED_RECORDS = 1024

# The prompt of Stanford Alpaca, LLM-Pruner and the paper; other tools of this format expect it.
_PROMPT = (
    "Below is an instruction that describes a task{and_input}. Write a response that appropriately completes the"
    " request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)

Example = dict[str, list[int]]


@dataclass(frozen=True)
class Examples:
    """Training and validation examples: `input_ids` and `labels` of equal length (-100 for tokens that are not learnt).

    Attributes:
        instructions: True for instructions with answers, False for running text.
        skipped: records left out because their answer is empty or beyond the cut-off.
    """

    training: list[Example]
    validation: list[Example]
    instructions: bool
    skipped: int = 0

    @property
    def tokens(self) -> int:
        """The number of tokens in the training examples, prompts included."""
        return sum(len(example["input_ids"]) for example in self.training)

    @property
    def largest_token(self) -> int:
        """The largest number of a token in any example."""
        return max(max(example["input_ids"]) for example in [*self.training, *self.validation])


def read_examples(source: Source, tokenizer: Tokenizer, options: RecoveryOptions) -> Examples:
    """Instructions if the source has the columns `instruction` and `output`, else windows of its text.

    Raises:
        AdaPrunerError: the source cannot be read, a field is missing, or there are too few records.
    """
    records = read_records(source)
    if records and {"instruction", "output"} <= records[0].keys():
        return instruction_examples(records, str(source), tokenizer, options)
    return window_examples(text_windows(source, tokenizer, options.seq_len), str(source), options)


def window_examples(windows: Tensor, name: str, options: RecoveryOptions) -> Examples:
    """Windows of running text, with every token learnt. The last windows are for validation.

    Args:
        windows: [windows, tokens], int64.
    """
    windows = evenly_spaced(windows, options.records)
    # Nothing predicts the first token; the Trainer would count it in some families.
    examples = [{"input_ids": window, "labels": [IGNORED, *window[1:]]} for window in windows.tolist()]
    return _split(examples, name, options, instructions=False, skipped=0)


def instruction_examples(
    records: list[dict[str, str | None]], name: str, tokenizer: Tokenizer, options: RecoveryOptions
) -> Examples:
    """Prompts in the form of Stanford Alpaca. Only the answers are learnt, each followed by the end token.

    Args:
        records: with `instruction`, `output` and perhaps `input`.

    Raises:
        AdaPrunerError: a record has no instruction or no output, with its number; or there are too few.
    """
    for number, record in enumerate(records, start=1):
        for field in ("instruction", "output"):
            if record[field] is None or (field == "instruction" and not str(record[field]).strip()):
                raise AdaPrunerError(f"record {number} of {name} has no {field}")
    shuffled = list(records)
    random.Random(options.seed).shuffle(shuffled)
    examples: list[Example] = []
    skipped = 0
    for record in shuffled:
        if len(examples) == options.records:
            break
        if example := _instruction_example(record, tokenizer, options.seq_len):
            examples.append(example)
        else:
            skipped += 1
    return _split(examples, name, options, instructions=True, skipped=skipped)


def _instruction_example(record: dict[str, Any], tokenizer: Tokenizer, seq_len: int) -> Example | None:
    """None if nothing of an answer is left to learn."""
    context = (record.get("input") or "").strip()
    prompt = _PROMPT.format(
        instruction=record["instruction"].strip(),
        and_input=", paired with an input that provides further context" if context else "",
        input=f"### Input:\n{context}\n\n" if context else "",
    )
    answer = record["output"].strip()
    if not answer:
        return None
    start = _without_end(tokenizer(prompt, return_special_tokens_mask=True, verbose=False))
    if len(start) >= seq_len:
        return None
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    learnt = [*tokenizer(answer, add_special_tokens=False, verbose=False).input_ids, *end]
    return {"input_ids": [*start, *learnt][:seq_len], "labels": [*[IGNORED] * len(start), *learnt][:seq_len]}


def _without_end(encoding: BatchEncoding) -> list[int]:
    """The tokens of a prompt, without the special tokens with which some tokenizers end every text."""
    tokens: list[int] = encoding.input_ids
    while tokens and encoding.special_tokens_mask[len(tokens) - 1]:
        tokens = tokens[:-1]
    return tokens


def _split(examples: list[Example], name: str, options: RecoveryOptions, instructions: bool, skipped: int) -> Examples:
    if len(examples) < 2:
        raise AdaPrunerError(
            f"{name} gives {len(examples)} examples of at most {options.seq_len} tokens; 2 are needed, one to train on"
            " and one to validate on"
        )
    kept_back = max(1, min(options.validation, len(examples) // 10))
    return Examples(examples[:-kept_back], examples[-kept_back:], instructions, skipped)
