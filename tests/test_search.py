"""The search with objectives that need no model, and the subsets against brute force."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.measurement import Statistics, measure
from adapruner.search import Candidate, SearchSpace, SubsetFamily, build_subset_family, search
from adapruner.structure import build_structure


@pytest.fixture
def subsets() -> SubsetFamily:
    generator = torch.Generator().manual_seed(0)
    importance = torch.rand(12, 30, generator=generator).double()
    features = torch.randn(12, 4, generator=generator).double()
    return SubsetFamily(importance @ importance.T, features)


def a_smooth_objective(candidate: Candidate) -> float:
    """Wants fine second-order terms and the last samples of the pool."""
    weights = candidate.point.weights
    share = weights.get("fine_second", 0.0) / sum(weights.values())
    return (share - 0.7) ** 2 + (1 - sum(candidate.samples) / (4 * 11)) ** 2


def test_never_worse_than_the_fixed_metrics_and_better_with_trials(subsets: SubsetFamily, tmp_path: Path) -> None:
    space = SearchSpace(subsets, 4, seed=0)
    result = search(space, a_smooth_objective, 40, 0, tmp_path / "journal")
    assert result.best.loss < result.best_fixed.loss
    assert result.best.loss == a_smooth_objective(result.best.candidate)
    assert result.best_fixed_name in {"vectorize", "param_first", "param_second", "param_mix"}
    assert result.best_fixed.candidate.samples == tuple(space.first_draw)
    few = search(space, a_smooth_objective, 7, 0, tmp_path / "few")
    assert result.best.loss < few.best.loss


@pytest.mark.parametrize("interrupted_at", [0, 2, 9, 14])
def test_a_killed_search_proposes_what_an_undisturbed_one_does(
    interrupted_at: int, subsets: SubsetFamily, tmp_path: Path
) -> None:
    space = SearchSpace(subsets, 4, seed=3)
    undisturbed: list[Candidate] = []
    continued: list[Candidate] = []

    def record(into: list[Candidate], stop_at: int | None = None) -> object:
        def objective(candidate: Candidate) -> float:
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
    space = SearchSpace(subsets, 4, seed=0)
    undisturbed = search(space, a_smooth_objective, 12, 0, Path("a"))
    search(space, a_smooth_objective, 8, 0, Path("b"))
    Path("b.lock").symlink_to("b")
    with Path("b").open("a") as journal:
        journal.write('{"op_code": 5, "work')
    assert search(space, a_smooth_objective, 12, 0, Path("b")) == undisturbed
    assert search(space, a_smooth_objective, 12, 0, Path("b")) == undisturbed


def test_a_trial_that_is_not_finite_is_not_the_best(subsets: SubsetFamily, tmp_path: Path) -> None:
    losses = itertools.chain([float("inf"), 3.0, float("inf"), 2.5], itertools.repeat(float("inf")))
    result = search(SearchSpace(subsets, 4, seed=0), lambda _: next(losses), 12, 0, tmp_path / "journal")
    assert result.best.loss == 2.5


@pytest.mark.parametrize("alignment", ["data", "paper"])
@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_only_what_is_searched_changes(alignment: str, sampler: str, subsets: SubsetFamily, tmp_path: Path) -> None:
    for searched in ("joint", "calibration", "metric"):
        seen: list[Candidate] = []
        space = SearchSpace(subsets, 4, 0, alignment, searched=searched)

        def objective(candidate: Candidate, seen: list[Candidate] = seen) -> float:
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
    changed = Statistics(
        statistics.taylor,
        torch.where(elsewhere, torch.rand_like(statistics.element_absolute), statistics.element_absolute),
        statistics.element_squared,
        statistics.loss,
    )
    assert torch.equal(build_subset_family(changed, structure, counts).gram, family.gram)


def test_pools_of_any_size(model: PreTrainedModel, windows: Tensor) -> None:
    structure = build_structure(model)
    statistics = measure(model, structure, windows)
    counts = [block.groups - 1 for block in structure.blocks]
    for size in (1, 2, 3):
        family = build_subset_family(statistics.select(range(size)), structure, counts)
        assert family.choose(size, {"loss": 0.5}) == tuple(range(size))
