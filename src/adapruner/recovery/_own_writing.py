"""Text that a model writes while it is trained, for its teacher to correct."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from adapruner.config import RecoveryOptions
from adapruner.models import NO_TOKEN, continue_texts
from adapruner.processes import this_process
from adapruner.recovery._examples import IGNORED, Example

# Tokens of running text that the model continues, and tokens that it writes, at most.
_LEAST_PROMPT, _LONGEST_PROMPT, _WRITTEN = 8, 32, 96
# Half of the texts are greedy; the others are sampled.
_TEMPERATURES = 0.0, 0.8
# A text is learnt up to a piece that was there before, and a little further, where the model should leave its loop.
_PIECE, _FURTHER = 6, 4
# Examples that are written together, at least.
_AT_ONCE = 64


@dataclass
class OwnWriting:
    """Examples in which a model continues the beginnings of training examples: its teacher's predictions for them are
    learnt, not the tokens (on-policy distillation: GKD, arXiv 2306.13649). They are written anew every few steps.

    A step has the same examples whenever it is made, if the model is the same: training that was killed resumes at the
    first step of a round.

    Attributes:
        sources: the training examples.
        ends: tokens that end a text.
        seq_len: the most tokens of an example.
        seed: of the choice of prompts and of samples.
        rows: examples for each forward pass.
        passes: forward passes of each step.
        steps: steps for which a round is written.
    """

    sources: Sequence[Example]
    ends: Sequence[int]
    seq_len: int
    seed: int
    rows: int
    passes: int
    steps: int
    _round: int | None = None
    _examples: list[Example] = field(default_factory=list)

    @classmethod
    def planned(
        cls, sources: Sequence[Example], ends: Sequence[int], options: RecoveryOptions, rows: int, passes: int
    ) -> OwnWriting:
        """
        Args:
            rows: examples of the datasets in each forward pass of a process.
        """
        process = this_process()
        added = max(1, round(rows * options.own_writing / (1 - options.own_writing)))
        steps = max(1, _AT_ONCE // (added * passes))
        seed = options.seed * process.count + process.rank
        return cls(sources, ends, options.seq_len, seed, added, passes, steps)

    def examples(
        self, step: int, number: int, model: Callable[[], AbstractContextManager[PreTrainedModel]]
    ) -> list[Example]:
        """The examples of one forward pass of a step.

        Args:
            step, number: from 0.
            model: gives the model as it is now; called once in a round.
        """
        current, step_of_round = divmod(step, self.steps)
        if current != self._round:
            with model() as writer:
                self._round, self._examples = current, self._write(writer, current)
        first = (step_of_round * self.passes + number) * self.rows
        return self._examples[first : first + self.rows]

    def _write(self, model: PreTrainedModel, number: int) -> list[Example]:
        count, chosen = self.steps * self.passes * self.rows, random.Random(f"{self.seed} {number}")
        prompts = [self._prompt(chosen.choice(self.sources), chosen) for _ in range(count)]
        temperatures = torch.tensor([_TEMPERATURES[row % len(_TEMPERATURES)] for row in range(count)])
        new_tokens = min(_WRITTEN, self.seq_len - max(map(len, prompts)))
        written = continue_texts(model, prompts, new_tokens, temperatures, chosen.getrandbits(31), self.ends)
        examples: list[Example] = []
        for prompt, row in zip(prompts, written[:, written.shape[1] - new_tokens :], strict=True):
            learnt = until_loop(row[row != NO_TOKEN].tolist())
            labels = [*[IGNORED] * len(prompt), *learnt]
            examples.append({"input_ids": [*prompt, *learnt], "labels": labels, "label_weight": 0.0})
        return examples

    def _prompt(self, example: Example, chosen: random.Random) -> list[int]:
        """The part of an example that is not learnt, or else some tokens from its beginning."""
        tokens, labels = example["input_ids"], example["labels"]
        asked = next(place for place, label in enumerate(labels) if label != IGNORED)
        if asked > 1 and asked <= self.seq_len // 2:
            return tokens[:asked]
        longest = min(_LONGEST_PROMPT, self.seq_len // 2)
        return tokens[: chosen.randint(min(_LEAST_PROMPT, longest), longest)]


def until_loop(tokens: list[int]) -> list[int]:
    """Tokens up to the end of the first piece that was there before, and a few more."""
    seen = set()
    for end in range(_PIECE, len(tokens) + 1):
        piece = tuple(tokens[end - _PIECE : end])
        if piece in seen:
            return tokens[: end + _FURTHER]
        seen.add(piece)
    return tokens
