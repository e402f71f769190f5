"""The choice of what is removed: measurements of the dense model, the search, and the plan of its best candidate."""

import functools
import hashlib
import inspect
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.base.errors import AdaPrunerError
from adapruner.base.files import is_whole, write_atomically
from adapruner.base.progress import Reporter
from adapruner.budget.counts import (
    CHANNELS_BEFORE_HEADS,
    Budget,
    BudgetError,
    ByCost,
    Profile,
    kept_counts,
    largest_channel_share,
)
from adapruner.budget.plan import PruningPlan, make_plan
from adapruner.evaluation.losses import window_losses
from adapruner.graph.nodes import Form
from adapruner.importance import TERMS, Term, needs_moments, needs_removal_errors
from adapruner.measurement.moments import StoredMoments, measure_moments, projected_blocks, removal_errors
from adapruner.measurement.routing import measure_routing
from adapruner.measurement.taylor import MEASURED_AT_ONCE, Statistics, measure_in_parts
from adapruner.options import Alignment, Layout, RatioOf, Reduction, Searched, Space, allocates_by_cost
from adapruner.run.folder import RunFolder
from adapruner.run.inputs import GRAPH as GRAPH, TENSORS, json_form
from adapruner.run.memory import Placement
from adapruner.search.judging import TOKENS_FOR_COSTS, Costs, Objective, cuts_to_measure, measure_costs, plan_candidate
from adapruner.search.space import ExtendedSpace, PaperSpace, SearchSpace, build_subset_family
from adapruner.search.study import Search, SearchResult, StudyFile
from adapruner.structure.blocks import Structure
from adapruner.text.windows import Text

MOMENTS: Form[StoredMoments] = Form(lambda moments, path: shutil.move(moments.folder, path), StoredMoments)
# Chosen for fewer tokens, an expert is ranked by chance.
FEW_TOKENS = 64
STATISTICS: Form[Statistics] = Form(Statistics.save, Statistics.load)
PLAN: Form[PruningPlan] = Form(PruningPlan.save, PruningPlan.load)

# What may be removed


@GRAPH.leaf(lambda allocation: allocation and [*asdict(allocation).values()])
def allocation(
    structure: Structure,
    starting_budget: Budget,
    space: Space,
    layout: Layout,
    ratio_of: RatioOf,
    head_share: float | None,
    remove_attention: bool | None,
) -> ByCost | None:
    """What decides how much is removed from each block: its cost; None if options decide. Heads are removed where
    layers would lose more than half of their channels otherwise."""
    if remove_attention and not structure.attention_parameters:
        raise AdaPrunerError(
            f"`remove_attention`: models of the family {structure.model_type} cannot lose whole attention layers"
        )
    profile, decides = starting_budget.allocation, allocates_by_cost(space, layout, ratio_of, head_share)
    if structure.cuts_experts or not decides or not isinstance(profile, Profile):
        return None
    channels = largest_channel_share(structure, kept_counts(structure, starting_budget))
    heads = bool(starting_budget.heads) or channels > CHANNELS_BEFORE_HEADS
    whole = heads if remove_attention is None else remove_attention
    return ByCost(profile.protect_first, profile.protect_last, heads and head_share is None, whole)


# Measurements


@GRAPH.leaf(lambda numbers: numbers)
def blocks_to_read(
    structure: Structure, starting_budget: Budget, allocation: ByCost | None, is_searched: bool
) -> list[int]:
    """The blocks whose second moments are of use: those that may be cut, or all where a search ranks them; beside
    experts, those that are cut."""
    known = projected_blocks(structure)
    if structure.has_experts and not is_searched:
        counts = kept_counts(structure, starting_budget)
        return [number for number in known if counts[number] < structure.blocks[number].groups]
    return known if is_searched or not allocation else sorted({*known} & allocation.cut_blocks(structure).keys())


@GRAPH.kept("moments", MOMENTS, version=3, is_wanted=needs_moments)
def moments(
    dense_fast: PreTrainedModel,
    structure: Structure,
    blocks_to_read: list[int],
    text_to_learn: tuple[Text, Text],
    reporter: Reporter,
    work: Path,
) -> StoredMoments:
    """Second moments of these blocks; those of finished blocks are kept."""
    moments = StoredMoments(work)
    missing = [index for index in blocks_to_read if not is_whole(moments.path(index))]
    if missing:
        text, _ = text_to_learn
        with reporter.stage("reading activations", structure.layers) as advance:
            for index, of_block in measure_moments(dense_fast, structure, text.windows, missing, progress=advance):
                write_atomically(moments.path(index), of_block.save)
    return moments


@GRAPH.kept("removals.safetensors", TENSORS, version=2, is_wanted=needs_removal_errors)
def removals(
    dense: PreTrainedModel,
    dense_fast: PreTrainedModel,
    structure: Structure,
    moments: StoredMoments,
    text_to_learn: tuple[Text, Text],
    is_searched: bool,
    reporter: Reporter,
) -> dict[str, Tensor]:
    """The errors that removing groups makes, by their name in `Statistics`. Without a search, `tempered_error` of
    experts is what they add to the hidden state, and the number of their tokens is kept beside it."""
    with reporter.stage("comparing removals", len(moments)) as advance:
        errors = removal_errors(dense, structure, moments, advance, variance=is_searched)
    if is_searched or not structure.has_experts:
        return errors
    text, _ = text_to_learn
    with reporter.stage("reading experts", structure.layers) as advance:
        tokens, added = measure_routing(dense_fast, structure, text.windows, advance)
    is_expert = torch.tensor([block.kind == "experts" for block in structure.blocks])[structure.block_of_group]
    seldom = int((tokens[is_expert] < FEW_TOKENS).sum())
    if seldom:
        reporter.note(
            f"{seldom:,} of {int(is_expert.sum()):,} experts were chosen for fewer than {FEW_TOKENS} tokens, and are"
            " ranked by these: more text of `calibration`, or of more kinds, makes the ranking surer"
        )
    errors["tempered_error"] = torch.where(is_expert, added, errors["tempered_error"])
    return errors | {"expert_tokens": tokens}


@GRAPH.kept("statistics.safetensors", STATISTICS, version=5, is_wanted=lambda trials: trials)
def statistics(
    dense: PreTrainedModel,
    structure: Structure,
    placement: Placement,
    windows: dict[str, Text],
    removals: dict[str, Tensor] | None,
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
            dense, structure, pool, size, layer_wise=placement.layer_wise, folder=work, starts=missing
        )
        for start, part in measured:
            write_atomically(parts[start], part.save)
            advance()
    statistics = Statistics.concatenate([Statistics.load(path) for path in parts.values()])
    return replace(statistics, **removals or {})


# How much is removed from each block


@GRAPH.in_memory
def moments_to_correct(moments: StoredMoments | None, compensation: str) -> StoredMoments | None:
    """The second moments by which the remaining weights are corrected; None if they are not."""
    return None if compensation == "none" else moments


@GRAPH.kept("costs.json", json_form(Costs), version=4, is_wanted=allocates_by_cost)
def costs(
    dense_fast: PreTrainedModel,
    structure: Structure,
    allocation: ByCost | None,
    removals: dict[str, Tensor],
    moments_to_correct: StoredMoments | None,
    text_to_learn: tuple[Text, Text],
    seq_len: int,
    memory_for_moments: dict[torch.device, int],
    reporter: Reporter,
) -> Costs:
    """The cost of cutting each block, on text that is not fitted where there is enough. It does not depend on the
    ratio."""
    cuts = cuts_to_measure(structure, allocation) if allocation else {}
    learnt, held_out = (text.windows for text in text_to_learn)
    text = (held_out if len(held_out) else learnt)[: max(8, TOKENS_FOR_COSTS // seq_len), : TOKENS_FOR_COSTS // 8]
    held = moments_to_correct and StoredMoments(moments_to_correct.folder, memory_for_moments)
    with reporter.stage("measuring costs", len(cuts)) as advance:
        return measure_costs(dense_fast, structure, removals["tempered_error"], held, text, cuts, advance)


@GRAPH.costly
def counts_by_cost(
    structure: Structure,
    starting_budget: Budget,
    allocation: ByCost | None,
    costs: Costs | None,
    removals: dict[str, Tensor] | None,
    reporter: Reporter,
) -> list[int] | None:
    """The number of groups that each block keeps by cost; None if options decide, also because the ratio is not met by
    cost, as where a whole head is too much."""
    if not (allocation and costs and removals):
        return None
    budget = replace(starting_budget, allocation=allocation, heads=0.0)
    try:
        return kept_counts(structure, budget, costs.of_groups(structure, removals["tempered_error"]))
    except BudgetError as error:
        reporter.note(f"Options decide how much each layer loses, because costs do not meet the ratio: {error}")
        return None


@GRAPH.costly
def counts(structure: Structure, starting_budget: Budget, counts_by_cost: list[int] | None) -> list[int]:
    """The number of groups that each block keeps."""
    return counts_by_cost or kept_counts(structure, starting_budget)


# The search


def _content_of_term(term: Term) -> list[object]:
    """The declaration of a term; of one from outside this package, with `NAME@HASH` of the file that it is from, or of
    its own source where that is no file. What else it depends on, such as data that it has read, is not seen."""
    content = [term.family, term.share, sorted(term.needs)]
    if str(term.function.__module__).startswith("adapruner."):
        return content
    function = term.function
    written = inspect.unwrap(function.func if isinstance(function, functools.partial) else function)
    code = written if inspect.isroutine(written) else type(written)
    try:
        file = Path(inspect.getsourcefile(code) or "")
        source = file.read_bytes() if file.is_file() else inspect.getsource(code).encode()
    except (OSError, TypeError):  # defined on a prompt, which no later run is from
        return content
    return [*content, f"{getattr(code, '__name__', type(code).__name__)}@{hashlib.sha256(source).hexdigest()[:12]}"]


@GRAPH.leaf(lambda terms: {name: _content_of_term(term) for name, term in terms.items()})
def importance_terms() -> dict[str, Term]:
    """The registered terms."""
    return dict(TERMS)


@GRAPH.costly
def space_of_search(
    structure: Structure,
    statistics: Statistics,
    counts: list[int],
    importance_terms: dict[str, Term],
    samples: int,
    seed: int,
    space: Space,
    alignment: Alignment,
    reduction: Reduction,
    search: Searched,
) -> SearchSpace:
    """The candidates among which is searched."""
    common = build_subset_family(statistics, structure, counts), samples, seed, reduction, search
    if space == "paper":
        return PaperSpace(*common, alignment)
    # The space reads the registry itself: `importance_terms` puts its content into the key.
    is_routed = statistics.routed_share is not None and bool(statistics.routed_share.any())
    return ExtendedSpace(*common, "none" if not structure.has_experts else "routing" if is_routed else "taylor")


@GRAPH.costly
def dense_losses(dense_fast: PreTrainedModel, windows: dict[str, Text]) -> Tensor:
    """[windows], float64: the losses of the dense model on the text of the objective."""
    return window_losses(dense_fast, windows["objective"].windows)


@GRAPH.kept("search.json", json_form(SearchResult), version=13, is_result=True, is_wanted=lambda trials: trials)
def search_result(
    dense_fast: PreTrainedModel,
    structure: Structure,
    dense_losses: Tensor,
    statistics: Statistics,
    counts: list[int],
    moments_to_correct: StoredMoments | None,
    space_of_search: SearchSpace,
    windows: dict[str, Text],
    trials: int,
    seed: int,
    memory_for_moments: dict[torch.device, int],
    reporter: Reporter,
    run_folder: RunFolder,
    key: str,
) -> SearchResult:
    """The outcome of the search."""
    held = moments_to_correct and StoredMoments(moments_to_correct.folder, memory_for_moments)
    text = windows["objective"]
    judge = Objective(dense_fast, structure, statistics, counts, text.windows, dense_losses, held)
    study = Search(space_of_search, judge, trials, seed, StudyFile(run_folder.study, key))
    with reporter.stage("searching", trials) as advance:
        study.run(lambda best: advance(1, text=f"best loss {best:.4f}"))
        return study.result(text.kinds)


@GRAPH.kept("plan.json", PLAN, version=4, is_result=True)
def plan(
    structure: Structure,
    counts: list[int],
    removals: dict[str, Tensor] | None,
    statistics: Statistics | None,
    search_result: SearchResult | None,
) -> PruningPlan:
    """The plan of the chosen candidate; without a search, that of `tempered_error` (see `removals`)."""
    if search_result is None or statistics is None:
        assert removals is not None
        return make_plan(structure, removals["tempered_error"], counts)
    return plan_candidate(structure, statistics, search_result.best, counts)
