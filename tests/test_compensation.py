"""Compensation against closed-form solutions by other means, and against what really happens to the outputs."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.budget.counts import Budget, Profile, kept_counts
from adapruner.budget.plan import PruningPlan, make_plan
from adapruner.measurement.moments import InputMoments, measure_moments
from adapruner.structure.blocks import Structure
from adapruner.structure.build import build_structure
from adapruner.surgery import compensate, prune_model

KEPT = torch.tensor([0, 2, 3, 6])


def moments_of(inputs: Tensor, damping: float) -> InputMoments:
    return InputMoments((inputs.T @ inputs / len(inputs)).float(), damping)


@pytest.fixture
def inputs():
    """[tokens, inputs]: correlated, with means of their own."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(200, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
    return (mixed + torch.randn(8, generator=generator) * 2).double()


@pytest.fixture
def weight():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def error(weight: Tensor, inputs: Tensor, columns: Tensor) -> float:
    """E‖W x - W' x_K‖²."""
    lost = inputs @ weight.double().T - inputs[:, KEPT] @ columns.double().T
    return float(lost.square().sum(1).mean())


def test_least_squares_equals_a_solver_on_the_stacked_problem(inputs, weight):
    """The damped problem as an ordinary one: the rows √damping · I with the original columns as targets are added."""
    damping = 0.3
    columns = compensate(weight, moments_of(inputs, damping), KEPT)
    tokens, kept = len(inputs), len(KEPT)
    design = torch.cat([inputs[:, KEPT] / tokens**0.5, damping**0.5 * torch.eye(kept, dtype=torch.float64)])
    targets = torch.cat([inputs @ weight.double().T / tokens**0.5, damping**0.5 * weight.double()[:, KEPT].T])
    expected = torch.linalg.lstsq(design, targets).solution.T
    torch.testing.assert_close(columns.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3, 200])
@pytest.mark.parametrize("damping", [1e-8, 1e-2, 10.0])
def test_never_worse_than_leaving_the_columns_as_they_are(tokens, damping, inputs, weight):
    """On its own text; also with fewer tokens than inputs, where H is singular."""
    inputs = inputs[:tokens]
    columns = compensate(weight, moments_of(inputs, damping), KEPT)
    assert columns.isfinite().all()
    assert error(weight, inputs, columns) <= error(weight, inputs, weight[:, KEPT]) * (1 + 1e-6)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_channels_that_never_change(value, inputs, weight):
    """One that is constant, whether it stays or goes, and a copy of another."""
    inputs[:, 2] = inputs[:, 5] = value
    inputs[:, 7] = inputs[:, 6]
    columns = compensate(weight, moments_of(inputs, 1e-7), KEPT)
    assert columns.isfinite().all()
    assert error(weight, inputs, columns) <= error(weight, inputs, weight[:, KEPT])


def test_all_inputs_are_zero(weight):
    columns = compensate(weight, moments_of(torch.zeros(4, 8).double(), 1.0), KEPT)
    assert torch.equal(columns, weight[:, KEPT])


def cut(model: PreTrainedModel, ratio: float = 0.15, head_share: float = 1) -> tuple[Structure, PruningPlan]:
    """A plan that removes heads and channels from the two middle layers."""
    structure = build_structure(model)
    scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(0))
    return structure, make_plan(
        structure, scores, kept_counts(structure, Budget(ratio, Profile(1, 1), heads=head_share))
    )


def test_a_compensated_model_is_nearer_to_the_dense_one(make_model, windows):
    model = make_model("qwen3")
    structure, plan = cut(model)
    windows = windows.repeat(1, 2)
    moments = dict(measure_moments(model, structure, windows))
    before, after = (prune_model(model, structure, plan, how) for how in (None, moments))
    with torch.no_grad():
        dense, plain, compensated = (each(windows).logits for each in (model, before, after))
    assert (compensated - dense).norm() < 0.95 * (plain - dense).norm()


def test_nothing_removed_nothing_changed(model, windows):
    structure = build_structure(model)
    plan = make_plan(structure, torch.ones(structure.group_offsets[-1]), [b.groups for b in structure.blocks])
    pruned = prune_model(model, structure, plan, dict(measure_moments(model, structure, windows)))
    with torch.no_grad():
        assert torch.equal(pruned(windows).logits, model(windows).logits)
