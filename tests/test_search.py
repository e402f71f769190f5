"""The search with objectives that need no model, and the subsets against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.errors import AdaPrunerError
from adapruner.importance import TERMS
from adapruner.measurement import measure
from adapruner.planning import Budget
from adapruner.search import (
    Candidate,
    Search,
    SearchResult,
    SearchSpace,
    StudyPlace,
    SubsetFamily,
    build_subset_family,
)
from adapruner.search._history import importance_of
from adapruner.structure import build_structure


def search(
    space: SearchSpace,
    judge: object,
    trials: int,
    seed: int,
    folder: Path,
    sampler: str = "tpe",
    judge_further: object = None,
    finalists: int = 3,
) -> SearchResult:
    """The whole search by one process."""
    whole = Search(space, judge, trials, seed, StudyPlace(folder), sampler)
    whole.run()
    return whole.result(judge_further, finalists)


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
    result = search(space, a_smooth_objective, 40, 0, tmp_path / "journal")
    assert result.best.loss < result.best_fixed.loss
    assert result.best.loss == a_smooth_loss(result.best.candidate)
    assert result.best_fixed_name in {"vectorize", "param_first", "param_second", "param_mix"}
    assert result.best_fixed.candidate.samples == tuple(space.first_draw)
    few = search(space, a_smooth_objective, 7, 0, tmp_path / "few")
    assert result.best.loss < few.best.loss


@pytest.mark.parametrize("interrupted_at", [0, 2, 9, 14])
def test_a_killed_search_proposes_what_an_undisturbed_one_does(
    interrupted_at: int, subsets: SubsetFamily, tmp_path: Path
) -> None:
    space = SearchSpace(subsets, 4, 3, Budget(0.2))
    undisturbed: list[Candidate] = []
    continued: list[Candidate] = []

    def record(into: list[Candidate], stop_at: int | None = None) -> object:
        def objective(candidate: Candidate) -> list[Tensor]:
            if len(into) == stop_at:
                raise KeyboardInterrupt
            into.append(candidate)
            return a_smooth_objective(candidate)

        return objective

    search(space, record(undisturbed), 20, 3, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        search(space, record(continued, interrupted_at), 20, 3, tmp_path / "b")
    search(space, record(continued), 20, 3, tmp_path / "b")
    assert continued == undisturbed


def test_what_a_kill_leaves_in_the_journal_does_no_harm(
    subsets: SubsetFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that nobody holds any more, on a relative path, and half a line."""
    monkeypatch.chdir(tmp_path)
    space = SearchSpace(subsets, 4, 0, Budget(0.2))
    undisturbed = search(space, a_smooth_objective, 12, 0, Path("a"))
    search(space, a_smooth_objective, 8, 0, Path("b"))
    Path("b/locks/asking.lock").touch()
    with Path("b/study.journal").open("a") as journal:
        journal.write('{"op_code": 5, "work')
    assert search(space, a_smooth_objective, 12, 0, Path("b")) == undisturbed
    assert search(space, a_smooth_objective, 12, 0, Path("b")) == undisturbed


def test_a_trial_that_is_not_finite_is_not_the_best(subsets: SubsetFamily, tmp_path: Path) -> None:
    losses = itertools.chain([float("inf"), 3.0, float("inf"), 2.5], itertools.repeat(float("inf")))
    result = search(
        SearchSpace(subsets, 4, 0, Budget(0.2)), lambda _: [torch.tensor([next(losses)])], 12, 0, tmp_path / "journal"
    )
    assert result.best.loss == 2.5


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
    result = search(space, lambda candidate: windowed(candidate, range(64), asked), 30, 0, tmp_path / "journal")
    assert result.stopped > 10
    assert len(asked) < 8 * 30 - 5 * result.stopped
    # No candidate that was stopped is better.
    everything: list[float] = []

    def watched(candidate: Candidate) -> Iterator[Tensor]:
        everything.append(float(torch.cat(list(windowed(candidate, range(64)))).mean()))
        return windowed(candidate, range(64))

    search(space, watched, 30, 0, tmp_path / "again")
    assert result.best.loss <= min(everything) + 1e-9


def test_the_best_few_are_judged_on_further_windows(subsets: SubsetFamily, tmp_path: Path) -> None:
    """The loss of each is then the mean over all windows; a candidate that does badly on the further ones loses."""
    space = SearchSpace(subsets, 4, 0, Budget(0.2))
    plain = search(space, lambda candidate: windowed(candidate, range(16)), 20, 0, tmp_path / "a")
    judged: list[Candidate] = []

    def further(candidate: Candidate) -> Iterator[Tensor]:
        judged.append(candidate)
        for batch in windowed(candidate, range(16, 64)):
            yield batch + (1.0 if candidate == plain.best.candidate else 0.0)

    result = search(space, lambda c: windowed(c, range(16)), 20, 0, tmp_path / "b", judge_further=further, finalists=3)
    assert len(judged) == 4
    assert judged[0] == plain.best_fixed.candidate
    assert plain.best.candidate in judged
    assert result.best.candidate != plain.best.candidate
    expected = torch.cat(list(windowed(result.best.candidate, range(64)))).mean()
    assert abs(result.best.loss - float(expected)) < 1e-9


def test_a_budget_that_cannot_be_met_is_a_lost_trial(subsets: SubsetFamily, tmp_path: Path) -> None:
    def refuse_most(candidate: Candidate) -> list[Tensor]:
        if candidate.budget.protect_first > 2 and candidate.budget.tilt != 0:
            raise AdaPrunerError("cannot be reached")
        return a_smooth_objective(candidate)

    space = SearchSpace(subsets, 4, 0, Budget(0.2), "extended")
    result = search(space, refuse_most, 20, 0, tmp_path / "journal")
    assert result.best.loss == a_smooth_loss(result.best.candidate)


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

    search(space, objective, 40, 0, tmp_path / "journal", "random")
    assert all(candidate.budget == reference for candidate in seen[:4])
    assert seen[4].budget == reference
    proposed = seen[len(space.starting_points()) :]
    assert {name for candidate in proposed for name, weight in candidate.point.weights.items() if weight} == set(TERMS)
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
    trials = [create_trial(params={"tilt": n / 30}, distributions={"tilt": whole}, value=n / 30) for n in range(30)]
    both = {"tilt": whole, "head_share": whole}
    trials.append(create_trial(params={"tilt": 0.5, "head_share": 0.5}, distributions=both, value=0.0))
    assert importance_of(trials)["tilt"] > 0


@pytest.mark.parametrize("searched", ["joint", "calibration", "metric"])
@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_no_starting_point_is_tried_twice(searched: str, layout: str, subsets: SubsetFamily) -> None:
    """But for LLM-Pruner's metrics, which are tried whether or not two of them agree."""
    space = SearchSpace(subsets, 4, 0, Budget(0.2, layout=layout), "extended", searched=searched)
    points = [point for point in space.starting_points() if "fixed_metric" not in point.attributes]
    assert len({point.model_dump_json() for point in points}) == len(points) >= 1


def test_the_one_fixed_metric_is_finished_though_a_helper_is_at_it(subsets: SubsetFamily, tmp_path: Path) -> None:
    """The helper takes it first and does not come to an end; the search does."""
    space = SearchSpace(subsets, 4, 0, Budget(0.2), searched="calibration")
    place = StudyPlace(tmp_path)

    def search_beside(candidate: Candidate) -> list[Tensor]:
        leader = Search(space, a_smooth_objective, 6, 0, place)
        leader.run()
        results.append(leader.result())
        return a_smooth_objective(candidate)

    results: list[SearchResult] = []
    Search(space, search_beside, 1, 0, place).help("helper")
    assert results[0].best_fixed_name == "param_first"
    assert results[0].best.loss <= results[0].best_fixed.loss


def test_whose_trial_was_given_to_another_goes_on(subsets: SubsetFamily, tmp_path: Path) -> None:
    """A file system that forgets locks makes a process look dead that is not."""
    space, place = SearchSpace(subsets, 4, 0, Budget(0.2)), StudyPlace(tmp_path)
    robbed: list[int] = []

    def rob(candidate: Candidate) -> list[Tensor]:
        with place.opened() as study:
            (running,) = study.get_trials(states=(TrialState.RUNNING,))
            if len(robbed) < 2:
                robbed.append(running.number)
                study.tell(running.number, state=TrialState.FAIL)
        return a_smooth_objective(candidate)

    search = Search(space, rob, 8, 0, place)
    search.run()
    assert search.result().best_fixed_name in {"vectorize", "param_first", "param_second", "param_mix"}
    assert robbed == [0, 1]
