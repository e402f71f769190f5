"""Statistics of the samples of a pool, from one forward and one backward pass over each."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from adapruner.base.errors import AdaPrunerError, NonFiniteError
from adapruner.measurement.reduction import Reduction, row_wise_weights
from adapruner.model.architecture import check_windows, stock_config
from adapruner.model.layers import decoder_layers, enter_layers, loaded_layer, skipping_layers
from adapruner.structure.blocks import Structure

# Samples measured at once; layer by layer, the activations of one layer are kept, so more samples fit.
MEASURED_AT_ONCE = {False: 4, True: 16}
_FROM_MOMENTS = ("removal_error", "elimination_error", "tempered_error", "conditional_variance")
_OF_ALL_SAMPLES = ("column_absolute", "column_squared", *_FROM_MOMENTS)


@dataclass(frozen=True)
class Statistics:
    """The data of importance terms, in float32; vectors, inputs and groups as in `Structure`.

    With g the gradient of the mean loss of one sample, w the weights of one vector, x an input of a row-wise projection
    at the tokens of one sample, and W_c the column of the projection that multiplies it:

    Attributes:
        taylor: [samples, vectors], Σ_k g_k w_k, signed.
        element_absolute: [samples, vectors], Σ_k |g_k w_k|.
        element_squared: [samples, vectors], Σ_k (g_k w_k)².
        loss: [samples], the mean loss in nats per predicted token.
        input_mean: [samples, inputs], mean of x.
        input_squared: [samples, inputs], mean of x².
        column_absolute: [inputs], Σ|W_c|.
        column_squared: [inputs], ‖W_c‖².
        routed_output: [samples, groups], for an expert the mean over all tokens of router weight · ‖output‖, 0 for
            tokens that are sent elsewhere; zeros for other groups; None without experts.
        routed_share: [samples, groups], the share of tokens that are sent to an expert; likewise.
        removal_error, elimination_error, tempered_error, conditional_variance: [groups], from second moments
            (`removal_errors`), which may be measured on other and more text than the samples; None if they were not
            measured.
    """

    taylor: Tensor
    element_absolute: Tensor
    element_squared: Tensor
    loss: Tensor
    input_mean: Tensor
    input_squared: Tensor
    column_absolute: Tensor
    column_squared: Tensor
    routed_output: Tensor | None = None
    routed_share: Tensor | None = None
    removal_error: Tensor | None = None
    elimination_error: Tensor | None = None
    tempered_error: Tensor | None = None
    conditional_variance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def per_sample(self) -> dict[str, Tensor]:
        """The measured values that differ from sample to sample, [samples, ·]."""
        return {name: value for name, value in self._present.items() if name not in _OF_ALL_SAMPLES}

    @property
    def _present(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def select(self, samples: Sequence[int]) -> Statistics:
        """The statistics of some of the samples."""
        rows = torch.as_tensor(samples)
        return replace(self, **{name: value[rows] for name, value in self.per_sample.items()})

    @staticmethod
    def concatenate(parts: Sequence[Statistics]) -> Statistics:
        """Joins statistics of the same model over different samples, in the given order."""
        return replace(
            parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in parts[0].per_sample}
        )

    def save(self, path: Path) -> None:
        """Writes a safetensors file."""
        save_file(self._present, path)

    @staticmethod
    def load(path: Path) -> Statistics:
        """Reads a file written by `save`."""
        return Statistics(**load_file(path))


@torch.inference_mode(False)  # gradients are needed, whatever the caller does
def measure(
    model: PreTrainedModel,
    structure: Structure,
    windows: Tensor,
    batch_size: int = 4,
    jointly: bool = False,
    layer_wise: bool = False,
) -> Statistics:
    """Statistics for importance terms, from one forward and one backward pass; weights get no gradients.

    Args: those of `measure_in_parts`; the model is in evaluation mode and on its device, its structure from `inspect`.

    Returns:
        Statistics per sample, [samples, vectors] and [samples, inputs], on the CPU; `Statistics.select` takes a subset.

    Raises:
        AdaPrunerError: the model is in training mode or of inference mode, or the windows are not of its tokens.
        NonFiniteError: a sample, which is named, gives numbers that are not finite.
    """
    check_windows(windows, "windows", model)
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise AdaPrunerError("the weights were made in torch.inference_mode, and have no gradients: load them outside")
    parts = measure_in_parts(model, structure, windows, batch_size, jointly, layer_wise)
    return Statistics.concatenate([statistics for _, statistics in parts])


def measure_in_parts(
    model: PreTrainedModel,
    structure: Structure,
    windows: Tensor,
    batch_size: int = 4,
    jointly: bool = False,
    layer_wise: bool = False,
    folder: Path | None = None,
    starts: Iterable[int] | None = None,
) -> Iterator[tuple[int, Statistics]]:
    """One forward and one backward over each batch of windows; yields the number of its first window, and statistics.

    Args:
        model: any dtype; the statistics are accumulated in float32.
        windows: [samples, tokens], int64.
        batch_size: samples per pass; bounds the memory.
        jointly: treat all windows of a batch as one sample, with the mean of their losses. Element-wise terms are
            then those of the mean gradient, Σ_k |Σ_j g_jk w_k|, which are not sums over samples (LLM-Pruner,
            arXiv 2305.11627).
        layer_wise: keep the activations of one layer only, and run every layer forward again when its gradient
            arrives: a third more work for the same statistics. With streamed layers, only the sums grow with the
            number of layers.
        folder: for temporary files with the hidden states between layers; by default the folder of the system.
        starts: first windows of the batches, read one at a time; by default all.
    """
    columns = _column_sums(model, structure)
    required = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for start in range(0, len(windows), batch_size) if starts is None else starts:
        batch = windows[start : start + batch_size].to(model.device)
        # The gradients of experts are whole, and of one sample.
        passes = batch.split(1) if structure.cuts_experts and not jointly else [batch]
        measured = []
        try:
            # No weight needs a gradient of its own: the hooks form each one from activations, reduce and drop it.
            model.requires_grad_(False)
            for rows in passes:
                samples = 1 if jointly else len(rows)
                reduction = Reduction(structure, samples, batch.device)
                if layer_wise:
                    losses = _pass_layer_by_layer(model, structure, rows, reduction, folder)
                else:
                    losses = _pass_at_once(model, structure, rows, reduction)
                measured.append(_statistics(reduction, losses.view(samples, -1), columns))
        finally:
            for name in required:
                model.get_parameter(name).requires_grad_(True)
        statistics = Statistics.concatenate(measured)
        finite = [values.view(len(statistics), -1).isfinite().all(1) for values in statistics.per_sample.values()]
        if bad := [start + int(index) for index in torch.nonzero(~torch.stack(finite).all(0)).flatten()]:
            raise NonFiniteError(
                f"the gradients of calibration sample(s) {bad} are not finite; the model has broken weights or its"
                " dtype is too narrow: try `dtype` float32"
            )
        yield start, statistics


_saved: dict[tuple[object, ...], float] = {}


def saved_activations(config: PreTrainedConfig, dtype: torch.dtype) -> float:
    """Bytes per token that a decoder layer keeps for its backward pass and the gradients of its weights, counted by
    running one layer on a few tokens: once in a process, because a large layer takes seconds."""
    key = type(config), config.to_json_string(), config._attn_implementation, dtype
    if key in _saved:
        return _saved[key]
    shortened = copy.deepcopy(stock_config(config))
    shortened.num_hidden_layers = 1
    for name in ("layer_types", "layers_block_type"):
        if of_layers := vars(shortened).get(name):  # in some families it is computed from other fields
            setattr(shortened, name, of_layers[:1])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shortened, dtype=dtype)
    tokens = torch.full((2, 16), int(shortened.pad_token_id == 0))  # of padding, transformers would warn
    with torch.no_grad():
        ((state, calls),) = enter_layers(model.to_empty(device="cpu").eval(), [tokens])
    (layer,) = decoder_layers(model)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = calls[0].run(layer, state.requires_grad_())
    # Weights, masks and positions are held once, and not for every layer.
    given = tree_leaves((list(layer.parameters()), calls[0].arguments, calls[0].named))
    shared = {tensor.untyped_storage().data_ptr() for tensor in given if isinstance(tensor, Tensor)}
    del output
    _saved[key] = sum(size for storage, size in kept.items() if storage not in shared) / tokens.numel()
    return _saved[key]


def _pass_at_once(model: PreTrainedModel, structure: Structure, batch: Tensor, reduction: Reduction) -> Tensor:
    """[samples, tokens - 1], float32: the losses."""
    blocks = range(len(structure.blocks))
    with _expert_gradients(model, structure, blocks) as wanted, reduction.watching(model, blocks):
        embedding, seen = model.get_input_embeddings(), list[Tensor]()
        with embedding.register_forward_hook(lambda *call: seen.append(call[-1].requires_grad_())):
            logits = model(batch, use_cache=False).logits
        losses = _replace_by_loss_gradient(logits.detach(), batch)
        torch.autograd.backward(logits, logits.detach(), inputs=[seen[0], *wanted])
    return losses


@contextlib.contextmanager
def _expert_gradients(
    model: PreTrainedModel, structure: Structure, blocks: Iterable[int]
) -> Iterator[list[torch.nn.Parameter]]:
    """The weights of the experts of some blocks, which need gradients while this lasts."""
    chosen = [structure.blocks[number] for number in blocks]
    expert_blocks = [block for block in chosen if block.experts or not block.is_projected]
    names = {matrix.parameter for block in expert_blocks for matrix in block.matrices}
    wanted = [model.get_parameter(name) for name in sorted(names)]
    for parameter in wanted:
        parameter.requires_grad_(True)
    try:
        yield wanted
    finally:
        for parameter in wanted:
            parameter.requires_grad_(False)


def _pass_layer_by_layer(
    model: PreTrainedModel, structure: Structure, batch: Tensor, reduction: Reduction, folder: Path | None
) -> Tensor:
    """[samples, tokens - 1], float32: the losses."""
    with tempfile.TemporaryDirectory(dir=folder) as spilled:
        paths = [Path(spilled, f"{index}.safetensors") for index in range(structure.layers)]
        with torch.no_grad():
            ((state, calls),) = enter_layers(model, [batch])
            for index, path in enumerate(paths):
                save_file({"state": state.contiguous()}, path)
                with loaded_layer(model, index) as layer:
                    state = calls[index].run(layer, state)
        state = state.detach().requires_grad_()
        with skipping_layers(model, structure.layers, state, calls[0]):
            logits = model(batch, use_cache=False).logits
        losses = _replace_by_loss_gradient(logits.detach(), batch)
        (gradient,) = torch.autograd.grad(logits, state, grad_outputs=logits.detach())
        del logits
        for index in reversed(range(structure.layers)):
            state = load_file(paths[index])["state"].to(model.device).requires_grad_()
            blocks = [number for number, block in enumerate(structure.blocks) if block.layer == index]
            with (
                loaded_layer(model, index) as layer,
                _expert_gradients(model, structure, blocks) as wanted,
                reduction.watching(model, blocks),
            ):
                output = calls[index].run(layer, state)
                torch.autograd.backward(output, gradient, inputs=[state, *wanted])
                gradient = cast(Tensor, state.grad)
                del output
    return losses


def _statistics(reduction: Reduction, losses: Tensor, columns: dict[str, Tensor]) -> Statistics:
    """Statistics of the mean loss, from sums over the gradient of the summed loss; `losses` is [samples, tokens]."""
    tokens = losses.shape[1]
    divisors = {"taylor": tokens, "element_absolute": tokens, "element_squared": tokens**2}
    sums = {name: value.div_(divisors.get(name, 1)).cpu() for name, value in reduction.sums.items()}
    loss = losses.sum(1, keepdim=True).div_(tokens).flatten()
    return Statistics(loss=loss.cpu(), **sums, **columns)


def _column_sums(model: PreTrainedModel, structure: Structure) -> dict[str, Tensor]:
    """By the name in `Statistics`, [inputs] each: Σ|W_c| and ‖W_c‖² of the columns of all row-wise projections."""
    absolute, squared = [torch.zeros(0)], [torch.zeros(0)]
    for layer, blocks in groupby(structure.blocks, key=lambda block: block.layer):
        with loaded_layer(model, layer):
            for block in filter(lambda block: block.is_projected, blocks):
                weights = row_wise_weights(model, block).float()
                absolute.append(weights.abs().sum(1).flatten().cpu())
                squared.append(weights.square().sum(1).flatten().cpu())
    return {"column_absolute": torch.cat(absolute), "column_squared": torch.cat(squared)}


def _replace_by_loss_gradient(logits: Tensor, tokens: Tensor) -> Tensor:
    """[samples, tokens - 1], float32: the next-token losses. Overwrites the logits by the gradient of their sum,
    softmax minus one-hot, window by window.

    In place, because logits are the largest activation and no layer needs them for its backward pass. The sum over
    tokens, because the gradients of the mean would underflow in float16.
    """
    losses = []
    for window, targets in zip(logits, tokens[:, 1:, None], strict=True):
        scores = window[:-1].float()
        largest, of_target = scores.amax(-1, keepdim=True), scores.gather(-1, targets)
        gradient = torch.softmax(scores, -1, out=scores)
        # The largest probability never underflows, that of the target may.
        losses.append((largest - gradient.amax(-1, keepdim=True).log() - of_target).squeeze(-1))
        gradient.scatter_add_(-1, targets, torch.full_like(largest, -1.0))
        if window.dtype != torch.float32:
            window[:-1] = gradient
        window[-1] = 0
    return torch.stack(losses)
