"""The order in which the examples of several datasets are learnt."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from adapruner.config import RecoveryOptions
from adapruner.recovery._examples import DEFAULT_EPOCHS, Example, Examples

# Shares are met exactly over so many examples, whose order repeats.
_CYCLE = 4096


class MixedExamples(Dataset[Example]):
    """The training examples of several datasets in the order in which they are learnt: evenly mixed by their shares,
    each dataset in a seeded order of its own for every pass. One that ends is begun again.

    Args:
        count: the number of all examples.
    """

    def __init__(self, blend: Sequence[Examples], count: int, seed: int) -> None:
        self._blend, self._count, self._seed = blend, count, seed
        # The examples of a dataset are wanted at equal intervals.
        wanted = [(torch.arange(_CYCLE, dtype=torch.float64) + 0.5) / examples.share for examples in blend]
        order = torch.cat(wanted).argsort(stable=True)[:_CYCLE]
        self._part, self._number = order // _CYCLE, order % _CYCLE
        self._per_cycle = self._part.bincount(minlength=len(blend)).tolist()
        self._order = functools.lru_cache(maxsize=2 * len(blend))(self._order_of_pass)

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

    def _order_of_pass(self, count: int, number: int) -> Tensor:
        return torch.randperm(count, generator=torch.Generator().manual_seed(self._seed + number))


def examples_to_learn(blend: Sequence[Examples], options: RecoveryOptions) -> int:
    """The number of examples that a training reads, some of them repeated."""
    if options.steps is not None:
        return options.steps * options.batch_size
    if options.tokens is None:
        return (options.epochs or DEFAULT_EPOCHS) * sum(len(examples.training) for examples in blend)
    per_step = options.batch_size * sum(examples.share * examples.mean_tokens for examples in blend)
    return max(1, round(int(options.tokens) / per_step)) * options.batch_size
