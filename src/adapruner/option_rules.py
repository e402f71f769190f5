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
    "quick": {"pool": 32, "objective_windows": 64, "level_rounds": 0, "compensation_windows": 192, "heal": "20000"},
    "standard": {},
    "thorough": {"trials": 96, "compensation_windows": 768, "heal": "400000"},
}

# Minimum and maximum number of windows that score a trial: results on few do not carry over
# (research/experiments/windows-and-trials.md).
SCORING_WINDOWS = (64, 96)
# Of a search that does not begin with points that are good on most models.
SEARCH_TRIALS = 48
# Samples measured at once; layer by layer, the activations of one layer are kept, so more samples fit.
MEASURED_AT_ONCE = {False: 4, True: 16}
# Tokens of the pool on which attention layers are ranked, and on which the costs of widths are measured. On fewer,
# attention is removed that other text needs (research/experiments/whole-parts.md).
TOKENS_FOR_ATTENTION, TOKENS_FOR_COSTS, _FEWEST_WINDOWS = 2048, 8192, 8

# Below this ratio, levelling takes 30 % of a run and gains almost nothing (research/experiments/levelling.md).
LEVELLED_FROM = 0.3


@cache
def fields_of(test: Callable[..., Any]) -> Set[str]:
    """The fields that a test reads, which are its parameters."""
    return inspect.signature(test).parameters.keys()


def scoring_bounds(objective_windows: int | None) -> tuple[int, int]:
    """Minimum and maximum number of windows that score every trial."""
    return SCORING_WINDOWS if objective_windows is None else (objective_windows, objective_windows)


def scoring_count(objective_windows: int | None, final_windows: int, windows: int) -> int:
    """Number of windows of the objective that score every trial; the others score the best trials again.

    Args:
        windows: number of windows of the objective.
    """
    fewest, most = scoring_bounds(objective_windows)
    return min(most, max(fewest, windows - final_windows))


def windows_of(tokens: int, pool: int, seq_len: int) -> int:
    """Number of windows of the pool that have about `tokens` tokens."""
    return min(pool, max(_FEWEST_WINDOWS, tokens // seq_len))


def searches(trials: int | None, space: str, search: str) -> bool:
    """True if more than the starting points is tried: where a number of trials is given, and in spaces without points
    that are good on most models (research/experiments/windows-and-trials.md)."""
    return trials is not None or (space, search) != ("extended", "joint")


def trials_of(trials: int | None, space: str, search: str, starting_points: int) -> int:
    """The number of trials."""
    if trials is not None:
        return trials
    return SEARCH_TRIALS if searches(trials, space, search) else starting_points


def level_rounds_of(level_rounds: int | None, ratio: float) -> int:
    """The maximum number of rounds that level widths: by default 2 from `LEVELLED_FROM` on."""
    if level_rounds is not None:
        return level_rounds
    return 2 if ratio >= LEVELLED_FROM else 0


def searches_widths(ratio_of: str, search: str, space: str, layout: str) -> bool:
    """True if the search decides how many channels each layer keeps."""
    return ratio_of != "groups" and (search, space, layout) == ("joint", "extended", "per-layer")


def may_remove_attention(space: str, search: str, layout: str, remove_attention: bool | None) -> bool:
    """True if the search may remove whole attention layers."""
    return (space, search, layout) == ("extended", "joint", "per-layer") and remove_attention is not False


def healed_tokens(heal: str) -> int:
    """The number of tokens on which the pruned model is trained; 0 for none."""
    return 0 if heal == "none" else int(heal)


CONFLICTS_OF_PRUNING: tuple[Conflict, ...] = (
    (
        lambda ratio_of, search, space, layout, level_rounds: (
            level_rounds and not searches_widths(ratio_of, search, space, layout)
        ),
        "`level_rounds` moves widths that the search chose: remove it, or set `space` extended, `search` joint,"
        " `layout` per-layer and `ratio_of` parameters or decoder",
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
        lambda sequential, compensation: sequential and compensation != "least-squares",
        "`sequential` needs `compensation` least-squares, not {compensation}",
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
