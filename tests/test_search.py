"""The search with objectives that need no model, and the subsets against brute force."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import optuna
import pytest
import torch
from optuna import create_study
from optuna.samplers import RandomSampler
from optuna.trial import FixedTrial, TrialState
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.base.errors import AdaPrunerError
from adapruner.importance import TERMS, needs_moments, register_term, score_groups
from adapruner.measurement.moments import measure_moments, removal_errors
from adapruner.measurement.taylor import Statistics, measure
from adapruner.options import PruneOptions
from adapruner.search.judging import plan_candidate
from adapruner.search.space import (
    FEATURES,
    Candidate,
    ExtendedSpace,
    PaperSpace,
    SearchSpace,
    SubsetFamily,
    build_subset_family,
)
from adapruner.search.study import Search, SearchResult, StudyFile
from adapruner.structure.build import build_structure


def study_in(folder: Path) -> StudyFile:
    folder.mkdir(exist_ok=True)
    return StudyFile(folder / "study.jsonl", "study")


def search(space: SearchSpace, judge: object, trials: int, seed: int, folder: Path) -> SearchResult:
    """The whole search."""
    asked = Search(space, judge, trials, seed, study_in(folder))
    asked.run()
    return asked.result()


@pytest.fixture
def subsets():
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


def test_never_worse_than_the_fixed_metrics_and_better_with_trials(subsets, tmp_path):
    space = PaperSpace(subsets, 4, 0)
    result = search(space, a_smooth_objective, 24, 0, tmp_path / "run")
    assert result.best_loss < result.best_fixed_loss
    assert result.best_loss == a_smooth_loss(result.best)
    assert result.best_fixed_name in {"vectorize", "param_first", "param_second", "param_mix"}
    few = search(space, a_smooth_objective, 7, 0, tmp_path / "few")
    assert result.best_loss < few.best_loss


def test_a_search_killed_at_any_moment_proposes_what_an_undisturbed_one_does(subsets, tmp_path):
    """A kill leaves a part of the file."""
    space, study = ExtendedSpace(subsets, 4, 3), study_in(tmp_path)

    def judge(candidate: Candidate) -> Iterator[Tensor]:
        yield from windowed(candidate, range(16))

    asked = Search(space, judge, 26, 3, study)
    asked.run()
    undisturbed, written = asked.result(), study.path.read_bytes()
    states, attributes = zip(*((trial.state, trial.user_attrs) for trial in study.opened().trials), strict=True)
    assert states.count(TrialState.COMPLETE) == 26
    for share in (0.0, 0.02, 0.3, 0.5, 0.71, 0.9, 0.999):
        study.path.write_bytes(written[: round(share * len(written))])
        Path(f"{study.path}.lock").touch()
        asked.run()
        assert asked.result() == undisturbed
        assert [trial.user_attrs for trial in study.opened().trials] == list(attributes)


def test_a_trial_that_is_not_finite_is_not_the_best(subsets, tmp_path):
    losses = itertools.chain([float("inf"), 3.0, float("inf"), 2.5], itertools.repeat(float("inf")))
    result = search(PaperSpace(subsets, 4, 0), lambda _: [torch.tensor([next(losses)])], 12, 0, tmp_path / "run")
    assert result.best_loss == 2.5


@pytest.mark.parametrize("alignment", ["data", "paper"])
def test_only_what_is_searched_changes(alignment, subsets, tmp_path):
    for searched in ("joint", "calibration", "metric"):
        seen: list[Candidate] = []
        space = PaperSpace(subsets, 4, 0, alignment=alignment, searched=searched)

        def objective(candidate: Candidate, seen: list[Candidate] = seen) -> list[Tensor]:
            seen.append(candidate)
            return a_smooth_objective(candidate)

        search(space, objective, 14, 0, tmp_path / searched)
        points = {candidate.point.model_dump_json() for candidate in seen[4:]}
        samples = {candidate.samples for candidate in seen[4:]}
        assert (len(points) > 1) == (searched != "calibration")
        assert (len(samples) > 1) == (searched != "metric")


def test_a_subset_without_tilt_represents_the_pool(subsets):
    """Nearer to the mean of the pool than nearly all subsets of its size, counted out."""

    def distance(chosen: tuple[int, ...]) -> float:
        rows = list(chosen)
        return float(subsets.gram[rows][:, rows].mean() - 2 * subsets.gram[rows].mean() + subsets.gram.mean())

    own = distance(subsets.choose(4, {}))
    others = [distance(chosen) for chosen in itertools.combinations(range(12), 4)]
    assert sum(other < own for other in others) / len(others) < 0.02


def test_a_tilt_leans_towards_its_feature(subsets):
    means = []
    for tilt in (-3.0, 0.0, 3.0):
        chosen = list(subsets.choose(4, {"loss": tilt}))
        assert len(set(chosen)) == 4
        means.append(float(subsets.features[chosen, 0].mean()))
    assert means[0] < means[1] < means[2]


def test_the_family_of_a_measured_pool(model, windows):
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


def test_pools_of_any_size(model, windows):
    structure = build_structure(model)
    statistics = measure(model, structure, windows)
    counts = [block.groups - 1 for block in structure.blocks]
    for size in (1, 2, 3):
        family = build_subset_family(statistics.select(range(size)), structure, counts)
        assert family.choose(size, {"loss": 0.5}) == tuple(range(size))


def importance_by_autograd(model: PreTrainedModel, windows: Tensor, terms: dict[str, float]) -> list[Tensor]:
    """A mix of the formulas of LLM-Pruner, for the KV groups and channels of every layer of the tiny Llama, from one
    backward pass for each window."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.dim() == 2}
    products: dict[str, list[Tensor]] = {name: [] for name in weights}
    for window in windows:
        gradients = torch.autograd.grad(model(window[None], labels=window[None]).loss, [*weights.values()])
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            products[name].append((weight * gradient).detach().double())
    scores = []
    for layer in range(4):
        rows: dict[str, list[Tensor]] = {"heads": [], "channels": []}
        for name, of_samples in products.items():
            kind = "heads" if "self_attn" in name else "channels"
            if f"layers.{layer}." in name:
                product = torch.stack(of_samples)  # [samples, outputs, inputs]
                vectors = product.mT if name.endswith(("o_proj.weight", "down_proj.weight")) else product
                values = {
                    "coarse_first": vectors.sum(2).mean(0).abs(),
                    "coarse_second": vectors.sum(2).square().mean(0) / 2,
                    "fine_first": vectors.abs().sum(2).mean(0),
                    "fine_second": vectors.square().sum(2).mean(0) / 2,
                }
                mixed = sum((weight * values[term] for term, weight in terms.items()), torch.zeros(()))
                # Three KV groups, each of two query heads; or 24 channels.
                rows[kind].append(mixed.view(3 if kind == "heads" else 24, -1).sum(1))
        scores += [torch.stack(rows["heads"]).sum(0), torch.stack(rows["channels"]).sum(0)]
    return scores


ENDS = {
    "vector": ({"fine": 0, "coarse_second_order": 0, "fine_second_order": 1}, {"coarse_first": 1.0}),
    "vector, second order": ({"fine": 0, "coarse_second_order": 1, "fine_second_order": 0}, {"coarse_second": 1.0}),
    "element": ({"fine": 1, "coarse_second_order": 1, "fine_second_order": 0}, {"fine_first": 1.0}),
    "element, second order": ({"fine": 1, "coarse_second_order": 0, "fine_second_order": 1}, {"fine_second": 1.0}),
    "element, mixed": (
        {"fine": 1, "coarse_second_order": 0, "fine_second_order": 0.5},
        {"fine_first": 1.0, "fine_second": 1e6},
    ),
    "everything": (
        {"fine": 0.75, "coarse_second_order": 0.5, "fine_second_order": 0.5},
        {"coarse_first": 1.0, "coarse_second": 1e6, "fine_first": 3e-3, "fine_second": 3e3},
    ),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("samples", [1, 3])
def test_the_space_of_the_paper_holds_the_formulas_of_llm_pruner(end, samples, model, windows):
    """At the ends of its α, and in between with its factors; the samples that are selected are those that count."""
    structure, (metric, terms) = build_structure(model), ENDS[end]
    counts = [max(1, block.groups // 2) for block in structure.blocks]
    statistics = measure(model, structure, windows)
    space = PaperSpace(build_subset_family(statistics, structure, counts), samples, 0, alignment="paper")
    factors = {"metric.second_order_factor": 1e6, "metric.fine_factor": 1e-3}
    tilt = {f"samples.tilt_{feature}": 0.5 for feature in FEATURES}
    candidate = space.suggest(FixedTrial({f"metric.{name}": value for name, value in metric.items()} | factors | tilt))
    assert len(candidate.samples) == samples
    expected = importance_by_autograd(model, windows[[*candidate.samples]], terms)
    scores = score_groups(statistics.select(candidate.samples), structure, candidate.point)
    plan = plan_candidate(structure, statistics, candidate, counts)
    of_blocks = scores.split([block.groups for block in structure.blocks])
    for own, truth, kept, count in zip(of_blocks, expected, plan.blocks, counts, strict=True):
        torch.testing.assert_close(own / own.mean(), truth / truth.mean(), rtol=2e-3, atol=2e-3)
        assert {*kept.kept} == {*truth.topk(count).indices.tolist()}


def windowed(candidate: Candidate, windows: range, asked: list[int] | None = None) -> Iterator[Tensor]:
    """Batches of 8 windows whose own losses differ far more than candidates do."""
    for start in windows[::8]:
        if asked is not None:
            asked.append(start)
        own = torch.sin(torch.arange(start, start + 8).double()) * 3
        noise = torch.rand(8, generator=torch.Generator().manual_seed(start + sum(candidate.samples))).double() / 100
        yield 5 + own + noise + a_smooth_loss(candidate)


def test_bad_trials_are_stopped_and_the_best_is_found_all_the_same(subsets, tmp_path):
    space = PaperSpace(subsets, 4, 0)
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


def test_batches_of_another_size_stop_the_same_trials(subsets, tmp_path):
    """As on a GPU, which computes more windows at once than a CPU."""
    space, results = PaperSpace(subsets, 4, 0), []

    def judge(candidate: Candidate, size: int) -> Iterator[Tensor]:
        yield from torch.cat(list(windowed(candidate, range(64)))).split(size)

    for size in (4, 5, 64):
        results.append(search(space, partial(judge, size=size), 16, 0, tmp_path / str(size)))
    assert results[0].stopped_early > 5
    assert results[1:] == [results[0]] * 2


def test_the_extended_space_searches_all_terms(subsets):
    space = ExtendedSpace(subsets, 4, 0)
    proposed = [space.suggest(create_study(sampler=RandomSampler(seed)).ask()) for seed in range(20)]
    of_all_models = {name for name, term in TERMS.items() if "routing" not in term.needs}
    assert {
        name for candidate in proposed for name, weight in candidate.point.weights.items() if weight
    } == of_all_models


@pytest.mark.parametrize("searched", ["joint", "calibration", "metric"])
def test_no_starting_point_is_tried_twice(searched, subsets):
    """But for LLM-Pruner's metrics, which are tried whether or not two of them agree."""
    space = ExtendedSpace(subsets, 4, 0, searched=searched)
    points = [point for point in space.starting_points() if "fixed_metric" not in point.attributes]
    assert len({point.model_dump_json() for point in points}) == len(points) >= 1


def test_a_result_is_the_same_when_read_again(subsets, tmp_path):
    losses = itertools.count(3.0)
    space = ExtendedSpace(subsets, 4, 0)

    def judge(candidate: Candidate) -> list[Tensor]:
        is_fixed = list(candidate.samples) == space.first_draw
        return [torch.tensor([math.inf if is_fixed else next(losses)])]

    result = search(space, judge, 24, 0, tmp_path)
    assert SearchResult.model_validate_json(result.model_dump_json()) == result
    assert (result.trials, result.best_loss, result.best_fixed_loss) == (24, 3.0, float("inf"))
    assert [point.loss for point in result.points[4:10]] == [7.0, *[None] * 4, 8.0]
    assert result.searched == 24 - len(space.starting_points()) == 15


def test_no_kind_of_text_pays_for_the_others(subsets, tmp_path):
    """The lowest mean is not chosen where one kind is hit hard."""
    space = ExtendedSpace(subsets, 4, 0)

    def judged(candidate: Candidate) -> list[Tensor]:
        first = list(candidate.samples) == space.first_draw
        losses = [0.0, 0.0, 3.0] if first else [1.2 + a_smooth_loss(candidate)] * 3
        return [torch.tensor(losses, dtype=torch.float64)]

    asked = Search(space, judged, 12, 0, study_in(tmp_path))
    asked.run()
    alike, different = asked.result(["prose"] * 3), asked.result(["prose", "prose", "code"])
    assert list(alike.best.samples) == space.first_draw
    assert alike.best_loss == 1.0
    assert list(different.best.samples) != space.first_draw
    assert different.best_loss > 1.2
    assert different.by_kind == pytest.approx({"prose": different.best_loss, "code": different.best_loss})


def test_only_what_is_there_to_compare_with_is_searched_by_default(subsets, tmp_path):
    for trials, options in ((0, {}), (48, {"space": "paper"}), (48, {"search": "metric"}), (5, {"trials": 5})):
        assert PruneOptions.from_options(**options).default_trials == trials
    for space in ExtendedSpace(subsets, 4, 0), PaperSpace(subsets, 4, 0):
        count = len(space.starting_points())
        result = search(space, a_smooth_objective, count, 0, tmp_path / type(space).__name__)
        assert (len(result.points), result.searched) == (count, 0)
        assert result.best_fixed_name


def test_nothing_finite_is_no_result(subsets, tmp_path):
    with pytest.raises(AdaPrunerError, match="none of the 6 trials has a finite loss: lower `ratio`"):
        search(PaperSpace(subsets, 4, 0), lambda _: [torch.tensor([torch.nan])], 6, 0, tmp_path)


@pytest.mark.parametrize("content", ["no JSON\n\n", "{}\n", '{"op_code": 4}\n', "[1]\n"])
def test_a_damaged_file_is_refused(content, tmp_path):
    study = study_in(tmp_path)
    study.path.write_text(content)
    with pytest.raises(AdaPrunerError, match=r"study.jsonl is damaged \(.*\): remove it"):
        study.opened()


@pytest.mark.parametrize(
    ("attributes", "problem"),
    [
        ({}, "losses: Field required"),
        ({"losses": {"a": 1}}, "losses"),
        ({"losses": ["1"]}, "losses.0"),
        ({"losses": [1.0], "fixed_metric": 3}, "fixed_metric"),
        ({"losses": [1.0], "tuner": "another"}, "tuner"),
        (None, "not finished"),
    ],
)
def test_trials_of_others_are_refused(attributes, problem, tmp_path):
    study = study_in(tmp_path)
    kept = study.opened()
    if attributes is None:
        kept.ask()
    else:
        kept.add_trial(optuna.create_trial(value=1.0, user_attrs=attributes))
    with pytest.raises(AdaPrunerError, match=rf"study.jsonl is damaged \(.*{problem}.*\): remove it"):
        study.opened()


def test_optuna_speaks_as_before(subsets, tmp_path):
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    try:
        search(PaperSpace(subsets, 4, 0), a_smooth_objective, 5, 0, tmp_path)
        assert optuna.logging.get_verbosity() == optuna.logging.DEBUG
    finally:
        optuna.logging.set_verbosity(optuna.logging.INFO)


def test_a_registered_term_is_searched(model, windows, tmp_path, monkeypatch):
    """One joins a family, one begins a family; what was there before is proposed as before."""
    structure = build_structure(model)
    errors = removal_errors(model, structure, dict(measure_moments(model, structure, windows)))
    statistics = replace(measure(model, structure, windows), **errors)
    family = build_subset_family(statistics, structure, [block.groups - 1 for block in structure.blocks])
    space = ExtendedSpace(family, 3, 0)
    before = space.starting_points()
    monkeypatch.setitem(TERMS, "tilt", None)
    monkeypatch.setitem(TERMS, "size", None)
    del TERMS["tilt"], TERMS["size"]

    @register_term(unit="inputs", family="activation", share=0.5)
    def tilt(statistics: Statistics) -> Tensor:
        return statistics.input_squared.mean(0) * statistics.column_squared

    @register_term(unit="inputs", family="magnitude")
    def size(statistics: Statistics) -> Tensor:
        return statistics.column_absolute

    assert needs_moments("none", "extended")
    assert [needs_moments(form, "paper") for form in ("none", "least-squares")] == [False, True]
    after = space.starting_points()
    assert all(new.parameters.items() >= old.parameters.items() for old, new in zip(before, after, strict=True))
    assert {(point.parameters["term.tilt"], point.parameters["family.magnitude"]) for point in after[:4]} == {
        (0.5, 0.0)
    }
    seen: list[Candidate] = []

    def objective(candidate: Candidate) -> list[Tensor]:
        seen.append(candidate)
        scores = score_groups(statistics.select(candidate.samples), structure, candidate.point)
        weights = candidate.point.weights
        others = {name: weight for name, weight in weights.items() if name not in ("tilt", "size")}
        if any(others.values()) and "size" in weights:
            without = score_groups(
                statistics.select(candidate.samples), structure, candidate.point.model_copy(update={"weights": others})
            )
            assert torch.equal(scores, without) == (weights["tilt"] == weights["size"] == 0)
        plan_candidate(structure, statistics, candidate, [block.groups for block in structure.blocks])
        return a_smooth_objective(candidate)

    result = search(space, objective, 24, 0, tmp_path)
    proposed = [candidate.point.weights for candidate in seen[10:]]
    assert all({"term.tilt", "family.magnitude"} <= point.parameters.keys() for point in result.points[10:])
    for name in ("tilt", "size"):
        assert len({weights[name] for weights in proposed}) > 10
