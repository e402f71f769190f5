"""From an amount to what the pruned model may cost."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from adapruner.costs._bytes import cache_bytes, dtype_in, memory_costs, size_costs
from adapruner.costs._latency import Latencies
from adapruner.planning import Amount, Memory, Speed, Target
from adapruner.structure import Structure


def target_of(
    amount: Amount,
    model: PreTrainedModel,
    structure: Structure,
    dtype: torch.dtype,
    tokenizer: Tokenizer,
    latencies: Latencies | None,
) -> Target:
    """The amount, with what computes the cost of a pruned model.

    Args:
        model: the dense model; on the meta device is enough.
        dtype: of its weights.
        latencies: for a speed.

    Raises:
        AdaPrunerError: the model cannot be written in the format.
    """
    if isinstance(amount, Speed):
        assert latencies is not None
        costs = latencies.costs(structure)
    else:
        costs = size_costs(model, structure, amount.format, dtype, tokenizer)
    if isinstance(amount, Memory):
        caches = cache_bytes(model, amount.batch, amount.context, dtype_in(amount.format, dtype))
        costs = memory_costs(structure, costs, caches)
    return Target(amount, costs, costs([block.groups for block in structure.blocks]))
