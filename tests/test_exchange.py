"""Exchange of channels against models that are cut and run whole, and against every exchange made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapruner.calibration import generate_windows
from adapruner.evaluation import log_probabilities, losses_by_batch, window_losses
from adapruner.measurement import InputMoments, measure, measure_moments
from adapruner.planning import Budget, PruningPlan, kept_counts, make_plan
from adapruner.search import Exchanged, Objective, batches_of_round, exchange
from adapruner.search import _exchange as module
from adapruner.structure import Block, Structure, TensorSlice, build_structure
from adapruner.surgery import Compensation, compensate, prune_model
from tiny_families import tiny_config

MakeModel = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("damping", [0.01, 3.0])
def test_what_one_channel_more_or_less_changes(is_transposed: bool, damping: float) -> None:
    torch.manual_seed(0)
    channels, outputs, count = 12, 5, 7
    inputs = torch.randn(400, channels) @ torch.randn(channels, channels)
    second = inputs.T @ inputs / 400
    moments = InputMoments(inputs.mean(0), second, damping)
    weight, gradient = torch.randn(outputs, channels), torch.randn(outputs, channels)
    kept = sorted(torch.randperm(channels)[:count].tolist())

    def stored(matrix: Tensor) -> Tensor:
        return matrix.T.contiguous() if is_transposed else matrix

    def compensated(numbers: set[int]) -> Tensor:
        whole, ascending = torch.zeros(outputs, channels), torch.tensor(sorted(numbers))
        whole[:, ascending] = compensate(weight, moments, ascending, "least-squares")[0]
        return whole

    part = TensorSlice("layers.3.down.weight", 1, 1, outputs, is_transposed=is_transposed)
    block = Block(3, "channels", channels, (part,), {})
    own = module._Channels(block, stored(weight), lambda: moments, kept, [0, 3])
    assert own.name == "layers.1.down.weight"
    assert torch.allclose(own.compensated(), stored(compensated({*kept})), atol=1e-5)
    changes = [compensated({*kept, one}) - compensated({*kept} - {one}) for one in range(channels)]
    slopes = torch.stack([(gradient * change).sum() for change in changes])
    assert torch.allclose(own.slopes(stored(gradient)), slopes, rtol=1e-3, atol=1e-4)
    damped = second + damping * torch.eye(channels)
    sizes = torch.stack([(change @ damped * change).sum() for change in changes])
    assert torch.allclose(own._fit().sizes, sizes, rtol=1e-3, atol=1e-4)


def test_exchanges_pay_where_the_loss_is_that_of_least_squares() -> None:
    """Of the loss of the block alone, the gradient tells what every exchange brings. The first is then the best of all
    that there are, up to the channels that speak for each other."""
    torch.manual_seed(1)
    channels, outputs = 8, 6
    inputs = torch.randn(3000, channels)
    moments = InputMoments(inputs.mean(0), inputs.T @ inputs / 3000, 1e-4)
    weight = torch.randn(outputs, channels) * torch.tensor([1, 4, 1, 1, 0.2, 1, 1, 1.0])
    kept, part = [0, 2, 4, 5], TensorSlice("layers.0.down.weight", 1, 1, outputs)
    own = module._Channels(Block(0, "channels", channels, (part,), {}), weight, lambda: moments, kept, [0])
    error = (own.compensated() - weight) @ moments.second
    leave, enter, predicted = own.exchange(own.slopes(error).expand(2, -1))
    assert (leave, enter) == ([4], [1])

    def loss(numbers: list[int]) -> float:
        whole, ascending = torch.zeros_like(weight), torch.tensor(sorted(numbers))
        whole[:, ascending] = compensate(weight, moments, ascending, "least-squares")[0]
        return float(((whole - weight) @ moments.second * (whole - weight)).sum() / 2)

    assert predicted == pytest.approx(loss(kept) - loss([0, 1, 2, 5]), rel=0.1)


def test_of_channels_that_say_the_same_one_alone_is_exchanged() -> None:
    coupled, worth = torch.eye(6), torch.tensor([3.0, 6.0, 5.0, 4.0, 2.0, 1.0])
    coupled[1, 2] = coupled[2, 1] = 0.9
    coupled[3, 0] = coupled[0, 3] = 0.1
    assert module._apart(worth, 7 * coupled, 3).tolist() == [1, 3, 0]
    assert module._apart(worth, coupled, 9).tolist() == [1, 3, 0, 4, 5]


def test_noise_is_no_signal() -> None:
    torch.manual_seed(2)
    signal, sizes = torch.randn(4000), torch.rand(4000) + 0.1
    for noise, share in ((0.0, 1.0), (8.0, 1 / 2), (400.0, 0.0)):
        measured = (signal + noise * torch.randn(64, 4000)) * sizes.sqrt()
        ratio = float((module._signal(measured, sizes) * measured.mean(0)).sum() / measured.mean(0).square().sum())
        assert ratio == pytest.approx(share, abs=0.07)
    # Channels that are measured well count in full beside others that are not.
    measured = (signal + torch.tensor([0.01, 8.0]).repeat(2000) * torch.randn(64, 4000)) * sizes.sqrt()
    shares = module._signal(measured, sizes) / measured.mean(0)
    assert torch.allclose(shares[::2], torch.tensor(1.0), atol=0.01)
    assert float(shares[1::2].mean()) == pytest.approx(1 / 2, abs=0.07)


def objective_of(model: PreTrainedModel, text: Tensor, **options: Any) -> Objective:
    structure = build_structure(model)
    moments = dict(measure_moments(model, structure, text))
    statistics = measure(model, structure, text[:4])
    return Objective(model, structure, statistics, text, Compensation("least-squares", moments), **options)


@pytest.fixture
def model(make_model: MakeModel) -> PreTrainedModel:
    return make_model()


@pytest.fixture
def text(model: PreTrainedModel) -> Tensor:
    """The model's own, so that what diverges from it loses."""
    return generate_windows(model, 256, 12, seed=0, batch_size=256)


def badly_chosen(structure: Structure, ratio: float = 0.2) -> PruningPlan:
    """A plan that keeps channels at random."""
    scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(0))
    return make_plan(structure, scores, kept_counts(structure, Budget(ratio, 0, 0)))


def test_rounds_find_better_channels_at_the_same_widths(model: PreTrainedModel, text: Tensor) -> None:
    objective, seen = objective_of(model, text), list[int]()
    plan = badly_chosen(objective.structure)
    found = exchange(objective, plan, text, 3, seen.append)
    assert found.rounds[0].accepted
    assert sum(seen) == len(found.rounds) * batches_of_round(len(text)) == len(found.rounds) * 64
    assert [len(block.kept) for block in found.plan.blocks] == [len(block.kept) for block in plan.blocks]
    losses = [
        window_losses(prune_model(model, objective.structure, one, objective.compensation), text)
        for one in (plan, found.plan)
    ]
    gains = sum(one.gain for one in found.rounds if one.accepted)
    assert float((losses[0] - losses[1]).mean()) == pytest.approx(gains, abs=1e-4)
    first = exchange(objective, plan, text, 1)
    exchanged = [len(set(new.kept) - set(old.kept)) for new, old in zip(first.plan.blocks, plan.blocks, strict=True)]
    assert sum(exchanged) == first.rounds[0].exchanged > 0
    assert max(exchanged) == 1
    assert exchange(objective, plan, text, 3) == found


@pytest.mark.parametrize("loss", [0.0, 1.0, float("inf")])
def test_what_gains_nothing_is_not_taken(loss: float, model: PreTrainedModel, text: Tensor) -> None:
    """Of losses that rise from model to model, and are finite for the first alone."""
    judged: list[float] = []

    def rising(_: PreTrainedModel) -> list[float]:
        judged.append(loss * len(judged) if judged else 0.0)
        return [judged[-1]] * 4

    objective = objective_of(model, text, item_losses=rising)
    plan = badly_chosen(objective.structure)
    found = exchange(objective, plan, text, 3)
    assert found.plan == plan
    assert [one.accepted for one in found.rounds] == ([] if loss == float("inf") else [False])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_gradients_are_those_of_the_model_that_the_plan_cuts(family: str, make_model: MakeModel) -> None:
    """Without channels, heads and layers: against the divergence of models that are cut, compensated, and a little
    changed."""
    model = make_model(family)
    text = torch.randint(4, model.config.vocab_size, (8, 10), generator=torch.Generator().manual_seed(1))
    objective = objective_of(model, text)
    structure = objective.structure
    counts = [max(1, block.groups - block.groups // 2) for block in structure.blocks]
    for number, block in enumerate(structure.blocks):
        counts[number] = {1: 0, 2: 0 if block.kind == "heads" else counts[number]}.get(block.layer, counts[number])
    plan = make_plan(structure, torch.zeros(structure.group_offsets[-1]), counts)
    channels = module._channels(objective, plan)
    assert channels
    whole = [range(own.groups) if number in channels else own.kept for number, own in enumerate(plan.blocks)]
    wide = prune_model(model, structure, PruningPlan.of(structure, whole), objective.compensation)
    weights = {own.name: own.compensated() for own in channels.values()}
    pruned = prune_model(model, structure, plan, objective.compensation)
    with torch.no_grad():
        logits = functional_call(wide, weights, (text,), {"use_cache": False}).logits
        assert torch.allclose(logits, pruned(text).logits, atol=1e-4)
    gradients = module._gradients(model, wide.requires_grad_(False), weights, text, None)
    references = log_probabilities(model, text)
    for number, own in channels.items():
        kept = torch.tensor(plan.blocks[number].kept)
        part = structure.blocks[number].row_wise
        gradient = part.as_projection(gradients[own.name])[:, kept]
        weight = part.as_projection(pruned.get_parameter(own.name).detach())
        step, divergences = 1e-2 * gradient / gradient.norm(), []
        for sign in (1, -1):
            weight += sign * step
            divergences.append(torch.cat(list(losses_by_batch(pruned, text, references))).mean())
            weight -= sign * step
        slope = float(divergences[0] - divergences[1]) / 2e-2
        assert slope == pytest.approx(float(gradient.norm()), rel=0.05)


def test_a_channel_that_is_always_zero_is_no_obstacle(model: PreTrainedModel, text: Tensor) -> None:
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                projection.weight[5] = 0.0
            layer.mlp.down_proj.weight[:, 5] = 0.0
    objective = objective_of(model, text)
    plan = badly_chosen(objective.structure)
    (found,) = exchange(objective, plan, text, 1).rounds
    assert found.exchanged == 4


def test_nothing_is_exchanged_in_front_of_a_norm_over_the_channels() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("bitnet")).eval()
    objective = objective_of(model, torch.arange(80).view(8, 10) + 4)
    assert not module._channels(objective, badly_chosen(objective.structure))


def test_where_nothing_can_be_exchanged_the_plan_stays(model: PreTrainedModel, text: Tensor) -> None:
    objective = objective_of(model, text)
    structure = objective.structure
    counts = [block.groups - (block.kind == "heads") for block in structure.blocks]
    plan = make_plan(structure, torch.zeros(structure.group_offsets[-1]), counts)
    assert exchange(objective, plan, text, 3) == Exchanged(plan=plan)
    assert exchange(objective, badly_chosen(structure), text[:1], 3).rounds == ()
