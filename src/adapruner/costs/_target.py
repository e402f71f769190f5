"""From the options to the target of a run, and what became of it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from adapruner.config import TargetName, size_in_bytes
from adapruner.costs._bytes import bytes_in, cache_bytes, dtype_in, memory_costs, size_costs
from adapruner.costs._latency import Latencies
from adapruner.planning import Target
from adapruner.structure import Structure


class TargetOutcome(BaseModel):
    """A target, and how well it was met.

    Attributes:
        unit: of all numbers.
        dense: of the dense model, with the tokens that are kept.
        asked, predicted, reached: what the option says; what was computed for the plan; what the saved model has: its
            size, or the speed that was measured in turn with the dense model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    option: TargetName
    unit: Literal["MB", "times as fast"]
    dense: float
    asked: float
    predicted: float
    reached: float

    @property
    def error(self) -> float:
        """By how much of itself the reached number differs from the predicted one."""
        return self.predicted / self.reached - 1


def target_of(
    config: Any,
    model: PreTrainedModel,
    structure: Structure,
    dtype: torch.dtype,
    tokenizer: Tokenizer,
    latencies: Latencies | None,
) -> Target | None:
    """What replaces the ratio; None where nothing does.

    Args:
        model: the dense model; on the meta device is enough.
        dtype: of its weights.
        latencies: for a speed.

    Raises:
        AdaPrunerError: the model cannot be written in the format.
    """
    option = config.target
    if option is None:
        return None
    value = str(getattr(config, option))
    if option == "target_speed":
        assert latencies is not None
        costs = latencies.costs(structure)
    else:
        costs = size_costs(model, structure, bytes_in(config.target_format, dtype, model, tokenizer))
    if option == "target_memory":
        of_cache = dtype_in(config.target_format, dtype)
        caches = cache_bytes(model, config.target_batch, config.tokens_of_target, of_cache)
        costs = memory_costs(structure, costs, caches)
    dense = costs([block.groups for block in structure.blocks])
    most = dense / config.target_speed if config.target_speed else float(size_in_bytes(value))
    return Target(option, value, costs, most, dense)
