"""Statistics against plain autograd, and against what really happens to the loss."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.base.errors import AdaPrunerError
from adapruner.budget.plan import make_plan
from adapruner.measurement.taylor import Statistics, measure
from adapruner.model.architecture import known_architectures
from adapruner.structure.blocks import Block, TensorSlice
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model


def sample_gradients(model: PreTrainedModel, windows: Tensor) -> Iterator[dict[str, Tensor]]:
    """g·w of every parameter for every sample, by one plain backward pass each, with the loss of transformers."""
    for window in windows:
        model.zero_grad()
        model(window[None], labels=window[None]).loss.backward()
        yield {name: parameter.grad * parameter.detach() for name, parameter in model.named_parameters()}
    model.zero_grad()


def by_vector(products: dict[str, Tensor], part: TensorSlice, block: Block) -> Tensor:
    """[vectors, elements]: the entries of a matrix, one row for each of its removable rows or columns."""
    matrix = products[part.parameter].T if part.is_transposed else products[part.parameter]
    rows = matrix if part.axis == 0 else matrix.T
    return rows[part.offset : part.offset + block.groups * part.width]


def mean_loss(model: PreTrainedModel, windows: Tensor) -> float:
    """In the dtype of the model, where the loss of transformers is always float32."""
    with torch.no_grad():
        logits = model(windows).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


@pytest.mark.parametrize(
    ("family", "granularity"),
    [
        (family, granularity)
        for family, architecture in known_architectures().items()
        for granularity in ("kv-group", "query-head")
        if granularity == "kv-group" or architecture.config_fields.key_value_heads
    ],
)
def test_equals_a_loop_of_plain_backward_passes(family, granularity, make_model, windows):
    model = make_model(family)
    structure = build_structure(model, granularity)
    statistics = measure(model, structure, windows, batch_size=4)
    layer_wise = measure(model, structure, windows, batch_size=4, layer_wise=True)
    for name, values in statistics.per_sample.items():
        torch.testing.assert_close(layer_wise.per_sample[name], values, rtol=1e-5, atol=1e-9)
    for sample, products in enumerate(sample_gradients(model, windows)):
        vectors = [by_vector(products, part, block) for block in structure.blocks for part in block.matrices]
        expected = {
            "taylor": torch.cat([rows.sum(1) for rows in vectors]),
            "element_absolute": torch.cat([rows.abs().sum(1) for rows in vectors]),
            "element_squared": torch.cat([rows.square().sum(1) for rows in vectors]),
        }
        for name, values in expected.items():
            torch.testing.assert_close(statistics.per_sample[name][sample], values, rtol=1e-3, atol=1e-7)
        with torch.no_grad():
            loss = model(windows[sample : sample + 1], labels=windows[sample : sample + 1]).loss
        assert math.isclose(float(statistics.loss[sample]), float(loss), rel_tol=1e-5)


def test_jointly_is_the_gradient_of_the_mean_loss(model, windows):
    structure = build_structure(model)
    statistics = measure(model, structure, windows, batch_size=len(windows), jointly=True)
    assert len(statistics) == 1
    samples = list(sample_gradients(model, windows))
    mean = {name: torch.stack([sample[name] for sample in samples]).mean(0) for name in samples[0]}
    expected = torch.cat(
        [by_vector(mean, part, block).abs().sum(1) for block in structure.blocks for part in block.matrices]
    )
    torch.testing.assert_close(statistics.element_absolute[0], expected, rtol=1e-3, atol=1e-7)


def test_first_order_term_predicts_the_change_of_the_loss(model, windows):
    """Shrinking the part of the output projection that reads a group by ε changes the loss by -ε Σ g w."""
    model = model.double()
    structure = build_structure(model)
    statistics = measure(model, structure, windows)
    epsilon, offset, checked = 1e-2, 0, 0
    for block in structure.blocks:
        for part in block.matrices:
            values = statistics.taylor.mean(0)[offset : offset + block.groups * part.width]
            offset += block.groups * part.width
            if part.axis == 0:
                continue
            for group in range(0, block.groups, 5):
                columns = slice(group * part.width, (group + 1) * part.width)
                losses = []
                for factor in (1 + epsilon, 1 - epsilon):
                    shrunk = copy.deepcopy(model)
                    shrunk.get_parameter(part.parameter).data[:, columns] *= factor
                    losses.append(mean_loss(shrunk, windows))
                slope = (losses[0] - losses[1]) / (2 * epsilon)
                assert math.isclose(float(values[columns].sum()), slope, rel_tol=1e-2, abs_tol=3e-5)
                checked += 1
    assert checked > 10


def test_first_order_term_predicts_a_removal(make_model, windows):
    """Where the group is small, removing it changes the loss by what the output projection's term says."""
    model = make_model("llama", mlp_bias=False, attention_bias=False).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "down_proj" in name:
                parameter.mul_(0.01)
    structure = build_structure(model)
    index = next(number for number, block in enumerate(structure.blocks) if block.kind == "channels")
    block = structure.blocks[index]
    start = sum(b.groups * part.width for b in structure.blocks[:index] for part in b.matrices)
    start += sum(block.groups * part.width for part in block.matrices if part.axis == 0)
    predicted = -measure(model, structure, windows).taylor.mean(0)[start : start + block.groups]
    scores = torch.ones(structure.group_offsets[-1])
    counts = [other.groups - (other is block) for other in structure.blocks]
    for group in range(block.groups):
        scores[structure.group_offsets[index] + group] = 0
        pruned = prune_model(model, structure, make_plan(structure, scores, counts))
        scores[structure.group_offsets[index] + group] = 1
        change = mean_loss(pruned, windows) - mean_loss(model, windows)
        assert math.isclose(change, float(predicted[group]), rel_tol=0.05, abs_tol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_give_float32_statistics(model, windows, dtype):
    structure = build_structure(model)
    exact = measure(model, structure, windows)
    narrow = measure(copy.deepcopy(model).to(dtype), structure, windows)
    assert narrow.element_squared.dtype == torch.float32
    # A term that underflowed in the narrow dtype would be 0 almost everywhere.
    assert (narrow.element_squared > 0).float().mean() > 0.99
    ratio = narrow.element_absolute.sum() / exact.element_absolute.sum()
    assert math.isclose(float(ratio), 1, rel_tol=0.05)


def test_the_batch_size_does_not_matter(model, windows):
    structure = build_structure(model)
    one, three = (measure(model, structure, windows, batch_size) for batch_size in (1, 3))
    torch.testing.assert_close(one.taylor, three.taylor, rtol=1e-3, atol=1e-6)


def test_leaves_the_model_as_it_was(model, windows):
    model.lm_head.weight.requires_grad_(False)
    measure(model, build_structure(model), windows)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == len(list(model.named_parameters())) - 1
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_found_whatever_the_caller_does(mode, model, windows):
    structure = build_structure(model)
    expected = measure(model, structure, windows)
    with mode():
        assert measure(model, structure, windows + 0).taylor.equal(expected.taylor)


def test_what_cannot_be_measured_is_refused(make_model, windows):
    model = make_model("gpt2")
    structure = build_structure(model)
    for wrong in (windows.float(), windows[0], windows[:0], windows[:, :1]):
        with pytest.raises(AdaPrunerError, match=r"`windows` is a tensor of .*: windows are tokens, int64, of shape"):
            measure(model, structure, wrong)
    with pytest.raises(AdaPrunerError, match="the text has token 96, the embedding of the model ends at 95"):
        measure(model, structure, windows.clamp(96))
    with pytest.raises(AdaPrunerError, match="`windows` holds -1, which is not a token"):
        measure(model, structure, windows.clamp(max=-1))
    with pytest.raises(AdaPrunerError, match="in training mode"):
        measure(model.train(), structure, windows)
    with torch.inference_mode(), pytest.raises(AdaPrunerError, match="have no gradients"):
        measure(make_model("gpt2"), structure, windows)


def test_broken_weights_are_named(model, windows):
    windows[1:] = windows[1:].clamp_max(90)
    windows[0, 3] = 95
    model.model.embed_tokens.weight.data[95] = float("nan")
    with pytest.raises(AdaPrunerError, match=r"sample\(s\) \[0\] are not finite"):
        measure(model, build_structure(model), windows, batch_size=1)


def test_save_and_load(model, windows, tmp_path):
    statistics = measure(model, build_structure(model), windows)
    path = tmp_path / "statistics.safetensors"
    statistics.save(path)
    loaded = Statistics.load(path)
    assert torch.equal(loaded.taylor, statistics.taylor)
    assert torch.equal(loaded.select([2, 0]).loss, statistics.loss[[2, 0]])
