"""The search with objectives that need no model, and the subsets against brute force."""

from __future__ import annotations

import itertools
import math
import operator
import os
import random
import signal
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import fmean

import optuna
import pytest
import torch
from optuna import create_study
from optuna.distributions import FloatDistribution
from optuna.samplers import RandomSampler
from optuna.trial import FixedTrial, Trial, TrialState, create_trial
from sqlalchemy import event, text
from sqlalchemy.engine import Engine
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from adapruner.errors import AdaPrunerError
from adapruner.importance import TERMS, needed_statistics, register_term, score_groups
from adapruner.measurement import Statistics, measure, measure_moments, removal_errors
from adapruner.models import empty_model
from adapruner.planning import Budget, BudgetError, Target, kept_counts
from adapruner.search import (
    Candidate,
    History,
    Search,
    SearchResult,
    SearchSpace,
    StudyPlace,
    SubsetFamily,
    _place,
    _study,
    build_subset_family,
    meet_budget,
    plan_candidate,
    read_history,
    sqlite_url,
)
from adapruner.search._history import LOSSES, STOPPED, importance_of
from adapruner.search._space import FIXED_METRIC, START
from adapruner.structure import Structure, build_structure
from run_helpers import fast_starts


def place_in(folder: Path) -> StudyPlace:
    folder.mkdir(exist_ok=True)
    return StudyPlace(sqlite_url(folder / "study.db"), "study")


def search(
    space: SearchSpace,
    judge: object,
    trials: int,
    seed: int,
    folder: Path,
    sampler: str = "tpe",
    judge_further: object = None,
    judge_changed: object = None,
) -> SearchResult:
    """The whole search by one process."""
    whole = Search(space, judge, trials, seed, place_in(folder), sampler)
    whole.run()
    return whole.result(judge_further, judge_changed)


@pytest.fixture
def subsets() -> SubsetFamily:
    generator = torch.Generator().manual_seed(0)
    importance = torch.rand(12, 30, generator=generator).double()
    features = torch.randn(12, 4, generator=generator).double()
    return SubsetFamily(importance @ importance.T, features)


def a_smooth_loss(candidate: Candidate) -> float:
    """Wants fine second-order terms and the last samples of the pool."""
    weights = candidate.point.weights
    share = weights.get("fine_second", 0.0) / sum(weights.values())
    return (share - 0.7) ** 2 + (1 - sum(candidate.samples) / (4 * 11)) ** 2


def a_smooth_objective(candidate: Candidate) -> list[Tensor]:
    """One window."""
    return [torch.tensor([a_smooth_loss(candidate)], dtype=torch.float64)]


def test_never_worse_than_the_fixed_metrics_and_better_with_trials(subsets: SubsetFamily, tmp_path: Path) -> None:
    space = SearchSpace(subsets, 4, 0, Budget(0.2))
    result = search(space, a_smooth_objective, 24, 0, tmp_path / "run")
    assert result.best_loss < result.best_fixed_loss
    assert result.best_loss == a_smooth_loss(result.best)
    assert result.best_fixed_name in {"vectorize", "param_first", "param_second", "param_mix"}
    assert result.best_fixed.samples == tuple(space.first_draw)
    few = search(space, a_smooth_objective, 7, 0, tmp_path / "few")
    assert result.best_loss < few.best_loss


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_killed_search_proposes_what_an_undisturbed_one_does(
    sampler: str, subsets: SubsetFamily, tmp_path: Path
) -> None:
    space = SearchSpace(subsets, 4, 3, Budget(0.2))
    undisturbed: list[Candidate] = []

    def record(into: list[Candidate], stop_at: int | None = None) -> object:
        def objective(candidate: Candidate) -> list[Tensor]:
            if len(into) == stop_at:
                raise KeyboardInterrupt
            into.append(candidate)
            return a_smooth_objective(candidate)

        return objective

    search(space, record(undisturbed), 16, 3, tmp_path / "undisturbed", sampler)
    for interrupted_at in (0, 2, 9, 14):
        continued: list[Candidate] = []
        with pytest.raises(KeyboardInterrupt):
            search(space, record(continued, interrupted_at), 16, 3, tmp_path / str(interrupted_at), sampler)
        search(space, record(continued), 16, 3, tmp_path / str(interrupted_at), sampler)
        assert continued == undisturbed


def test_trials_are_judged_four_at_a_time(subsets: SubsetFamily, tmp_path: Path) -> None:
    """Every one is recorded with its own losses, one that cannot be met is replaced, and a killed search resumes."""
    space, groups = SearchSpace(subsets, 4, 3, Budget(0.2)), []

    def refuse() -> Iterator[Tensor]:
        raise BudgetError("too much")
        yield

    def together(candidates: Sequence[Candidate]) -> list[Iterable[Tensor]]:
        if len(groups) == 3 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            raise KeyboardInterrupt
        groups.append([each.model_dump_json() for each in candidates])
        judged: list[Iterable[Tensor]] = [a_smooth_objective(each) for each in candidates]
        return [judged[0], refuse(), *judged[2:]] if len(groups) == 6 else judged

    whole = Search(space, a_smooth_objective, 30, 3, place_in(tmp_path / "run"), judge_together=together)
    with pytest.raises(KeyboardInterrupt):
        whole.run()
    whole.run()
    points = whole.result().points
    assert [len(group) for group in groups] == [4, 4, 4, 4, 4, 4, 4, 3]
    assert len(set(groups[5])) == 4
    assert len(points) == 30
    assert sorted(point.loss for point in points) == sorted(
        a_smooth_loss(Candidate.model_validate_json(each))
        for number, group in enumerate(groups)
        for each in (group if number != 5 else [group[0], *group[2:]])
    )


def test_a_trial_that_is_not_finite_is_not_the_best(subsets: SubsetFamily, tmp_path: Path) -> None:
    losses = itertools.chain([float("inf"), 3.0, float("inf"), 2.5], itertools.repeat(float("inf")))
    result = search(
        SearchSpace(subsets, 4, 0, Budget(0.2)), lambda _: [torch.tensor([next(losses)])], 12, 0, tmp_path / "run"
    )
    assert result.best_loss == 2.5


@pytest.mark.parametrize("alignment", ["data", "paper"])
@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_only_what_is_searched_changes(alignment: str, sampler: str, subsets: SubsetFamily, tmp_path: Path) -> None:
    for searched in ("joint", "calibration", "metric"):
        seen: list[Candidate] = []
        space = SearchSpace(subsets, 4, 0, Budget(0.2), alignment=alignment, searched=searched)

        def objective(candidate: Candidate, seen: list[Candidate] = seen) -> list[Tensor]:
            seen.append(candidate)
            return a_smooth_objective(candidate)

        search(space, objective, 14, 0, tmp_path / searched, sampler)
        points = {candidate.point.model_dump_json() for candidate in seen[4:]}
        samples = {candidate.samples for candidate in seen[4:]}
        assert (len(points) > 1) == (searched != "calibration")
        assert (len(samples) > 1) == (searched != "metric")


def test_a_subset_without_tilt_represents_the_pool(subsets: SubsetFamily) -> None:
    """Nearer to the mean of the pool than nearly all subsets of its size, counted out."""

    def distance(chosen: tuple[int, ...]) -> float:
        rows = list(chosen)
        return float(subsets.gram[rows][:, rows].mean() - 2 * subsets.gram[rows].mean() + subsets.gram.mean())

    own = distance(subsets.choose(4, {}))
    others = [distance(chosen) for chosen in itertools.combinations(range(12), 4)]
    assert sum(other < own for other in others) / len(others) < 0.02


def test_a_tilt_leans_towards_its_feature(subsets: SubsetFamily) -> None:
    means = []
    for tilt in (-3.0, 0.0, 3.0):
        chosen = list(subsets.choose(4, {"loss": tilt}))
        assert len(set(chosen)) == 4
        means.append(float(subsets.features[chosen, 0].mean()))
    assert means[0] < means[1] < means[2]


def test_the_family_of_a_measured_pool(model: PreTrainedModel, windows: Tensor) -> None:
    structure = build_structure(model)
    statistics = measure(model, structure, windows)
    counts = [block.groups - (block.layer == 1 and block.kind == "channels") for block in structure.blocks]
    family = build_subset_family(statistics, structure, counts)
    torch.testing.assert_close(family.features.mean(0), torch.zeros(4).double())
    torch.testing.assert_close(family.features.square().mean(0), torch.ones(4).double())
    assert family.features[:, 0].argmax() == statistics.loss.argmax()
    # Blocks that stay whole do not count.
    elsewhere = structure.block_of_vector != 3
    changed = replace(
        statistics,
        element_absolute=torch.where(
            elsewhere, torch.rand_like(statistics.element_absolute), statistics.element_absolute
        ),
    )
    assert torch.equal(build_subset_family(changed, structure, counts).gram, family.gram)


def test_pools_of_any_size(model: PreTrainedModel, windows: Tensor) -> None:
    structure = build_structure(model)
    statistics = measure(model, structure, windows)
    counts = [block.groups - 1 for block in structure.blocks]
    for size in (1, 2, 3):
        family = build_subset_family(statistics.select(range(size)), structure, counts)
        assert family.choose(size, {"loss": 0.5}) == tuple(range(size))


def windowed(candidate: Candidate, windows: range, asked: list[int] | None = None) -> Iterator[Tensor]:
    """Batches of 8 windows whose own losses differ far more than candidates do."""
    for start in windows[::8]:
        if asked is not None:
            asked.append(start)
        own = torch.sin(torch.arange(start, start + 8).double()) * 3
        noise = torch.rand(8, generator=torch.Generator().manual_seed(start + sum(candidate.samples))).double() / 100
        yield 5 + own + noise + a_smooth_loss(candidate)


def test_bad_trials_are_stopped_and_the_best_is_found_all_the_same(subsets: SubsetFamily, tmp_path: Path) -> None:
    space = SearchSpace(subsets, 4, 0, Budget(0.2))
    asked: list[int] = []
    result = search(space, lambda candidate: windowed(candidate, range(64), asked), 30, 0, tmp_path / "run")
    assert result.stopped_early > 10
    assert len(asked) < 8 * 30 - 5 * result.stopped_early
    # No candidate that was stopped is better.
    everything: list[float] = []

    def watched(candidate: Candidate) -> Iterator[Tensor]:
        everything.append(float(torch.cat(list(windowed(candidate, range(64)))).mean()))
        return windowed(candidate, range(64))

    search(space, watched, 30, 0, tmp_path / "again")
    assert result.best_loss <= min(everything) + 1e-9


def test_batches_of_another_size_stop_the_same_trials(subsets: SubsetFamily, tmp_path: Path) -> None:
    """As on a GPU, which computes more windows at once than a CPU."""
    space, results = SearchSpace(subsets, 4, 0, Budget(0.2)), []

    def judge(candidate: Candidate, size: int) -> Iterator[Tensor]:
        yield from torch.cat(list(windowed(candidate, range(64)))).split(size)

    for size in (4, 5, 64):
        results.append(search(space, partial(judge, size=size), 16, 0, tmp_path / str(size)))
    assert results[0].stopped_early > 5
    assert results[1:] == [results[0]] * 2


def test_the_best_few_are_judged_on_further_windows(subsets: SubsetFamily, tmp_path: Path) -> None:
    """The loss of each is then the mean over all windows; a candidate that does badly on the further ones loses."""
    space = SearchSpace(subsets, 4, 0, Budget(0.2))
    plain = search(space, lambda candidate: windowed(candidate, range(16)), 20, 0, tmp_path / "a")
    judged: list[Candidate] = []

    def further(candidate: Candidate) -> Iterator[Tensor]:
        judged.append(candidate)
        for batch in windowed(candidate, range(16, 64)):
            yield batch + (1.0 if candidate == plain.best else 0.0)

    result = search(space, lambda c: windowed(c, range(16)), 20, 0, tmp_path / "b", judge_further=further)
    assert 3 <= len(judged) <= 5
    assert judged[0] == plain.best_fixed
    assert plain.best in judged
    assert result.best != plain.best
    expected = torch.cat(list(windowed(result.best, range(64)))).mean()
    assert abs(result.best_loss - float(expected)) < 1e-9


def searched_with_changed_text(
    subsets: SubsetFamily, folder: Path, losses: Callable[[Candidate, SearchResult], Tensor]
) -> tuple[SearchResult, SearchResult, list[Candidate]]:
    """The result without changed text, with it, and the candidates that were judged on it."""
    space = SearchSpace(subsets, 4, 0, Budget(0.2))
    judged: list[Candidate] = []

    def same(candidate: Candidate) -> Iterator[Tensor]:
        return windowed(candidate, range(16))

    def changed(candidate: Candidate) -> list[Tensor]:
        judged.append(candidate)
        noise = torch.randn(64, generator=torch.Generator().manual_seed(len(judged)), dtype=torch.float64)
        return [0.1 * noise[: len(losses(candidate, plain))] + losses(candidate, plain)]

    plain = search(space, same, 20, 0, folder, judge_further=same)
    assert not plain.points[plain.best_trial].starting_point
    assert plain.refused == ()
    return plain, search(space, same, 20, 0, folder, judge_further=same, judge_changed=changed), judged


@pytest.mark.parametrize(
    ("rise", "windows", "is_refused"),
    [(1.0, 64, True), (1.0, 4, False), (0.001, 64, False), (-1.0, 64, False), (math.inf, 64, True)],
)
def test_a_finalist_that_loses_in_changed_text_is_refused(
    rise: float, windows: int, is_refused: bool, subsets: SubsetFamily, tmp_path: Path
) -> None:
    def losses(candidate: Candidate, plain: SearchResult) -> Tensor:
        return torch.full((windows,), rise if candidate == plain.best else 0.0, dtype=torch.float64)

    plain, result, judged = searched_with_changed_text(subsets, tmp_path, losses)
    assert result.refused == ((plain.best_trial,) if is_refused else ())
    assert (result.best != plain.best) == is_refused
    assert result.best_loss >= plain.best_loss
    # The best starting point and those that are ahead of it, each once.
    assert len(judged) == len({candidate.model_dump_json() for candidate in judged}) <= 4


def test_if_all_finalists_are_refused_the_best_starting_point_is_chosen(subsets: SubsetFamily, tmp_path: Path) -> None:
    of_starts: set[str] = set()

    def losses(candidate: Candidate, plain: SearchResult) -> Tensor:
        of_starts.update(step.candidate.model_dump_json() for step in plain.steps if step.name != "searched")
        return torch.full((64,), float(candidate.model_dump_json() not in of_starts), dtype=torch.float64)

    _, result, judged = searched_with_changed_text(subsets, tmp_path, losses)
    assert len(result.refused) == len(judged) - 1 > 0
    assert not any(result.points[number].starting_point for number in result.refused)
    assert result.points[result.best_trial].starting_point


def test_a_starting_point_that_is_broken_in_changed_text_refuses_nothing(subsets: SubsetFamily, tmp_path: Path) -> None:
    plain, result, _ = searched_with_changed_text(
        subsets, tmp_path, lambda candidate, plain: torch.full((64,), math.inf, dtype=torch.float64)
    )
    assert (result.best, result.refused) == (plain.best, ())


def test_a_database_that_others_read_opens_at_once(tmp_path: Path) -> None:
    """In the mode that it has: only who is alone with it can change that."""
    path = tmp_path / "study.db"
    reader, other = sqlite3.connect(path, isolation_level=None), sqlite3.connect(path)
    for statement in ("CREATE TABLE trials (number)", "BEGIN", "SELECT * FROM trials"):
        reader.execute(statement)
    begun = time.monotonic()
    for mode in ("delete", "wal"):
        _place._write_ahead(other, None)
        assert other.execute("PRAGMA journal_mode").fetchone() == (mode,)
        if reader.in_transaction:
            reader.execute("END")
    # Who waited would wait for a minute.
    assert time.monotonic() - begun < 30
    reader.close()
    other.close()


def test_budgets_that_cannot_be_met_are_proposed_again_and_do_not_count(subsets: SubsetFamily, tmp_path: Path) -> None:
    seen: list[Candidate] = []

    def refuse_most(candidate: Candidate) -> list[Tensor]:
        if candidate.budget.protect_first > 2 and candidate.budget.tilt != 0:
            raise BudgetError("cannot be reached")
        seen.append(candidate)
        return a_smooth_objective(candidate)

    space = SearchSpace(subsets, 4, 0, Budget(0.2), "extended")
    result = search(space, refuse_most, 24, 0, tmp_path / "run")
    assert len(result.points) == len(seen) == 24
    assert len({candidate.model_dump_json() for candidate in seen[10:]}) == 14
    assert result.best_loss == a_smooth_loss(result.best)
    with place_in(tmp_path / "run").opened() as study:
        assert len(study.get_trials(states=(TrialState.PRUNED,))) > 3
    again = search(space, refuse_most, 24, 0, tmp_path / "run")
    assert again == result


def test_a_space_that_holds_hardly_anything_feasible_comes_to_an_end(subsets: SubsetFamily, tmp_path: Path) -> None:
    def refuse_proposals(candidate: Candidate) -> list[Tensor]:
        if candidate.budget != Budget(0.2):
            raise BudgetError("cannot be reached")
        return a_smooth_objective(candidate)

    result = search(SearchSpace(subsets, 4, 0, Budget(0.2), "extended"), refuse_proposals, 12, 0, tmp_path / "run")
    assert 4 <= len(result.points) < 12


def smollm2_in_shapes() -> Structure:
    return build_structure(
        empty_model(
            LlamaConfig(
                vocab_size=49152,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=30,
                num_attention_heads=9,
                num_key_value_heads=3,
                tie_word_embeddings=True,
            )
        )
    )


@pytest.mark.parametrize("ratio", [0.5, 0.2])
def test_proposals_are_repaired_where_their_budget_cannot_be_met(ratio: float, subsets: SubsetFamily) -> None:
    """At 50 %, almost half of the random proposals could not be met."""
    structure = smollm2_in_shapes()

    def can_meet(candidate: Candidate) -> bool:
        budget = replace(candidate.budget, ranking="local")
        return meet_budget(structure, None, None, candidate.model_copy(update={"budget": budget})) is not None

    plain = SearchSpace(subsets, 4, 0, Budget(ratio, 0, 0, 1.0, 32), "extended")
    repairing = replace(plain, meet=lambda candidate: candidate if can_meet(candidate) else None)
    pairs = []
    for seed in range(60):
        study = create_study(sampler=RandomSampler(seed))
        pairs.append((plain.suggest(trial := study.ask()), repairing.suggest(study.trials[trial.number])))
    feasible = sum(can_meet(before) for before, _ in pairs)
    assert (feasible < 45) == (ratio == 0.5)
    for before, after in pairs:
        assert can_meet(after)
        if can_meet(before):
            assert after == before
        else:
            assert after.budget.protect_first <= before.budget.protect_first
            assert after.budget.protect_last <= before.budget.protect_last
            assert after.budget.head_share >= before.budget.head_share
    held = replace(
        repairing, fixed_allocation=frozenset({"protect_first", "head_share"}), budget=Budget(0.5, 5, 3, 0.0)
    )
    trial = create_study(sampler=RandomSampler(0)).ask()
    assert (held.suggest(trial).budget.protect_first, held.suggest(trial).budget.head_share) == (5, 0.0)


def test_proposals_meet_a_target_in_place_of_a_ratio(subsets: SubsetFamily) -> None:
    """A KV group has the parameters of 171 channels and costs as much as 600: without attentions, less is removed."""
    structure = smollm2_in_shapes()
    prices = [600.0 if block.kind == "heads" else 1.0 for block in structure.blocks]

    def costs(counts: Sequence[int]) -> float:
        return sum(map(operator.mul, counts, prices))

    dense = costs([block.groups for block in structure.blocks])
    target = Target("target_speed", "1.2", costs, dense / 1.2, dense)

    def meet(candidate: Candidate) -> Candidate | None:
        local = candidate.model_copy(update={"budget": replace(candidate.budget, ranking="local")})
        return meet_budget(structure, None, target, local)

    space = SearchSpace(
        subsets, 4, 0, Budget(0.2, 0, 0, round_to=32), "extended", meet=meet, whole={"attention": tuple(range(5, 13))}
    )
    budgets = [space.suggest(create_study(sampler=RandomSampler(seed)).ask()).budget for seed in range(40)]
    reached = [dense / costs(kept_counts(structure, budget)) for budget in budgets]
    assert all(1.2 <= speed <= 1.2 / 0.99 for speed in reached)
    many = [budget.ratio for budget in budgets if len(budget.without_attention) > 4]
    few = [budget.ratio for budget in budgets if len(budget.without_attention) <= 4]
    assert fmean(many) < fmean(few)


@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
@pytest.mark.parametrize("fixed", [frozenset(), frozenset({"head_share", "protect_first"})])
def test_the_extended_space_searches_all_terms_and_the_allocation(
    layout: str, fixed: frozenset[str], subsets: SubsetFamily, tmp_path: Path
) -> None:
    reference = Budget(0.2, 3, 2, 0.5, layout=layout)
    space = SearchSpace(subsets, 4, 0, reference, "extended", fixed)
    seen: list[Candidate] = []

    def objective(candidate: Candidate) -> list[Tensor]:
        seen.append(candidate)
        return a_smooth_objective(candidate)

    search(space, objective, 30, 0, tmp_path / "run", "random")
    assert all(candidate.budget == reference for candidate in seen[:4])
    assert seen[4].budget == reference
    proposed = seen[len(space.starting_points()) :]
    of_all_models = {name for name, term in TERMS.items() if "routing" not in term.needs}
    assert {
        name for candidate in proposed for name, weight in candidate.point.weights.items() if weight
    } == of_all_models
    budgets = [candidate.budget for candidate in proposed]
    assert {budget.ratio for budget in budgets} == {0.2}
    if fixed:
        assert {(budget.head_share, budget.protect_first) for budget in budgets} == {(0.5, 3)}
    else:
        assert any(budget.head_share == 0 for budget in budgets)
        assert any(budget.head_share > 0 for budget in budgets)
    searched = {
        name: len({getattr(b, name) for b in budgets}) > 1 for name in ("tilt", "bend", "ranking", "protect_last")
    }
    assert set(searched.values()) == {layout == "per-layer"}


def test_a_parameter_that_one_trial_has_is_no_reason_to_warn() -> None:
    """How much of the heads goes is searched only where some go."""
    whole = FloatDistribution(0, 1)
    trials = [create_trial(params={"tilt": n / 120}, distributions={"tilt": whole}, value=n / 120) for n in range(120)]
    both = {"tilt": whole, "head_share": whole}
    trials.append(create_trial(params={"tilt": 0.5, "head_share": 0.5}, distributions=both, value=0.0))
    assert importance_of(trials)["tilt"] > 0
    # The best tenth of fewer trials is a handful, which says nothing.
    assert importance_of(trials[:99]) == {}


def test_starting_points_have_no_part_in_the_importance() -> None:
    """They are the best for what they have in common, and the losses of the others rise with the tilt."""
    kinds = dict.fromkeys(("tilt", "bend"), FloatDistribution(0, 1))
    values = [{"tilt": number / 120, "bend": number * 7 % 120 / 120} for number in range(120)]
    searched = [create_trial(params=each, distributions=kinds, value=each["tilt"]) for each in values]
    starts = [
        create_trial(params={"tilt": n / 40, "bend": 0.5}, distributions=kinds, value=-1.0, user_attrs={START: n})
        for n in range(40)
    ]
    importance = importance_of(searched)
    assert importance["tilt"] > 0.9
    assert importance_of([*starts, *searched]) == importance
    assert importance_of([*starts, *searched[:99]]) == {}


@pytest.mark.parametrize("searched", ["joint", "calibration", "metric"])
@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_no_starting_point_is_tried_twice(searched: str, layout: str, subsets: SubsetFamily) -> None:
    """But for LLM-Pruner's metrics, which are tried whether or not two of them agree."""
    space = SearchSpace(subsets, 4, 0, Budget(0.2, layout=layout), "extended", searched=searched)
    points = [point for point in space.starting_points() if "fixed_metric" not in point.attributes]
    assert len({point.model_dump_json() for point in points}) == len(points) >= 1


def test_a_point_for_high_ratios_is_tried_only_where_heads_go(subsets: SubsetFamily) -> None:
    without, with_heads = (
        SearchSpace(subsets, 4, 0, Budget(0.5, 1, 1, heads), "extended", whole={"attention": (2, 1)})
        for heads in (0.0, 0.5)
    )
    assert len(with_heads.starting_points()) == len(without.starting_points()) + 1
    point = with_heads.starting_points()[-1]
    candidate = with_heads.suggest(FixedTrial(point.parameters | {"coarse_second_order": 0.0}))
    weights = {name: weight for name, weight in candidate.point.weights.items() if weight}
    assert weights == pytest.approx({"elimination": 0.8, "conditional_variance": 0.2})
    assert candidate.budget == Budget(0.5, 2, 0, 0.6, without_attention=(2,))


def test_the_one_fixed_metric_is_finished_though_a_helper_is_at_it(subsets: SubsetFamily, tmp_path: Path) -> None:
    """The helper takes it first and does not come to an end; the search does."""
    space, place = SearchSpace(subsets, 4, 0, Budget(0.2), searched="calibration"), place_in(tmp_path)
    leader = Search(space, a_smooth_objective, 6, 0, place)

    def help_without_end(trial: Trial) -> float:
        trial.set_user_attr("helper", True)
        leader.run()
        trial.set_user_attr("losses", [0.0])
        return 0.0

    with place.opened() as study:
        study.enqueue_trial({}, user_attrs=space.starting_points()[0].attributes | {"start": 0})
        study.optimize(help_without_end, n_trials=1)
    result = leader.result()
    assert result.best_fixed_name == "param_first"
    assert result.best_loss <= result.best_fixed_loss
    assert [point.fixed_metric for point in result.points].count("param_first") == 2


def test_a_lost_fixed_metric_is_tried_again_though_a_helper_finishes_the_last_trial(
    subsets: SubsetFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The helper does so just after the leader has looked for what is missing."""
    space, place = SearchSpace(subsets, 4, 0, Budget(0.2), searched="calibration"), place_in(tmp_path)
    leader = Search(space, a_smooth_objective, 6, 0, place)
    queue = Search._queue_starting_points

    def queue_before_others_finish(self: Search, study: optuna.Study) -> bool:
        is_over = queue(self, study)
        if len(study.get_trials(states=(TrialState.COMPLETE,))) == 5:
            study.add_trial(create_trial(value=9.0, user_attrs={LOSSES: [9.0], "helper": True}))
        return is_over

    with place.opened() as study:
        attributes = space.starting_points()[0].attributes | {"start": 0, "helper": True}
        study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs=attributes))
    monkeypatch.setattr(Search, "_queue_starting_points", queue_before_others_finish)
    leader.run()
    with place.opened() as study:
        finished = study.get_trials(states=(TrialState.COMPLETE,))
    assert [trial.user_attrs.get("fixed_metric") for trial in finished].count("param_first") == 1


def test_whose_trial_was_given_to_another_goes_on(subsets: SubsetFamily, tmp_path: Path) -> None:
    """A machine that slept looks dead to the others."""
    space, place = SearchSpace(subsets, 4, 0, Budget(0.2)), place_in(tmp_path)
    robbed: list[int] = []

    def rob(candidate: Candidate) -> list[Tensor]:
        with place.opened() as study:
            (running,) = study.get_trials(states=(TrialState.RUNNING,))
            if len(robbed) < 2:
                robbed.append(running.number)
                study.tell(running.number, state=TrialState.FAIL)
        return a_smooth_objective(candidate)

    robbed_search = Search(space, rob, 8, 0, place)
    robbed_search.run()
    assert robbed_search.result() == search(space, a_smooth_objective, 8, 0, tmp_path / "undisturbed")
    assert len(robbed) == 2


def test_a_trial_that_two_processes_took_is_finished_once(subsets: SubsetFamily, tmp_path: Path) -> None:
    """SQLite lets two processes take the same queued trial; the slower one finds it finished."""
    space, place = SearchSpace(subsets, 4, 0, Budget(0.2)), place_in(tmp_path)
    taken: list[int] = []

    def finish_elsewhere(candidate: Candidate) -> list[Tensor]:
        losses = a_smooth_objective(candidate)
        if not taken:
            with place.opened() as study:
                (running,) = study.get_trials(states=(TrialState.RUNNING,))
                taken.append(running.number)
                study._storage.set_trial_user_attr(running._trial_id, LOSSES, torch.cat(losses).tolist())
                study.tell(running.number, float(torch.cat(losses).mean()))
        return losses

    own = Search(space, finish_elsewhere, 6, 0, place)
    own.run()
    assert taken == [0]
    with place.opened() as study:
        assert [trial.state for trial in study.get_trials()] == [TrialState.COMPLETE] * 6


class KilledError(BaseException):
    """Leaves everything as a kill does: Optuna does not catch it."""


def test_a_search_killed_between_any_two_statements_ends_as_an_undisturbed_one(
    subsets: SubsetFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_study, "_SECONDS_TO_MARK", 0.0)
    space = SearchSpace(subsets, 4, 0, Budget(0.2))
    executed, kill_at = 0, 0

    def count(*_: object) -> None:
        nonlocal executed
        if threading.current_thread() is threading.main_thread():
            executed += 1
            if executed == kill_at:
                raise KilledError

    event.listen(Engine, "before_cursor_execute", count)
    try:
        undisturbed = search(space, a_smooth_objective, 10, 0, tmp_path / "undisturbed")
        moments = random.Random(0).sample(range(100, executed), 4)
        for kill_at in moments:
            executed = 0
            # Optuna meets some with a bug of its own.
            with pytest.raises((KilledError, UnboundLocalError)):
                search(space, a_smooth_objective, 10, 0, tmp_path / str(kill_at))
            assert search(space, a_smooth_objective, 10, 0, tmp_path / str(kill_at)) == undisturbed
    finally:
        event.remove(Engine, "before_cursor_execute", count)


@pytest.mark.parametrize("is_helper", [True, False])
def test_a_running_trial_is_kept_if_a_helper_marks_it_late(
    is_helper: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = itertools.count(1)
    with place_in(tmp_path).opened() as study, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Heartbeat of storage")
        trial = study.ask()

        def mark_in_the_end(seconds: float) -> None:
            if next(looks) == 20:
                trial.set_user_attr("helper", is_helper)

        monkeypatch.setattr(time, "sleep", mark_in_the_end)
        monkeypatch.setattr(_study, "_SECONDS_TO_MARK", math.inf)
        _study._discard_trials_of_a_killed_leader(study)
        assert next(looks) > 20
        assert study.trials[0].state == (TrialState.RUNNING if is_helper else TrialState.FAIL)


def start(context: BaseContext, *arguments: object) -> BaseProcess:
    process = context.Process(target=work, args=arguments)
    process.start()
    return process


def work(
    space: SearchSpace,
    place: StudyPlace,
    trials: int,
    killed_in: int | None,
    helps: bool = False,
    together: Barrier | None = None,
) -> None:
    """In a process of its own."""
    begun = 0

    def judge(candidate: Candidate) -> Iterator[Tensor]:
        nonlocal begun
        begun += 1
        if begun == killed_in:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.1)
        yield from windowed(candidate, range(16))

    own = Search(space, judge, trials, 0, place)
    if together:
        together.wait()
    own.help() if helps else own.run()


def test_a_search_killed_in_a_trial_ends_as_an_undisturbed_one(subsets: SubsetFamily, tmp_path: Path) -> None:
    space, context = SearchSpace(subsets, 4, 0, Budget(0.2), "extended"), fast_starts()
    place = place_in(tmp_path / "killed")
    for killed_in in (4, 9):
        process = start(context, space, place, 14, killed_in)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    with place.opened() as study:
        assert [trial.state for trial in study.get_trials()].count(TrialState.RUNNING) == 1

    def judge(candidate: Candidate) -> Iterator[Tensor]:
        return windowed(candidate, range(16))

    result = search(space, judge, 14, 0, tmp_path / "killed")
    assert result == search(space, judge, 14, 0, tmp_path / "undisturbed")
    with place.opened() as study:
        assert not study.get_trials(states=(TrialState.RUNNING, TrialState.WAITING))


def test_a_killed_helper_costs_its_trial_alone(subsets: SubsetFamily, tmp_path: Path) -> None:
    space, context, place = (
        SearchSpace(subsets, 4, 0, Budget(0.2), "extended"),
        fast_starts(),
        place_in(tmp_path),
    )
    together = context.Barrier(3)
    processes = [
        start(context, space, place, 40, killed_in, helps, together)
        for killed_in, helps in ((None, False), (2, True), (None, True))
    ]
    for process in processes:
        process.join()
    leader, killed, helper = processes
    assert (leader.exitcode, killed.exitcode, helper.exitcode) == (0, -signal.SIGKILL, 0)
    with place.opened() as study:
        trials = study.get_trials()
    states = [trial.state for trial in trials]
    assert 40 <= states.count(TrialState.COMPLETE) <= 42
    assert states.count(TrialState.FAIL) + states.count(TrialState.RUNNING) <= 1
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert 1 < sum(trial.user_attrs["helper"] for trial in finished) < 40
    starts = sorted(trial.user_attrs["start"] for trial in finished if "start" in trial.user_attrs)
    assert set(starts) >= set(range(4))
    assert len(starts) >= 9


def test_sixteen_processes_lose_and_double_nothing_though_two_are_killed(subsets: SubsetFamily, tmp_path: Path) -> None:
    """On one SQLite file."""
    space, place = SearchSpace(subsets, 4, 0, Budget(0.2), "extended"), place_in(tmp_path)
    context, wanted = fast_starts(), 48
    together = context.Barrier(16)
    roles = [(None, False), (1, True), (1, True), *[(None, True)] * 13]
    processes = [start(context, space, place, wanted, killed_in, helps, together) for killed_in, helps in roles]
    for process in processes:
        process.join()
    killed = [index for index, process in enumerate(processes) if process.exitcode == -signal.SIGKILL]
    assert killed == [1, 2]
    assert not any(process.exitcode for index, process in enumerate(processes) if index not in killed)
    with place.opened() as study:
        trials = study.get_trials()
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    # Others may have begun one more while the last was being finished. Lost are those of the killed alone.
    assert wanted <= len(finished) < wanted + 14
    assert len(trials) - len(finished) <= 2
    starts = [trial.user_attrs["start"] for trial in finished if "start" in trial.user_attrs]
    assert len(set(starts)) == len(starts)
    # Nobody waits until the killed count as dead. Only the fixed metrics that they were trying are tried again.
    lost = {trial.user_attrs.get("start") for trial in trials if trial.state != TrialState.COMPLETE}
    fixed = {number for number, start in enumerate(space.starting_points()) if FIXED_METRIC in start.attributes}
    assert set(range(len(space.starting_points()))) - set(starts) <= lost - fixed
    searched = [tuple(trial.params.items()) for trial in finished if "start" not in trial.user_attrs]
    assert len(set(searched)) == len(searched)
    assert all(len(trial.user_attrs[LOSSES]) in (8, 16) or STOPPED in trial.user_attrs for trial in finished)


def test_a_lost_starting_point_comes_before_those_after_it(subsets: SubsetFamily, tmp_path: Path) -> None:
    """Its helper is dead for longer than it may be silent."""
    space, place = SearchSpace(subsets, 4, 0, Budget(0.2), "extended"), place_in(tmp_path)
    own = Search(space, a_smooth_objective, 12, 0, place)
    with place.opened() as study:
        own._queue_starting_points(study)

        def die(trial: Trial) -> float:
            trial.set_user_attr("helper", True)
            raise KilledError

        with pytest.raises(KilledError):
            study.optimize(die, n_trials=1)
        with study._storage._backend.engine.begin() as connection:
            connection.execute(text("UPDATE trial_heartbeats SET heartbeat = '2020-01-01 00:00:00'"))
    own.run()
    with place.opened() as study:
        finished = study.get_trials(states=(TrialState.COMPLETE,))
    # The first is found to be lost when the second is begun.
    assert [trial.user_attrs.get("start") for trial in finished[:4]] == [1, 0, 2, 3]


def test_a_result_is_the_same_when_read_again(subsets: SubsetFamily, tmp_path: Path) -> None:
    losses = itertools.chain([float("inf")] * 4, itertools.count(3.0))
    space = SearchSpace(subsets, 4, 0, Budget(0.2), "extended")
    result = search(space, lambda _: [torch.tensor([next(losses)])], 24, 0, tmp_path)
    assert SearchResult.model_validate_json(result.model_dump_json()) == result
    assert (result.ratio, result.trials, result.best_loss, result.best_fixed_loss) == (0.2, 24, 3.0, float("inf"))
    assert [point.loss for point in result.points[:5]] == [None] * 4 + [3.0]
    history = read_history(place_in(tmp_path))
    assert (history.points, history.ranges, history.importance) == (result.points, result.ranges, result.importance)
    assert history.searched == 24 - result.starting_points == 14
    assert result.advice is None
    assert read_history(StudyPlace(sqlite_url(tmp_path / "none.db"), "study")) == History()
    assert not (tmp_path / "none.db").exists()


def test_steps_are_compared_on_further_windows(subsets: SubsetFamily, tmp_path: Path) -> None:
    space = SearchSpace(subsets, 4, 0, Budget(0.2), "extended")

    def further(candidate: Candidate) -> list[Tensor]:
        return [torch.tensor([2.0, 4.0]) * a_smooth_loss(candidate), torch.tensor([3.0]) * a_smooth_loss(candidate)]

    result = search(space, a_smooth_objective, 20, 0, tmp_path, judge_further=further)
    fixed, start, searched = result.steps
    assert [step.name for step in result.steps] == ["fixed metric", "starting point", "searched"]
    assert result.points[fixed.trial].fixed_metric == result.best_fixed_name
    assert result.points[start.trial].starting_point
    assert not result.points[start.trial].fixed_metric
    assert not result.points[searched.trial].starting_point
    assert fixed.gain is None
    for before, step in itertools.pairwise(result.steps):
        own, earlier = (result.points[one.trial].loss for one in (step, before))
        assert step.loss == pytest.approx(3 * own)
        assert step.gain == pytest.approx(3 * (earlier - own))
        assert step.standard_error == pytest.approx(abs(earlier - own) / math.sqrt(3))
    assert all((step.windows, step.is_held_out) == (3, True) for step in result.steps)
    alone = search(space, a_smooth_objective, 4, 0, tmp_path / "none").steps[0]
    assert (alone.loss, alone.is_held_out) == (result.points[fixed.trial].loss, False)


def test_what_breaks_on_further_windows_is_no_step(subsets: SubsetFamily, tmp_path: Path) -> None:
    space = SearchSpace(subsets, 4, 0, Budget(0.2), "extended")

    def further(candidate: Candidate) -> list[Tensor]:
        broken = list(candidate.samples) == space.first_draw
        return [torch.tensor([a_smooth_loss(candidate), math.inf if broken else 1.0])]

    result = search(space, a_smooth_objective, 24, 0, tmp_path, judge_further=further)
    assert [step.name for step in result.steps] == ["starting point", "searched"]
    assert result.best_fixed_loss == math.inf


def test_a_search_of_starting_points_alone_says_so(subsets: SubsetFamily, tmp_path: Path) -> None:
    result = search(SearchSpace(subsets, 4, 0, Budget(0.2), "extended"), a_smooth_objective, 9, 0, tmp_path)
    assert result.advice == "nothing was searched: all 9 trials are starting points; raise `trials` above 10"


def test_nothing_finite_is_no_result(subsets: SubsetFamily, tmp_path: Path) -> None:
    with pytest.raises(AdaPrunerError, match="none of the 6 trials has a finite loss: lower `ratio`"):
        search(SearchSpace(subsets, 4, 0, Budget(0.2)), lambda _: [torch.tensor([torch.nan])], 6, 0, tmp_path)


SECRET = "hush%2Fhush"


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://nobody:{SECRET}@127.0.0.1:1/none",
        f"postgresql://nobody@127.0.0.1:1/none?password={SECRET}",
        f"postgresql://nobody@127.0.0.1:1/none?sslmode={SECRET}",
        f"postgresql://nobody:1/{SECRET}@127.0.0.1/none",
        f"sqlite:///missing/trials.db?token={SECRET}",
        f"nosuch://nobody:{SECRET}@here",
        f"{SECRET}",
    ],
)
def test_a_database_that_cannot_be_opened_is_refused_without_its_secrets(url: str) -> None:
    place = StudyPlace(url, "study")
    with pytest.raises(AdaPrunerError) as error:
        place.check()
    said = str(error.value)
    assert "hush" not in said
    assert "storage" in said or "database" in said


@pytest.mark.parametrize("name", ["plain", "with {braces} and % and #"])
def test_a_folder_of_any_name_holds_a_database(name: str, tmp_path: Path) -> None:
    place = place_in(tmp_path / name)
    with place.opened():
        assert (tmp_path / name / "study.db").is_file()
    with pytest.raises(AdaPrunerError, match="question mark"):
        sqlite_url(tmp_path / "what?" / "study.db")


def test_optuna_speaks_as_before(subsets: SubsetFamily, tmp_path: Path) -> None:
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    try:
        search(SearchSpace(subsets, 4, 0, Budget(0.2)), a_smooth_objective, 5, 0, tmp_path)
        assert optuna.logging.get_verbosity() == optuna.logging.DEBUG
    finally:
        optuna.logging.set_verbosity(optuna.logging.INFO)


def test_a_registered_term_is_searched(
    model: PreTrainedModel, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One joins a family, one begins a family; what was there before is proposed as before."""
    structure = build_structure(model)
    errors = removal_errors(model, structure, dict(measure_moments(model, structure, windows)))
    statistics = replace(measure(model, structure, windows), **errors)
    family = build_subset_family(statistics, structure, [block.groups - 1 for block in structure.blocks])
    space = SearchSpace(
        family, 3, 0, Budget(0.05, 0, 0), "extended", meet=partial(meet_budget, structure, statistics, None)
    )
    before = space.starting_points()
    assert needed_statistics("extended", "all") == {"taylor", "elements", "inputs", "moments", "eliminations"}
    monkeypatch.setitem(TERMS, "energy", None)
    monkeypatch.setitem(TERMS, "size", None)
    del TERMS["energy"], TERMS["size"]

    @register_term(unit="inputs", family="activation", needs=["inputs"], share=0.5)
    def energy(statistics: Statistics) -> Tensor:
        return statistics.input_squared.mean(0) * statistics.column_squared

    @register_term(unit="inputs", family="magnitude", needs=["weights"])
    def size(statistics: Statistics) -> Tensor:
        return statistics.column_absolute

    assert needed_statistics("extended", "vector-wise") == {"taylor", "inputs", "moments", "eliminations", "weights"}
    assert needed_statistics("paper", "vector-wise") == {"taylor"}
    after = space.starting_points()
    assert all(new.parameters.items() >= old.parameters.items() for old, new in zip(before, after, strict=True))
    assert {(point.parameters["energy"], point.parameters["magnitude"]) for point in after[4:]} == {(0.5, 0.0)}
    seen: list[Candidate] = []

    def objective(candidate: Candidate) -> list[Tensor]:
        seen.append(candidate)
        scores = score_groups(statistics.select(candidate.samples), structure, candidate.point)
        weights = candidate.point.weights
        others = {name: weight for name, weight in weights.items() if name not in ("energy", "size")}
        if any(others.values()) and "size" in weights:
            without = score_groups(
                statistics.select(candidate.samples), structure, candidate.point.model_copy(update={"weights": others})
            )
            assert torch.equal(scores, without) == (weights["energy"] == weights["size"] == 0)
        plan_candidate(structure, statistics, candidate)
        return a_smooth_objective(candidate)

    result = search(space, objective, 24, 0, tmp_path)
    proposed = [candidate.point.weights for candidate in seen[10:]]
    assert {"energy", "magnitude"} <= result.ranges.keys()
    for name in ("energy", "size"):
        assert len({weights[name] for weights in proposed}) > 10
