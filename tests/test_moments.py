"""Second moments against hooks that keep every activation, and what removal costs against refitting outright."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.base.errors import AdaPrunerError
from adapruner.measurement.moments import (
    InputMoments,
    StoredMoments,
    _eliminate,
    _with_inverse,
    add_products,
    factorize,
    measure_moments,
    removal_errors,
    solve_damped,
    symmetric,
)
from adapruner.model.loading import in_fastest_dtype, load_model
from adapruner.model.places import find_model
from adapruner.run.inputs import HELD_OUT_TO_HEAL
from adapruner.structure.blocks import Structure
from adapruner.structure.build import build_structure
from adapruner.surgery import compensate
from adapruner.text.windows import load_texts_by_use


def activations(model: PreTrainedModel, structure: Structure, windows: Tensor) -> list[Tensor]:
    """[tokens, inputs] for each block."""
    kept: dict[int, Tensor] = {}
    hooks = [
        model.get_submodule(block.row_wise.parameter.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, args, index=index: kept.update({index: args[0].detach().flatten(0, 1).double()})
        )
        for index, block in enumerate(structure.blocks)
    ]
    with torch.no_grad():
        model(windows)
    for hook in hooks:
        hook.remove()
    return [kept[index] for index in range(len(structure.blocks))]


def measured(model: PreTrainedModel, structure: Structure, windows: Tensor, damping: float) -> dict[int, InputMoments]:
    """With another damping."""
    moments = dict(measure_moments(model, structure, windows))
    return {index: InputMoments(own.second, damping) for index, own in moments.items()}


def with_rows_of_damping(x: Tensor, damping: float) -> Tensor:
    """[tokens + inputs, inputs]: a matrix whose products are the damped second moments."""
    return torch.cat([x / len(x) ** 0.5, damping**0.5 * torch.eye(x.shape[1]).double()])


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_moments_are_means_over_all_tokens(batch_size, model, windows):
    structure = build_structure(model)
    moments = dict(measure_moments(model, structure, windows, [0, 3], batch_size))
    assert set(moments) == {0, 3}
    for index, x in enumerate(activations(model, structure, windows)):
        if index in moments:
            torch.testing.assert_close(moments[index].second.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
            assert moments[index].damping > 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("model_type", ["gemma3_text", "olmo2"])
def test_tokens_are_weighted_where_a_norm_follows(model_type, make_model):
    """Against a solver of what the norm leaves of the errors: those of each token divided by the size of its output."""
    model = make_model(model_type)
    structure = build_structure(model)
    windows = torch.randint(3, 96, (24, 12), generator=torch.Generator().manual_seed(5))
    moments = dict(measure_moments(model, structure, windows))
    inputs = activations(model, structure, windows)
    for index, block in enumerate(structure.blocks):
        weight, x = model.get_parameter(block.row_wise.parameter).detach().double(), inputs[index]
        sizes = (x @ weight.T).square().mean(1, keepdim=True).sqrt()
        assert sizes.max() > 1.2 * sizes.min()
        own, shares = moments[index], sizes**-2 / (sizes**-2).sum()
        kept = torch.arange(x.shape[1])[x.shape[1] // 4 :]
        rows = torch.cat([x * shares.sqrt(), torch.eye(x.shape[1]).double() * own.damping**0.5])
        wanted = torch.linalg.lstsq(rows[:, kept], rows @ weight.T).solution.T
        fitted = compensate(weight.float(), own, kept)
        torch.testing.assert_close(fitted.double(), wanted, rtol=1e-3, atol=1e-3 * float(weight.abs().max()))


def test_more_text_needs_less_damping(model):
    structure = build_structure(model)
    windows = torch.randint(3, 96, (64, 12), generator=torch.Generator().manual_seed(5))
    few, many = (
        sum(m.damping / float(m.second.diagonal().mean()) for m in dict(measure_moments(model, structure, w)).values())
        for w in (windows[:2], windows)
    )
    assert many < few


def test_what_cannot_be_measured_is_refused(model, windows):
    structure = build_structure(model)
    with pytest.raises(AdaPrunerError, match="at least 2 windows"):
        dict(measure_moments(model, structure, windows[:1], [0]))
    model.model.layers[1].mlp.up_proj.weight.data[3] = float("inf")
    with pytest.raises(AdaPrunerError, match=r"layers\.1\.mlp\.down_proj\.weight are not finite"):
        dict(measure_moments(model, structure, windows))


@pytest.mark.parametrize("granularity", ["kv-group", "query-head"])
def test_removal_alone_costs_what_a_refit_leaves(granularity, model, windows):
    """For every group: least squares without it, by a solver on the activations themselves."""
    structure = build_structure(model, granularity)
    alone = removal_errors(model, structure, measured(model, structure, windows, 1e-3))["removal_error"]
    inputs = activations(model, structure, windows)
    for index, block in enumerate(structure.blocks[:4]):
        weight = model.get_parameter(block.row_wise.parameter).detach().double()
        x, width = inputs[index], block.row_wise.width
        damped = with_rows_of_damping(x, 1e-3)
        for group in range(block.groups):
            kept = [c for c in range(x.shape[1]) if not group * width <= c < (group + 1) * width]
            solution = torch.linalg.lstsq(damped[:, kept], damped @ weight.T).solution
            expected = (damped @ weight.T - damped[:, kept] @ solution).square().sum()
            actual = alone[structure.group_offsets[index] + group].double()
            torch.testing.assert_close(actual, expected, rtol=2e-3, atol=1e-6)


def test_elimination_adds_up_to_the_error_of_a_refit(model, windows):
    """One channel after the other: the errors up to any of them are what least squares without all of them leaves."""
    structure = build_structure(model)
    eliminated = removal_errors(model, structure, measured(model, structure, windows, 1e-2))["elimination_error"]
    for index in (1, 5):
        block, offset = structure.blocks[index], structure.group_offsets[index]
        weight = model.get_parameter(block.row_wise.parameter).detach().double()
        damped = with_rows_of_damping(activations(model, structure, windows)[index], 1e-2)
        costs = eliminated[offset : offset + block.groups].double()
        order = costs.argsort()
        for gone in (1, 5, 12):
            kept = order[gone:].sort().values
            solution = torch.linalg.lstsq(damped[:, kept], damped @ weight.T).solution
            left = (damped @ weight.T - damped[:, kept] @ solution).square().sum()
            # The costs are raised where they would not ascend, and so bound the error from above.
            assert left <= costs[order[:gone]].sum() * (1 + 1e-3)
            torch.testing.assert_close(costs[order[:gone]].sum(), left, rtol=0.05, atol=1e-6)


def test_tempered_errors_are_between_the_elimination_and_the_squares_of_the_inputs(model, windows):
    structure = build_structure(model)
    errors = removal_errors(model, structure, measured(model, structure, windows, 1e-2))
    for index, (block, x) in enumerate(zip(structure.blocks, activations(model, structure, windows), strict=True)):
        eliminated, tempered = (
            errors[name][structure.group_offsets[index] :][: block.groups].double()
            for name in ("elimination_error", "tempered_error")
        )
        squared = x.square().mean(0).unflatten(0, (block.groups, -1)).sum(1)
        torch.testing.assert_close(tempered.log(), (eliminated.log() + squared.log()) / 2, rtol=1e-3, atol=1e-3)


def test_conditional_variances_multiply_to_the_determinant(model, windows):
    """By the chain rule, in whatever order the channels go; and the first head to go is the best explained, by a
    solver on the activations."""
    structure = build_structure(model)
    moments = measured(model, structure, windows, 1e-2)
    errors = removal_errors(model, structure, moments)
    fewer = removal_errors(model, structure, moments, variance=False)
    assert [*fewer] == ["removal_error", "elimination_error", "tempered_error"]
    assert all(torch.equal(errors[name], own) for name, own in fewer.items())
    variances = errors["conditional_variance"].double()
    inputs = activations(model, structure, windows)
    for index, block in enumerate(structure.blocks):
        own = variances[structure.group_offsets[index] :][: block.groups]
        damped = with_rows_of_damping(inputs[index], 1e-2)
        if block.kind == "channels":
            torch.testing.assert_close(own.log().sum(), torch.logdet(damped.T @ damped), rtol=1e-3, atol=1e-3)
            continue
        unexplained = []
        for group in range(block.groups):
            gone = torch.arange(block.inputs) // block.row_wise.width == group
            solution = torch.linalg.lstsq(damped[:, ~gone], damped[:, gone]).solution
            unexplained.append((damped[:, gone] - damped[:, ~gone] @ solution).square().sum())
        first = torch.stack(unexplained).min()
        torch.testing.assert_close(own.min(), first, rtol=1e-3, atol=1e-6)
        assert own.argmin() == torch.stack(unexplained).argmin()


def test_blocks_without_moments_cost_nothing(model, windows):
    structure = build_structure(model)
    for errors in removal_errors(model, structure, dict(measure_moments(model, structure, windows, [1]))).values():
        assert errors[structure.block_of_group == 1].all()
        assert not errors[structure.block_of_group != 1].any()


@pytest.mark.parametrize("damping", [1e-5, 1.0])
def test_damped_systems_are_solved_as_well_as_in_float64(damping):
    """With two inputs a thousand times as large as the others, and nearly alike, as in most language models; the right
    side is what compensation asks for."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 80, generator=generator) @ torch.randn(80, 80, generator=generator) / 8
    x[:, 5] = 1e3 * (1 + 0.1 * x[:, 5])
    x[:, 9] = x[:, 5] + 5 * x[:, 9]
    second, gone = x.T @ x / len(x), torch.randn(20, 7, generator=generator)
    within, across = second[:60, :60], second[:60, 60:] @ gone
    exact = within.double() + damping * torch.eye(60).double()
    expected = torch.linalg.solve(exact, across.double())

    def lost(solution: Tensor) -> float:
        """What is left of the outputs of the inputs that go."""
        own = gone.double().T @ second[60:, 60:].double() @ gone.double()
        solution = solution.double()
        return float(own.trace() + (solution * (exact @ solution - 2 * across)).sum())

    solved = solve_damped(second[:60, :60], damping, across)
    assert solved.dtype == torch.float32
    assert lost(solved) == pytest.approx(lost(expected), rel=1e-4)


def test_a_system_that_rounding_leaves_indefinite_is_solved_all_the_same():
    x = torch.randn(3, 10, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 10)
    second = (x.T @ x).half().float()
    factor = factorize(second, 1e-9)
    assert (factor @ factor.T - second.double()).abs().max() < second.abs().max() * 1e-2
    solved = solve_damped(second, 1e-9, torch.ones(10, 1))
    assert solved.dtype == torch.float32
    assert solved.isfinite().all()
    with pytest.raises(AdaPrunerError, match="not finite"):
        solve_damped(second.fill_diagonal_(float("nan")), 1e-9, torch.ones(10, 1))


def test_stored_moments_are_read_once_where_there_is_room(tmp_path):
    stored = StoredMoments(tmp_path)
    for block in range(1, 4):
        InputMoments(block * torch.eye(4), 0.5).save(stored.path(block))
    room = 2 * 64
    held = StoredMoments(tmp_path, {torch.device("meta"): 0, torch.device("cpu"): room})
    for moments in (stored, held):
        assert list(moments) == [1, 2, 3]
        assert len(moments) == 3
        with pytest.raises(KeyError):
            moments[0]
        for block in moments:
            assert moments[block].second.equal(block * torch.eye(4))
            assert moments[block].damping == 0.5
    assert [held[block] is held[block] for block in held] == [True, True, False]
    assert StoredMoments(tmp_path, {torch.device("meta"): room})[1].second.device.type == "meta"


def test_a_run_sums_them_over_its_text(finished, model_folder):
    drawn = load_texts_by_use(finished.output / "windows.safetensors")["compensation"]
    text = drawn.held_out(HELD_OUT_TO_HEAL)[0].windows
    model = load_model(find_model(str(model_folder)))
    both = activations(in_fastest_dtype(model), build_structure(model), text)
    for index, moments in StoredMoments(finished.output / "moments").items():
        expected = both[index].T @ both[index] / len(both[index])
        torch.testing.assert_close(
            moments.second.double(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max())
        )


def test_inputs_that_repeat_each_other_are_ranked_in_float64():
    """Few tokens of low rank: against plain float64 on the moments as they are."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(128, 24, generator=generator) @ torch.randn(24, 96, generator=generator)
    second = inputs.T @ inputs / 128
    own = InputMoments(second, 1e-5 * float(second.diagonal().mean()))
    weight = torch.randn(32, 96, generator=generator)
    expected = _eliminate(weight.double(), torch.cholesky_inverse(factorize(second, own.damping)), 1)
    for found, exact in zip(_eliminate(*_with_inverse(weight, own), 1), expected, strict=True):
        assert found.argsort().equal(exact.argsort())


def test_products_of_bfloat16_are_exact_and_leave_the_precision_as_it_was():
    x = torch.randn(300, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    second, before = torch.zeros(100, 100), torch.get_float32_matmul_precision()
    add_products(second, x)
    assert torch.get_float32_matmul_precision() == before
    torch.testing.assert_close(symmetric(second).double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-3)
