"""One pass over the calibration pool: what every sample says about every removable vector.

The loss of each sample is differentiated on its own. The gradient of a weight matrix exists only for the moment in
which it is reduced to one number per row or column, so the pass needs the memory of a training step without its
gradients, plus two matrices of the size of the largest one in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapruner.errors import AdaPrunerError
from adapruner.structure import Block, Structure, TensorSlice


@dataclass(frozen=True)
class Statistics:
    """What the importance terms are computed from, in float32; vectors, inputs and groups as in `Structure`.

    With g the gradient of the mean loss of one sample, w the weights of one vector, x an input of a row-wise projection
    at the tokens of one sample, and W_c the column of the projection that takes it:

    Attributes:
        taylor: [samples, vectors], Σ_k g_k w_k, signed.
        element_absolute: [samples, vectors], Σ_k |g_k w_k|.
        element_squared: [samples, vectors], Σ_k (g_k w_k)².
        loss: [samples], the mean loss in nats per predicted token.
        input_mean: [samples, inputs], mean of x.
        input_squared: [samples, inputs], mean of x².
        column_absolute: [inputs], Σ|W_c|.
        column_squared: [inputs], ‖W_c‖².
        removal_error, elimination_error: [groups], from second moments (`removal_errors`), which may be of other and
            more text than the samples; None where they were not measured.
    """

    taylor: Tensor
    element_absolute: Tensor
    element_squared: Tensor
    loss: Tensor
    input_mean: Tensor
    input_squared: Tensor
    column_absolute: Tensor
    column_squared: Tensor
    removal_error: Tensor | None = None
    elimination_error: Tensor | None = None

    def __len__(self) -> int:
        return len(self.loss)

    def select(self, samples: Sequence[int]) -> Statistics:
        """The statistics of some of the samples."""
        rows = torch.as_tensor(samples)
        return replace(self, **{name: getattr(self, name)[rows] for name in _PER_SAMPLE})

    @staticmethod
    def concatenate(parts: Sequence[Statistics]) -> Statistics:
        """Joins statistics of the same model over different samples, in the given order."""
        return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in _PER_SAMPLE})

    def save(self, path: Path) -> None:
        """Writes a safetensors file."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        save_file({name: value for name, value in values.items() if value is not None}, path)

    @staticmethod
    def load(path: Path) -> Statistics:
        """Reads a file written by `save`."""
        return Statistics(**load_file(path))


_PER_SAMPLE = ("taylor", "element_absolute", "element_squared", "loss", "input_mean", "input_squared")


def measure(
    model: PreTrainedModel, structure: Structure, windows: Tensor, batch_size: int = 4, jointly: bool = False
) -> Statistics:
    """Measures all windows; see `measure_in_parts` for the arguments."""
    return Statistics.concatenate(list(measure_in_parts(model, structure, windows, batch_size, jointly)))


def measure_in_parts(
    model: PreTrainedModel,
    structure: Structure,
    windows: Tensor,
    batch_size: int = 4,
    jointly: bool = False,
    first: int = 0,
) -> Iterator[Statistics]:
    """One forward and one backward over each batch of windows; yields the statistics of each batch.

    Args:
        model: any dtype; the statistics are accumulated in float32.
        windows: [samples, tokens], int64.
        batch_size: samples per pass. It bounds the memory and does not change the statistics.
        jointly: treat all windows of a batch as one sample, whose loss is the mean of theirs. Element-wise terms are
            then those of the mean gradient, Σ_k |Σ_j g_jk w_k|, which are not sums over samples (LLM-Pruner,
            arXiv 2305.11627).
        first: the number of the window to begin with.

    Raises:
        AdaPrunerError: a sample gives numbers that are not finite; it is named.
    """
    for start in range(first, len(windows), batch_size):
        batch = windows[start : start + batch_size].to(model.device)
        statistics = _measure_batch(model, structure, batch, jointly)
        _refuse_non_finite(statistics, start)
        yield statistics


def _measure_batch(model: PreTrainedModel, structure: Structure, batch: Tensor, jointly: bool) -> Statistics:
    samples = 1 if jointly else len(batch)
    predicted_tokens = batch.numel() // samples - (len(batch) if jointly else 1)
    vectors = len(structure.group_of_vector)
    taylor, absolute, squared = (torch.zeros(samples, vectors) for _ in range(3))
    input_mean, input_squared = (torch.zeros(samples, len(structure.group_of_input)) for _ in range(2))
    hooks = []
    vector = first_input = 0
    for block in structure.blocks:
        for part in block.matrices:
            columns = slice(vector, vector + block.groups * part.width)
            vector = columns.stop
            rows = part.offset, part.offset + block.groups * part.width
            reduce = _GradientReducer(
                part,
                slice(*rows) if part.axis == 0 else slice(None),
                taylor[:, columns],
                absolute[:, columns],
                squared[:, columns],
            )
            hooks.append(projection(model, part).register_forward_hook(reduce.after_forward))
        inputs = slice(first_input, first_input + block.groups * block.row_wise.width)
        first_input = inputs.stop
        hooks.append(
            projection(model, block.row_wise).register_forward_pre_hook(
                _input_reducer(input_mean[:, inputs], input_squared[:, inputs])
            )
        )
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        # No weight needs a gradient of its own: the hooks form each one from activations, reduce and drop it.
        for parameter in required:
            parameter.requires_grad_(False)
        embedded = model.get_input_embeddings()(batch).requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        losses = _replace_by_loss_gradient(logits.detach(), batch)
        torch.autograd.grad(logits, embedded, grad_outputs=logits.detach())
    finally:
        for parameter in required:
            parameter.requires_grad_(True)
        for hook in hooks:
            hook.remove()
    row_wise = [row_wise_weight(model, block).float() for block in structure.blocks]
    return Statistics(
        taylor=taylor.div_(predicted_tokens),
        element_absolute=absolute.div_(predicted_tokens),
        element_squared=squared.div_(predicted_tokens**2),
        loss=losses.view(samples, -1).mean(1).cpu(),
        input_mean=input_mean,
        input_squared=input_squared,
        column_absolute=torch.cat([weight.abs().sum(0) for weight in row_wise]).cpu(),
        column_squared=torch.cat([weight.square().sum(0) for weight in row_wise]).cpu(),
    )


def projection(model: PreTrainedModel, part: TensorSlice) -> nn.Module:
    """The module that a matrix belongs to."""
    return model.get_submodule(part.module)


def row_wise_weight(model: PreTrainedModel, block: Block) -> Tensor:
    """[outputs, inputs]: the weight of the projection that reads a block."""
    return block.row_wise.as_projection(model.get_parameter(block.row_wise.parameter).detach())


def _input_reducer(mean: Tensor, squared: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def reduce(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().float().reshape(len(mean), -1, mean.shape[1])
        mean.copy_(x.mean(1))
        squared.copy_(x.square().mean(1))

    return reduce


def _replace_by_loss_gradient(logits: Tensor, tokens: Tensor) -> Tensor:
    """Overwrites logits by the gradient of the summed next-token losses, softmax minus one-hot, window by window.

    In place, because logits are the largest activation and no layer needs them for its backward pass. The sum and not
    the mean over tokens, because gradients that are larger by that factor do not underflow in float16.

    Returns:
        [samples, tokens - 1], float32: the losses.
    """
    losses = []
    for window, targets in zip(logits, tokens[:, 1:, None], strict=True):
        scores = window[:-1].float()
        log_normalizer = scores.logsumexp(-1, keepdim=True)
        losses.append((log_normalizer - scores.gather(-1, targets)).squeeze(-1))
        gradient = torch.sub(scores, log_normalizer, out=scores).exp_()
        window[:-1] = gradient.scatter_add_(-1, targets, torch.full_like(log_normalizer, -1.0))
        window[-1] = 0
    return torch.stack(losses)


class _GradientReducer:
    """Forms the weight gradient of one projection, sample by sample, and reduces it to rows or columns."""

    def __init__(self, part: TensorSlice, rows: slice, taylor: Tensor, absolute: Tensor, squared: Tensor) -> None:
        self.part, self.rows = part, rows
        self.taylor, self.absolute, self.squared = taylor, absolute, squared

    def after_forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keeps the input of the projection until the gradient of its output arrives."""
        stored: Any = module.weight
        output.register_hook(self._on_output_gradient(self.part.as_projection(stored)[self.rows], inputs[0].detach()))

    def _on_output_gradient(self, weight: Tensor, projection_input: Tensor) -> Callable[[Tensor], None]:
        def reduce(output_gradient: Tensor) -> None:
            samples, summed_axis = len(self.taylor), 1 - self.part.axis
            x = projection_input.reshape(samples, -1, projection_input.shape[-1]).float()
            delta = output_gradient.reshape(samples, -1, output_gradient.shape[-1])[..., self.rows].float()
            products = torch.empty(weight.shape, device=weight.device)
            squares = torch.empty_like(products)
            for sample in range(samples):
                torch.mm(delta[sample].T, x[sample], out=products)
                products.mul_(weight)
                self.taylor[sample] = products.sum(summed_axis)
                self.squared[sample] = torch.mul(products, products, out=squares).sum(summed_axis)
                self.absolute[sample] = products.abs_().sum(summed_axis)

        return reduce


def _refuse_non_finite(statistics: Statistics, start: int) -> None:
    finite = torch.stack(
        [getattr(statistics, name).view(len(statistics), -1).isfinite().all(1) for name in _PER_SAMPLE]
    ).all(0)
    if not finite.all():
        bad = [start + int(index) for index in torch.nonzero(~finite).flatten()]
        raise AdaPrunerError(
            f"the gradients of calibration sample(s) {bad} are not finite; the model has broken weights or its dtype"
            " is too narrow: try --dtype float32"
        )
