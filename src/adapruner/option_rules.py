"""Rules between options: conflicts, and defaults that depend on other options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Set
from functools import cache
from typing import Any

# A combination of fields that is refused: a test whose parameters are named after the fields, and a message.
Conflict = tuple[Callable[..., Any], str]

# Options that are set by `effort`, by its value: points on the frontier of quality and time (research/results.md).
EFFORTS: dict[str, dict[str, Any]] = {
    "quick": {"compensation_windows": 192, "heal": "none"},
    "standard": {},
    "thorough": {"compensation_windows": 768, "heal": "400000"},
}

# The fewest windows that judge trials, unless fewer are asked for: results on few do not carry over
# (research/experiments/windows-and-trials.md).
FEWEST_JUDGING_WINDOWS = 64
# Trials of a search for comparison; of a model with experts, whose ranking has no closed form: its starting points.
SEARCH_TRIALS, EXPERT_TRIALS = 48, 8
# From so many trials on, LLM-Pruner's metrics are among them.
_TRIALS_WITH_FIXED = 8
# Tokens of held-out text on which the costs of blocks are measured.
TOKENS_FOR_COSTS = 2048
# Samples measured at once; layer by layer, the activations of one layer are kept, so more samples fit.
MEASURED_AT_ONCE = {False: 4, True: 16}


@cache
def fields_of(test: Callable[..., Any]) -> Set[str]:
    """The fields that a test reads, which are its parameters."""
    return inspect.signature(test).parameters.keys()


def trials_of(trials: int | None, space: str, search: str) -> int:
    """The number of trials of the search, 0 for none: by default, only what is there for comparison searches."""
    if trials is not None:
        return trials
    return 0 if (space, search) == ("extended", "joint") else SEARCH_TRIALS


def searches(trials: int | None, space: str, search: str) -> bool:
    """True if there is a search."""
    return trials_of(trials, space, search) > 0


def tries_fixed_metrics(trials: int | None, space: str, search: str) -> bool:
    """True if LLM-Pruner's metrics are among the trials."""
    return trials_of(trials, space, search) >= _TRIALS_WITH_FIXED


def allocates_by_cost(space: str, layout: str, ratio_of: str, head_share: float | None) -> bool:
    """True if what each layer loses follows from its cost, and not from options."""
    return (space, layout) == ("extended", "per-layer") and ratio_of != "groups" and not head_share


def healed_tokens(heal: str) -> int:
    """The number of tokens on which the pruned model is trained; 0 for none."""
    return 0 if heal == "none" else int(heal)


CONFLICTS_OF_PRUNING: tuple[Conflict, ...] = (
    (
        lambda space, search, trials: trials == 0 and (space, search) != ("extended", "joint"),
        "`trials` 0: `space` paper and `search` calibration or metric are searches; leave `trials` out",
    ),
    (
        lambda layout, protect_first, protect_last: layout == "uniform" and (protect_first or protect_last),
        "`layout` uniform prunes all layers equally: remove `protect_first` and `protect_last`",
    ),
    (
        lambda layout, remove_attention: layout == "uniform" and remove_attention,
        "`layout` uniform prunes all layers equally: remove `remove_attention`",
    ),
    (
        lambda space, remove_attention: space == "paper" and remove_attention,
        "`space` paper removes no whole attention: remove `remove_attention`, or set `space` extended",
    ),
    (
        lambda alignment, space: alignment == "paper" and space == "extended",
        "`alignment` paper only supports the Taylor terms: set `space` paper",
    ),
    (
        lambda ratio_of, space: ratio_of == "groups" and space == "extended",
        "`ratio_of` groups leaves no allocation to search: set `space` paper",
    ),
    (
        lambda samples, pool: samples > pool,
        "`samples` {samples} is more than the {pool} of `pool`: lower one or raise the other",
    ),
)

CONFLICTS_OF_SIZES: tuple[Conflict, ...] = (
    (
        lambda size, memory, gguf_type: gguf_type is not None and size is None and memory is None,
        "`gguf_type` is the type of a file: add `size` or `memory`",
    ),
    (
        lambda memory, context, batch: (context, batch) != (2048, 1) and memory is None,
        "`context` and `batch` are those of a KV cache: add `memory`",
    ),
)

CONFLICTS_OF_TRAINING: tuple[Conflict, ...] = (
    (
        lambda steps, epochs, tokens: sum(budget is not None for budget in (steps, epochs, tokens)) > 1,
        "`steps`, `epochs` and `tokens` each say how long the training is: give one",
    ),
)

CONFLICTS_OF_RECOVERY: tuple[Conflict, ...] = (
    *CONFLICTS_OF_TRAINING,
    (
        lambda teacher_top, teacher: teacher_top is not None and teacher is None,
        "`teacher_top` needs the dense model: add `teacher`",
    ),
)
