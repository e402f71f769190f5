"""Levelling of widths against models that are cut and run whole."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.evaluation._losses import log_probabilities, window_losses
from adapruner.importance._metric import LLM_PRUNER_METRICS
from adapruner.measurement._samples import measure
from adapruner.models._generation import continue_texts
from adapruner.models._layers import decoder_layers
from adapruner.models._loading import load_model
from adapruner.models._places import find_model
from adapruner.planning._budget import Budget, Profile, kept_counts
from adapruner.planning._plan import make_plan
from adapruner.search import _levelling
from adapruner.search._levelling import Levelled, MovedHeads, Probe, level
from adapruner.search._objective import Objective, plan_candidate, scores_of
from adapruner.search._space import Candidate
from adapruner.structure._build import build_structure
from adapruner.surgery._cut import prune_model

LOUD = 2


@pytest.fixture
def loud_model(make_model):
    """With 24 channels in each of 4 layers, one of which matters more than the others."""
    model = make_model()
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight *= 4.0 if number == LOUD else 0.1
    return model


@pytest.fixture
def text(loud_model):
    """The model's own, so that what diverges from it loses."""
    return continue_texts(loud_model, [[1]] * 440, 11, torch.ones(440), seed=2)


@pytest.fixture
def objective(loud_model, text):
    structure = build_structure(loud_model)
    statistics = measure(loud_model, structure, text[:4])
    return Objective(loud_model, structure, statistics, text[:400], window_losses(loud_model, text[:400]))


@pytest.fixture
def candidate():
    budget = Budget(0.15, Profile(0, 0))
    return Candidate(point=LLM_PRUNER_METRICS["param_first"], samples=(0, 1, 2), budget=budget)


def levelled_to_ratio(
    objective: Objective,
    windows: Tensor,
    candidate: Candidate,
    rounds: int,
    progress: Callable[[int], None] | None = None,
    moves_heads: bool = False,
) -> Levelled:
    return level(objective, windows, candidate, rounds, range(4), moves_heads, progress)


def test_candidates_of_one_plan_are_judged_once(objective, candidate, monkeypatch):
    cut: list[str] = []

    def counted(*arguments: Any) -> PreTrainedModel:
        cut.append(arguments[2].hash)
        return prune_model(*arguments)

    monkeypatch.setattr("adapruner.search._objective.prune_model", counted)
    assert len(next(iter(objective(candidate)))) < 400  # stopped early, so its other losses are not known
    losses = torch.cat(list(objective(candidate)))
    doubled = {name: 2 * weight for name, weight in candidate.point.weights.items()}
    twin = candidate.model_copy(update={"point": candidate.point.model_copy(update={"weights": doubled})})
    assert torch.equal(torch.cat(list(objective(twin))), losses)
    assert len(losses) == 400
    assert len(cut) == 2
    other = with_budget(candidate, allocation=Profile(0, 0, tilt=0.5))
    assert not torch.equal(torch.cat(list(objective(other))), losses)
    assert len(cut) == 3
    fewer = replace(objective, windows=objective.windows[:8])
    assert torch.equal(torch.cat(list(fewer(candidate))), losses[:8])


def with_budget(candidate: Candidate, **fields: Any) -> Candidate:
    """A candidate whose budget differs in some fields."""
    return candidate.model_copy(update={"budget": replace(candidate.budget, **fields)})


def losses_of(objective: Objective, candidate: Candidate) -> Tensor:
    """[windows]: of the model that is cut for it, which removes what it is to remove."""
    plan = plan_candidate(objective.structure, objective.statistics, candidate)
    assert abs(plan.ratio - candidate.budget.ratio) <= 0.005
    return window_losses(prune_model(objective.model, objective.structure, plan), objective.windows)


def widths(objective: Objective, candidate: Candidate) -> list[int]:
    plan = plan_candidate(objective.structure, objective.statistics, candidate)
    return [len(block.kept) for block in plan.blocks if block.kind == "channels"]


def test_costs_are_those_of_narrower_models_that_are_run_whole(objective, candidate, text):
    candidate = with_budget(candidate, without_attention=(1,))
    structure, model, text = objective.structure, objective.model, text[:12]
    scores = scores_of(structure, objective.statistics, candidate)
    counts = kept_counts(structure, candidate.budget)

    def divergence(counts: list[int]) -> Tensor:
        pruned = prune_model(model, structure, make_plan(structure, scores, counts))
        with torch.no_grad():
            wanted, given = (each(text).logits[:, :-1].double().log_softmax(-1) for each in (model, pruned))
        return (wanted.exp() * (wanted - given)).sum(-1).mean(-1)

    with torch.no_grad():
        references = [model(text).logits[:, :-1].log_softmax(-1)]
    probe = Probe(objective, text, references, candidate)
    measured = dict(_levelling.channel_costs(probe, range(4), None))
    assert list(measured) == [0, 1, 2, 3]
    before = divergence(counts)
    for number, block in enumerate(structure.blocks):
        if block.kind == "channels":
            gone = round(0.15 * counts[number])
            narrower = [*counts[:number], counts[number] - gone, *counts[number + 1 :]]
            expected = (divergence(narrower) - before) / (gone * block.parameters_per_group / 1e6)
            cost, error = measured[block.layer]
            assert cost == pytest.approx(float(expected.mean()), rel=1e-3, abs=1e-3)
            assert error == pytest.approx(float(expected.std() / 12**0.5), rel=1e-3)
        elif counts[number]:
            fewer = [*counts[:number], counts[number] - 1, *counts[number + 1 :]]
            expected = divergence(fewer) - before
            (added,) = probe.added([(number, counts[number] - 1)])
            assert added == pytest.approx((float(expected.mean()), float(expected.std() / 12**0.5)), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("family", "granularity"),
    [("gpt2", "kv-group"), ("opt", "kv-group"), ("bloom", "kv-group"), ("phi3", "kv-group"), ("mistral", "query-head")],
)
def test_heads_are_probed_whatever_the_attention_knows_of_them(make_model, windows, family, granularity, candidate):
    """Some count their heads, or have a part for each."""
    model = make_model(family)
    structure = build_structure(model, granularity)
    whole = Objective(model, structure, measure(model, structure, windows), windows, window_losses(model, windows))
    scores = scores_of(structure, whole.statistics, candidate)
    number, block = next(one for one in enumerate(structure.blocks) if one[1].kind == "heads" and one[1].layer == 1)

    def divergence(counts: list[int]) -> Tensor:
        pruned = prune_model(model, structure, make_plan(structure, scores, counts))
        with torch.no_grad():
            of_pruned, of_dense = (read(windows).logits[:, :-1].log_softmax(-1) for read in (pruned, model))
        of_dense = of_dense.half().float()  # as they are kept
        return (of_dense.exp() * (of_dense - of_pruned)).sum(-1).double().mean(1)

    probe = Probe(whole, windows, log_probabilities(model, windows), candidate)
    fewer = probe.counts[number] - block.strata
    added = divergence([*probe.counts[:number], fewer, *probe.counts[number + 1 :]]) - divergence(probe.counts)
    expected = (float(added.mean()), float(added.std() / len(windows) ** 0.5))
    assert next(probe.added([(number, fewer)])) == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_protected_layers_stay_as_they_are(objective, candidate, text):
    candidate = with_budget(candidate, allocation=Profile(1, 0))
    costs = {layer: (float(layer), 0.01) for layer in (1, 2, 3)}
    changed = _levelling.with_moved_channels(objective, candidate, costs, range(1, 4))
    assert changed
    before, after = widths(objective, candidate), widths(objective, changed)
    assert before[0] == after[0] == 24
    assert after[1] < before[1]
    assert after[3] > before[3]
    probe = Probe(objective, text[400:], log_probabilities(objective.model, text[400:]), candidate)
    # At such a price of channels, heads would go wherever they may; but none goes for nothing.
    assert _levelling.paying_changes(probe, range(1, 4), 1e9, None) == []
    fewer = with_budget(candidate, heads=(2, 3, 3, 2))
    probe = Probe(objective, text[400:], log_probabilities(objective.model, text[400:]), fewer)
    assert _levelling.paying_changes(probe, range(1, 4), -1e9, None) == [(3, 1)]


def test_channels_move_to_the_layer_where_they_cost_most(objective, candidate, text):
    seen: list[int] = []
    levelled = levelled_to_ratio(objective, text[400:], candidate, 3, seen.append)
    assert levelled.moves
    assert sum(seen) in (4 * len(levelled.moves), 4 * len(levelled.moves) + 4)
    assert levelled.moves[0].accepted
    before, after = widths(objective, candidate), widths(objective, levelled.candidate)
    assert after[LOUD] > before[LOUD]
    gained = (losses_of(objective, candidate) - losses_of(objective, levelled.candidate)).mean()
    assert float(gained) == pytest.approx(sum(move.gain for move in levelled.moves if move.accepted), abs=1e-4)


def test_what_does_not_lower_the_loss_is_not_taken(objective, candidate, text, monkeypatch):
    monkeypatch.setattr(_levelling, "_EXPONENT", -0.4)
    levelled = levelled_to_ratio(objective, text[400:], candidate, 3)
    assert levelled.candidate == candidate
    (only,) = levelled.moves
    assert not only.accepted
    assert only.gain < 0


@pytest.fixture
def deaf(loud_model):
    """The attentions of two layers hardly matter, all channels do."""
    with torch.no_grad():
        for number, layer in enumerate(loud_model.model.layers):
            layer.self_attn.o_proj.weight *= 0.01 if number in (0, 3) else 3.0
            layer.mlp.down_proj.weight *= 1.0 if number == LOUD else 20.0
    return loud_model


def test_heads_move_to_the_layers_where_they_cost_most(deaf, objective, candidate, text):
    # One head each goes from the layers where they matter.
    candidate = with_budget(candidate, heads=(3, 2, 2, 3))
    seen: list[int] = []
    levelled = levelled_to_ratio(objective, text[400:], candidate, 1, seen.append, moves_heads=True)
    assert sum(seen) == 8
    moved = levelled.moves[0]
    assert isinstance(moved, MovedHeads)
    assert moved.accepted
    assert moved.changes == {0: -1, 1: 1, 2: 1, 3: -1}
    assert levelled.candidate.budget.heads == (2, 3, 3, 2)
    gained = (losses_of(objective, candidate) - losses_of(objective, levelled.candidate)).mean()
    assert float(gained) == pytest.approx(sum(move.gain for move in levelled.moves if move.accepted), abs=1e-4)
    assert levelled_to_ratio(objective, text[400:], candidate, 1).candidate.budget.heads == (3, 2, 2, 3)


def test_layer_by_layer_the_same_is_levelled(deaf, objective, candidate, text, tmp_path, monkeypatch):
    """Every layer of the model is read once for two changes."""
    deaf.save_pretrained(tmp_path)
    streamed = replace(objective, model=load_model(find_model(str(tmp_path)), layer_wise=True))
    monkeypatch.setattr(_levelling, "JUDGED_TOGETHER", 2)
    candidate = with_budget(candidate, heads=(3, 2, 2, 3))
    expected = levelled_to_ratio(objective, text[400:], candidate, 2, moves_heads=True)
    seen: list[int] = []
    levelled = levelled_to_ratio(streamed, text[400:], candidate, 2, seen.append, moves_heads=True)
    assert sum(seen) == 8 * 2
    assert levelled.candidate == expected.candidate != candidate
    for move, other in zip(levelled.moves, expected.moves, strict=True):
        assert (move.accepted, move.gain) == (other.accepted, pytest.approx(other.gain, rel=1e-3, abs=1e-6))
    probe = Probe(streamed, text[400:], log_probabilities(streamed.model, text[400:]), candidate)
    read: list[int] = []
    for number, layer in enumerate(decoder_layers(probe._model)):
        monkeypatch.setattr(
            layer.stream, "read", lambda number=number, of=layer.stream.read: (read.append(number), of())[1]
        )
    channels = [number for number, block in enumerate(probe.objective.structure.blocks) if block.kind == "channels"]
    assert all(probe.added([(number, 16) for number in channels]))
    assert read == [0, 1, 2, 3, 2, 3]


@pytest.mark.parametrize("parts", [(1,), (1, 2, 4)])
def test_of_the_changes_that_pay_the_best_part_is_taken(deaf, objective, candidate, monkeypatch, parts):
    """All four together lose, because two of them are wrong."""
    monkeypatch.setattr(_levelling, "_DIVISORS", parts)
    candidate = with_budget(candidate, ratio=0.2)
    best = _levelling.judge(objective, candidate)
    assert best
    changes = [(0, -1), (3, -1), (1, -1), (2, -1)]
    judged, (moved,) = _levelling.move_heads(objective, best, changes)
    if len(parts) == 1:
        assert (judged, moved.accepted, moved.changes) == (best, False, dict(changes))
    else:
        assert moved.accepted
        assert moved.changes in (dict(changes[:2]), dict(changes[:1]))
        assert judged.candidate.budget.heads[1:3] == (3, 3)
    assert _levelling.move_heads(objective, best, []) == (best, [])


@pytest.mark.parametrize("is_kept", [True, False])
def test_an_attention_is_kept_where_it_is_surely_worth_the_widths(objective, candidate, text, monkeypatch, is_kept):
    if not is_kept:
        monkeypatch.setattr(_levelling, "_CERTAIN", 1e6)
    without = with_budget(candidate, without_attention=(1,))

    levelled = levelled_to_ratio(objective, text[400:], without, 0)
    assert levelled.candidate == (candidate if is_kept else without)
    (only,) = levelled.kept
    assert (only.layer, only.accepted) == (1, is_kept)
    gains = losses_of(objective, without) - losses_of(objective, candidate)
    assert only.gain == pytest.approx(float(gains.mean()), abs=1e-4)
    assert only.gain_standard_error == pytest.approx(float(gains.std() / 20), rel=1e-2)


def test_what_the_budget_cannot_do_without_stays_removed(objective, candidate, text):
    without = with_budget(candidate, ratio=0.6, without_attention=(1, 2, 3))
    levelled = levelled_to_ratio(objective, text[400:404], without, 0)
    assert (levelled.candidate, levelled.kept) == (without, ())


def test_losses_that_are_not_finite_change_nothing(objective, candidate, text, monkeypatch):
    without = with_budget(candidate, without_attention=(1,))
    for broken in (0, 1):
        calls = iter(range(9))

        def losses(
            objective: Objective, candidate: Candidate, calls: Any = calls, broken: int = broken
        ) -> list[Tensor]:
            return [torch.tensor([1.0, math.inf if next(calls) == broken else 1.0])]

        monkeypatch.setattr(Objective, "__call__", losses)
        assert levelled_to_ratio(objective, text[400:404], without, 0) == Levelled(candidate=without, moves=())


def test_costs_that_noise_explains_move_nothing():
    assert _levelling.factors({layer: (1.0 + 0.1 * (layer % 2), 0.2) for layer in range(6)}) == {}
    assert _levelling.factors({0: (1.0, 0.1)}) == {}
    factors = _levelling.factors({0: (1.0, 1e-9), 1: (1.0, 1e-9), 2: (4.0, 1e-9), 3: (-1.0, 1e-9)})
    assert factors[2] == pytest.approx(1.3)
    assert factors[3] == pytest.approx(1 / 1.3)
    assert factors[0] == factors[1] == pytest.approx((1 / 1.25) ** 0.4)
    noisy = _levelling.factors({0: (1.0, 0.5), 1: (1.0, 0.5), 2: (2.0, 0.5), 3: (0.0, 0.5)})
    # The variance is 0.5 and the noise 0.25: half of the distance from the mean remains.
    assert noisy[2] == pytest.approx(1.5**0.4)
