"""The choice of what is removed: measurements of the dense model, the search, and the plan of its best candidate."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.calibration._text import Text
from adapruner.config import Layout, Searched, Space, Terms
from adapruner.errors import AdaPrunerError
from adapruner.evaluation._losses import compute_prefix, window_losses
from adapruner.files import is_whole, write_atomically
from adapruner.graph.folder import RunFolder
from adapruner.graph.records import Form
from adapruner.importance._terms import TERMS, Term, needs_moments, needs_removal_errors
from adapruner.measurement._moments import StoredMoments, measure_moments, projected_blocks
from adapruner.measurement._removal import removal_errors
from adapruner.measurement._samples import measure_in_parts
from adapruner.measurement._statistics import Statistics
from adapruner.memory import Placement
from adapruner.option_rules import (
    MEASURED_AT_ONCE,
    TOKENS_FOR_ATTENTION,
    TOKENS_FOR_COSTS,
    level_rounds_of,
    may_remove_attention,
    scoring_count,
    searches_widths,
    trials_of,
    windows_of,
)
from adapruner.planning._budget import Budget, can_meet, kept_counts
from adapruner.planning._plan import PruningPlan
from adapruner.progress import Reporter
from adapruner.run.nodes.declared import GRAPH, json_form
from adapruner.search._attention_order import AttentionOrder, attention_order
from adapruner.search._levelling import Levelled, level
from adapruner.search._objective import Objective, at_budget, plan_candidate
from adapruner.search._result import SearchResult
from adapruner.search._space import ExtendedSpace, PaperSpace, SearchSpace, build_subset_family, reused_layers
from adapruner.search._study import Search, StudyFile
from adapruner.structure._blocks import Structure

MOMENTS: Form[StoredMoments] = Form(lambda moments, path: shutil.move(moments.folder, path), StoredMoments)
STATISTICS: Form[Statistics] = Form(Statistics.save, Statistics.load)
PLAN: Form[PruningPlan] = Form(PruningPlan.save, PruningPlan.load)

# Measurements


@GRAPH.kept("moments", MOMENTS, version=2, is_wanted=needs_moments)
def moments(
    dense_fast: PreTrainedModel, structure: Structure, text_to_learn: tuple[Text, Text], reporter: Reporter, work: Path
) -> StoredMoments:
    """Second moments of all blocks; those of finished blocks are kept."""
    moments = StoredMoments(work)
    missing = [index for index in projected_blocks(structure) if not is_whole(moments.path(index))]
    if missing:
        text, _ = text_to_learn
        with reporter.stage("reading activations", structure.layers) as advance:
            for index, of_block in measure_moments(dense_fast, structure, text.windows, missing, progress=advance):
                write_atomically(moments.path(index), of_block.save)
    return moments


@GRAPH.leaf(lambda compares: compares)
def compares_removals(space: Space, terms: Terms) -> bool:
    """True if terms need the errors that removing groups makes."""
    return needs_removal_errors(space, terms)


@GRAPH.kept("statistics.safetensors", STATISTICS, version=3)
def statistics(
    dense: PreTrainedModel,
    structure: Structure,
    placement: Placement,
    windows: dict[str, Text],
    moments: StoredMoments | None,
    compares_removals: bool,
    terms: Terms,
    reporter: Reporter,
    work: Path,
) -> Statistics:
    """Statistics of the pool, measured part by part; finished parts are kept."""
    pool, size = windows["pool"].windows, MEASURED_AT_ONCE[placement.layer_wise]
    parts = {start: work / f"{start:06}.safetensors" for start in range(0, len(pool), size)}
    missing = [start for start, path in parts.items() if not is_whole(path)]
    with reporter.stage("measuring", len(parts)) as advance:
        advance(len(parts) - len(missing))
        measured = measure_in_parts(
            dense, structure, pool, size, terms=terms, layer_wise=placement.layer_wise, folder=work, starts=missing
        )
        for start, part in measured:
            write_atomically(parts[start], part.save)
            advance()
    statistics = Statistics.concatenate([Statistics.load(path) for path in parts.values()])
    if moments is not None and compares_removals:
        with reporter.stage("comparing removals", len(moments)) as advance:
            statistics = replace(statistics, **removal_errors(dense, structure, moments, advance))
    return statistics


# The attention that may be removed


@GRAPH.in_memory
def prunable_layers(structure: Structure, protect_first: int | None, protect_last: int | None) -> range:
    """The layers that the options do not protect."""
    return range(protect_first or 0, structure.layers - (protect_last or 0))


@GRAPH.in_memory
def removable_attention(structure: Structure, remove_attention: bool | None, prunable_layers: range) -> list[int]:
    """The layers whose attention the search may remove whole."""
    if remove_attention and not structure.attention_parameters:
        raise AdaPrunerError(
            f"`remove_attention`: models of the family {structure.model_type} cannot lose whole attention layers"
        )
    return sorted(structure.attention_parameters.keys() & set(prunable_layers))


@GRAPH.kept("attention.json", json_form(AttentionOrder), version=2, is_wanted=may_remove_attention)
def ranked_attention(
    dense_fast: PreTrainedModel,
    structure: Structure,
    windows: dict[str, Text],
    removable_attention: list[int],
    pool: int,
    seq_len: int,
    reporter: Reporter,
) -> AttentionOrder:
    """The order in which attention layers are removed."""
    text = windows["pool"].windows[: windows_of(TOKENS_FOR_ATTENTION, pool, seq_len)]
    with reporter.stage("ranking attention layers", len(removable_attention)) as advance:
        return attention_order(dense_fast, structure, text, removable_attention, advance)


@GRAPH.in_memory
def moments_to_correct(moments: StoredMoments | None, compensation: str) -> StoredMoments | None:
    """The second moments by which the remaining weights are corrected; None if they are not."""
    return None if compensation == "none" else moments


# The search


def _content_of_term(term: Term) -> list[Any]:
    """The declaration of a term; of one from outside this package, with what tells its code from another."""
    code = list[str]()
    if not term.function.__module__.startswith("adapruner."):
        with contextlib.suppress(AdaPrunerError):  # defined on a prompt, which no later run is from
            code = [_name_of_code(term.function)]
    return [term.family, term.share, sorted(term.needs), *code]


def _name_of_code(function: Callable[..., Any]) -> str:
    """`NAME@HASH` of a function of the user: of the file that it is from, or of its own source where that is no file.
    What else it depends on, such as data that it has read, is not seen."""
    written = inspect.unwrap(function.func if isinstance(function, functools.partial) else function)
    code = written if inspect.isroutine(written) else type(written)
    name = getattr(code, "__name__", type(code).__name__)
    try:
        file = Path(inspect.getsourcefile(code) or "")
        content = file.read_bytes() if file.is_file() else inspect.getsource(code).encode()
    except (OSError, TypeError):
        raise AdaPrunerError(f"the source of {name} cannot be read") from None
    return f"{name}@{hashlib.sha256(content).hexdigest()[:12]}"


@GRAPH.leaf(lambda terms: {name: _content_of_term(term) for name, term in terms.items()})
def importance_terms() -> dict[str, Term]:
    """The registered terms."""
    return dict(TERMS)


@GRAPH.costly
def space_of_search(
    structure: Structure,
    statistics: Statistics,
    starting_budget: Budget,
    ranked_attention: AttentionOrder | None,
    importance_terms: dict[str, Term],
    samples: int,
    seed: int,
    space: Any,
    protect_first: int | None,
    protect_last: int | None,
    head_share: float | None,
    alignment: Any,
    reduction: Any,
    terms: Any,
    search: Any,
) -> SearchSpace:
    """The candidates among which is searched."""
    subsets = build_subset_family(statistics, structure, kept_counts(structure, starting_budget))
    common = subsets, samples, seed, starting_budget, reduction, terms, search
    if space == "paper":
        return PaperSpace(*common, alignment)
    # The space reads the registry itself: `importance_terms` puts its content into the key.
    is_routed = statistics.routed_share is not None and bool(statistics.routed_share.any())
    allocation = {"protect_first": protect_first, "protect_last": protect_last, "head_share": head_share}
    return ExtendedSpace(
        *common,
        fixed=frozenset(name for name, value in allocation.items() if value is not None),
        can_meet=partial(can_meet, structure),
        experts="none" if not structure.has_experts else "routing" if is_routed else "taylor",
        attention_order=ranked_attention.shortened(structure, starting_budget.ratio) if ranked_attention else (),
    )


@GRAPH.costly
def dense_losses(dense_fast: PreTrainedModel, windows: dict[str, Text]) -> Tensor:
    """[windows], float64: the losses of the dense model on the text of the objective."""
    return window_losses(dense_fast, windows["objective"].windows)


@GRAPH.kept("search.json", json_form(SearchResult), version=9, is_result=True)
def found(
    dense_fast: PreTrainedModel,
    structure: Structure,
    dense_losses: Tensor,
    statistics: Statistics,
    moments_to_correct: StoredMoments | None,
    space_of_search: SearchSpace,
    windows: dict[str, Text],
    placement: Placement,
    layout: Layout,
    protect_first: int | None,
    trials: int | None,
    space: Space,
    search: Searched,
    seed: int,
    objective_windows: int | None,
    final_windows: int,
    memory_for_moments: dict[torch.device, int],
    reporter: Reporter,
    run_folder: RunFolder,
    key: str,
) -> SearchResult:
    """The outcome of the search."""
    held = moments_to_correct and StoredMoments(moments_to_correct.folder, memory_for_moments)
    reused = reused_layers(layout, protect_first, structure.layers)

    def objective(places: slice) -> Objective:
        text = windows["objective"].windows[places]
        prefix = compute_prefix(dense_fast, text, reused) if reused else None
        return Objective(dense_fast, structure, statistics, text, dense_losses[places], held, prefix)

    scoring = scoring_count(objective_windows, final_windows, len(dense_losses))
    judge, further = objective(slice(scoring)), slice(scoring, None)
    count = trials_of(trials, space, search, len(space_of_search.starting_points()))
    judge_together = judge.together if placement.layer_wise else None
    study = Search(space_of_search, judge, count, seed, StudyFile(run_folder.study, key), judge_together)
    with reporter.stage("searching", count) as advance:
        study.run(lambda best: advance(1, text=f"best loss {best:.4f}"))
        judge_further = objective(further) if scoring < len(dense_losses) else None
        return study.result(judge_further, windows["objective"].kinds)


# The candidate at the ratio of the run


@GRAPH.kept(
    "levelled.json",
    json_form(Levelled),
    version=6,
    is_wanted=lambda level_rounds, ratio, ratio_of, search, space, layout: (
        level_rounds_of(level_rounds, ratio) and searches_widths(ratio_of, search, space, layout)
    ),
)
def levelled(
    dense_fast: PreTrainedModel,
    structure: Structure,
    statistics: Statistics,
    moments_to_correct: StoredMoments | None,
    windows: dict[str, Text],
    dense_losses: Tensor,
    found: SearchResult,
    starting_budget: Budget,
    level_rounds: int | None,
    ratio: float,
    prunable_layers: range,
    head_share: float | None,
    pool: int,
    seq_len: int,
    memory_for_moments: dict[torch.device, int],
    reporter: Reporter,
) -> Levelled:
    """The chosen candidate at the ratio, with attention kept that is worth it and its widths levelled: costs are
    measured on the pool, and the windows of the objective decide what is accepted. A given share of heads is kept, and
    layers that the options protect are."""
    candidate = at_budget(structure, found.best, starting_budget)
    rounds = level_rounds_of(level_rounds, ratio)
    text = windows["pool"].windows[: windows_of(TOKENS_FOR_COSTS, pool, seq_len)]
    held = moments_to_correct and StoredMoments(moments_to_correct.folder, memory_for_moments)
    objective = Objective(dense_fast, structure, statistics, windows["objective"].windows, dense_losses, held)
    blocks = [
        block
        for block in structure.blocks
        if block.layer in prunable_layers
        and (head_share is None if block.kind == "heads" else block.kind == "channels" and not block.experts)
    ]
    with reporter.stage("levelling widths", len(blocks) * rounds) as advance:
        return level(objective, text, candidate, rounds, prunable_layers, head_share is None, advance)


@GRAPH.kept("plan.json", PLAN, version=2, is_result=True)
def plan(
    structure: Structure,
    statistics: Statistics,
    found: SearchResult,
    levelled: Levelled | None,
    starting_budget: Budget,
) -> PruningPlan:
    """The plan of the chosen candidate."""
    best = levelled.candidate if levelled else found.best
    return plan_candidate(structure, statistics, at_budget(structure, best, starting_budget))
