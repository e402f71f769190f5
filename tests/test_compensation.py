"""Compensation against closed-form solutions by other means, and against what really happens to the outputs."""

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapruner.families import learn
from adapruner.measurement._moments import InputMoments, measure_moments
from adapruner.models._device import copy_in_dtype
from adapruner.planning._budget import Budget, Profile, kept_counts
from adapruner.planning._plan import PruningPlan, make_plan
from adapruner.structure._blocks import Structure
from adapruner.structure._build import build_structure
from adapruner.surgery._cut import compensate, prune_model
from adapruner.surgery._sequential import _DAMPINGS, CARRIED_SHARE, _change, _Products, refit_sequentially
from tiny_families import tiny_config

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
    refit_sequentially(model, pruned, structure, plan, windows)
    with torch.no_grad():
        assert torch.equal(pruned(windows).logits, model(windows).logits)


@pytest.mark.parametrize(
    ("family", "head_share"),
    [
        *itertools.product(["qwen3", "gpt2", "gpt_neox", "opt", "phi3", "bloom", "gemma"], [0, 1]),
        ("bitnet", 0),  # where a norm is over the channels
    ],
)
def test_sequential_is_the_least_squares_of_what_layers_really_get(
    family, head_share, make_model, windows, monkeypatch
):
    """Of every cut projection: its input in the finished model, and its target, by hooks in whole forward passes."""
    share, relative = CARRIED_SHARE, 0.1
    windows = windows.repeat(4, 1)  # what is held out is like what is fitted
    monkeypatch.setattr("adapruner.surgery._sequential._DAMPINGS", (relative,))
    model = make_model(family) if family != "bitnet" else AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    learn(model.config)
    structure, plan = cut(model, 0.05 if head_share == 0 else 0.15, head_share)
    start = prune_model(model, structure, plan)
    pruned = prune_model(model, structure, plan)
    refit_sequentially(model, pruned, structure, plan, windows, batch_size=3)
    before = dict(start.named_parameters())
    refitted = {name: weight for name, weight in pruned.named_parameters() if not weight.equal(before[name])}
    assert len(refitted) == (4 if head_share else 2)
    for name, weight in refitted.items():
        projection = name.removesuffix(".weight")
        layer = re.match(r".*?\.\d+", name)[0]
        is_attention = "attn" in name or "attention" in name
        calls: list[Any] = []
        hook = pruned.get_submodule(layer).register_forward_pre_hook(
            lambda _, *call, calls=calls: calls.append(call), with_kwargs=True
        )
        with torch.no_grad():
            pruned(windows, use_cache=False)
        hook.remove()
        [(args, kwargs)] = calls
        seen = {}
        runs = {
            "dense": (model, lambda: model(windows)),
            "pruned": (pruned, lambda: pruned(windows)),
            "uncut": (model, lambda args=args, kwargs=kwargs, layer=layer: model.get_submodule(layer)(*args, **kwargs)),
        }
        for which, (each, run) in runs.items():
            states: dict[str, Tensor] = {}
            hooks = [
                each.get_submodule(projection).register_forward_hook(
                    lambda _, args, output, states=states: states.update(x=args[0], y=output)
                ),
                each.get_submodule(layer).register_forward_hook(
                    lambda _, args, output, states=states: states.update(
                        into=args[0], out=output[0] if isinstance(output, tuple) else output
                    )
                ),
            ]
            with torch.no_grad():
                run()
            for hook in hooks:
                hook.remove()
            into, out, x, y = (states[key].reshape(windows.numel(), -1).double() for key in ("into", "out", "x", "y"))
            seen[which] = {
                "x": x,
                "beside": into if is_attention else out - y,
                "behind": into + y if is_attention else out,
            }
        x = seen["pruned"]["x"]
        bias = getattr(model.get_submodule(projection), "bias", None)
        target = (1 - share) * seen["uncut"]["behind"] + share * seen["dense"]["behind"] - seen["pruned"]["beside"]
        target -= 0.0 if bias is None else bias.detach()
        original, weight = before[name].detach().double(), weight.detach()
        damping = relative * x.square().mean()
        if family == "gpt2":
            original, weight = original.T, weight.T
        design = torch.cat([x / len(x) ** 0.5, damping**0.5 * torch.eye(x.shape[1]).double()])
        targets = torch.cat([target / len(x) ** 0.5, damping**0.5 * original.T])
        expected = torch.linalg.lstsq(design, targets).solution.T
        torch.testing.assert_close(weight.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("head_share", [0, 1])
def test_sequential_in_another_dtype_is_that_of_a_copy(head_share, model, windows):
    """As where trials run in bfloat16: the weights are those of a pruned model in that dtype throughout, before they
    are rounded to it."""
    structure, plan = cut(model, 0.05 if head_share == 0 else 0.15, head_share)
    fast = copy_in_dtype(model, torch.bfloat16)
    pruned = prune_model(model, structure, plan)
    copied = copy_in_dtype(pruned, torch.bfloat16)
    for each in (pruned, copied):
        refit_sequentially(fast, each, structure, plan, windows)
    assert {weight.dtype for weight in pruned.parameters()} == {torch.float32}
    for name, weight in copied.named_parameters():
        assert pruned.get_parameter(name).bfloat16().equal(weight), name


def test_sequential_brings_the_model_nearer_to_the_dense_one(make_model, windows):
    model = make_model("mistral")
    structure, plan = cut(model)
    one_shot = prune_model(model, structure, plan, dict(measure_moments(model, structure, windows)))
    refitted = prune_model(model, structure, plan, dict(measure_moments(model, structure, windows)))
    refit_sequentially(model, refitted, structure, plan, windows)
    with torch.no_grad():
        dense, before, after = (each.model(windows).last_hidden_state for each in (model, one_shot, refitted))
    assert (after - dense).norm() < (before - dense).norm()


def test_the_damping_of_a_refit_is_chosen_on_held_out_tokens():
    """What is fitted must help there too: brute force over the dampings, and nothing where every change harms."""
    numbers = torch.Generator().manual_seed(0)
    weight = torch.zeros(5, 8)
    truth = torch.randn(5, 8, generator=numbers)
    for sign, noise in ((1, 0.1), (1, 8.0), (-1, 0.1)):
        sums, tokens = [_Products(weight), _Products(weight)], []
        for products, count, direction in zip(sums, (24, 400), (1, sign), strict=True):
            x = torch.randn(count, 8, generator=numbers)
            missing = direction * x @ truth.T + noise * torch.randn(count, 5, generator=numbers)
            products.add(x, missing)
            tokens.append((x, missing))
        (x, missing), (x_held_out, missing_held_out) = tokens

        def ridge(x, missing, relative):
            diagonal = relative * x.square().sum() / 8
            return torch.linalg.solve(x.T @ x + diagonal * torch.eye(8), x.T @ missing).T

        errors = {r: (missing_held_out - x_held_out @ ridge(x, missing, r).T).square().sum() for r in _DAMPINGS}
        best = min(errors, key=errors.get)
        expected = ridge(torch.cat([x, x_held_out]), torch.cat([missing, missing_held_out]), best)
        if errors[best] >= missing_held_out.square().sum():
            expected = torch.zeros(5, 8)
        assert (sign < 0) == bool((expected == 0).all())
        torch.testing.assert_close(_change(*sums), expected, rtol=1e-3, atol=1e-3)
