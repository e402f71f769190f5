"""The loss of models on windows of text: one model batch by batch, or one or several layer by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.models import LayerCall, decoder_layers, enter_layers, is_streamed, loaded_layer, skipping_layers

# What the caches of a processor hold, and what keeps a GPU busy.
_TOKENS_PER_BATCH_ON_CPU, _TOKENS_PER_BATCH = 512, 4096
# Whose hidden states are held while all layers of a streamed model are read once: 256 MiB for LLaMA-7B in bfloat16.
_TOKENS_PER_READING = 32768


@dataclass(frozen=True)
class Prefix:
    """What comes out of the first layers of a model for every batch of some windows.

    Attributes:
        states: for each batch, the hidden state [windows, tokens, hidden] in front of the first layer, behind it,
            behind the second, and so on.
        calls: for each batch, what a layer is called with.
    """

    states: list[list[Tensor]]
    calls: list[LayerCall]

    def in_place(self, model: PreTrainedModel, batch: int, layers: int) -> contextlib.AbstractContextManager[None]:
        """While it lasts, the first layers of a model are not computed, which are those of the model of the prefix."""
        known = min(layers, len(self.states[batch]) - 1)
        if not known:
            return contextlib.nullcontext()
        return skipping_layers(model, known, self.states[batch][known], self.calls[batch])


def compute_prefix(model: PreTrainedModel, windows: Tensor, layers: int) -> Prefix:
    """Runs the first layers of a model over windows, in the batches of `losses_by_batch`."""
    with torch.inference_mode():
        entered = enter_layers(model, _batches(windows, model))
        states = [[state] for state, _ in entered]
        for index in range(layers):
            with loaded_layer(model, index) as layer:
                for of_batch, (_, calls) in zip(states, entered, strict=True):
                    of_batch.append(calls[index].run(layer, of_batch[-1]))
    return Prefix(states, [calls[0] for _, calls in entered])


def losses_by_batch(
    model: PreTrainedModel,
    windows: Tensor,
    references: Sequence[Tensor] | None = None,
    context: int = 1,
    prefix: Prefix | None = None,
    prefix_layers: int = 0,
) -> Iterator[Tensor]:
    """[windows of one batch], float64, batch after batch: the mean over the predicted tokens of each window. Many
    batches go through the layers of a streamed model together, so that a layer is read once for all of them.

    Args:
        references: of another model, from `log_probabilities` of the same windows: gives the Kullback-Leibler
            divergence from that model to this one in place of the negative log-likelihood of the text.
        context: tokens at the beginning of a window that are not predicted, at least 1.
        prefix: of a model whose first layers are the same, and which need not be computed again.
        prefix_layers: how many are the same.
    """
    batches = _batches(windows, model)
    if is_streamed(model) and prefix is None:
        itself = [(model, range(len(decoder_layers(model))))]
        at_once = max(1, _TOKENS_PER_READING // batches[0].numel())
        for first in range(0, len(batches), at_once):
            part = slice(first, first + at_once)
            of_part = None if references is None else references[part]
            yield from losses_in_step(model, itself, torch.cat(list(batches[part])), of_part, context=context)[0]
        return
    for number, batch in enumerate(batches):
        known = prefix.in_place(model, number, prefix_layers) if prefix else contextlib.nullcontext()
        with torch.inference_mode(), known:
            reference = references[number] if references is not None else None
            of_batch = _losses_of_batch(model, batch, reference, context)
        yield of_batch


def losses_in_step(
    dense: PreTrainedModel,
    models: Sequence[tuple[PreTrainedModel, Sequence[int]]],
    windows: Tensor,
    references: Sequence[Tensor] | None = None,
    prefix: Prefix | None = None,
    prefix_layers: int = 0,
    context: int = 1,
) -> list[list[Tensor]]:
    """What `losses_by_batch` gives for each of several models whose layers are cut out of streamed ones when they are
    read: all of them go through the layers together, so that every layer of the dense model is read once.

    Args:
        models: each with the numbers of the dense layers that its layers are cut out of.
        references, context: see `losses_by_batch`.
        prefix: of the dense model; `prefix_layers` of it are the same in all models.
    """
    batches = _batches(windows, dense)
    known = min(prefix_layers, len(prefix.states[0]) - 1) if prefix else 0
    with torch.inference_mode():
        with loaded_layer(dense, 0):
            entered = [enter_layers(model, batches) for model, _ in models]
        calls = [[own for _, own in of_model] for of_model in entered]
        states = [
            [prefix.states[number][known] if prefix else state for number, (state, _) in enumerate(of_model)]
            for of_model in entered
        ]
        for layer in range(known, len(decoder_layers(dense))):
            with loaded_layer(dense, layer):
                for (model, kept), of_model, own in zip(models, states, calls, strict=True):
                    if layer in kept:
                        index = kept.index(layer)
                        with loaded_layer(model, index) as module:
                            of_model[:] = [
                                call[index].run(module, state) for state, call in zip(of_model, own, strict=True)
                            ]
        return [
            [
                _losses_of_states(
                    model, batch, state, call[0], None if references is None else references[number], context
                )
                for number, (batch, state, call) in enumerate(zip(batches, of_model, own, strict=True))
            ]
            for (model, _), of_model, own in zip(models, states, calls, strict=True)
        ]


def _losses_of_states(
    model: PreTrainedModel, batch: Tensor, state: Tensor, call: LayerCall, reference: Tensor | None, context: int
) -> Tensor:
    """[windows], float64: of what comes out of the last layer of a model for a batch."""
    with skipping_layers(model, len(decoder_layers(model)), state, call):
        return _losses_of_batch(model, batch, reference, context)


def _losses_of_batch(model: PreTrainedModel, batch: Tensor, reference: Tensor | None, context: int) -> Tensor:
    """[windows], float64, on the CPU: see `losses_by_batch`."""
    batch = batch.to(model.device)
    losses = []
    # Window by window: float32 logits of a batch are the largest thing in memory.
    for window, own in enumerate(_predictions(model, batch)):
        if reference is None:
            loss = functional.cross_entropy(own.float(), batch[window, 1:], reduction="none")
        else:
            expected = reference[window].to(own.device).float()
            divergence = functional.kl_div(own.float().log_softmax(-1), expected, reduction="none", log_target=True)
            loss = divergence.sum(-1)
        losses.append(loss[context - 1 :].double().mean())
    return torch.stack(losses).cpu()


def log_probabilities(model: PreTrainedModel, windows: Tensor) -> list[Tensor]:
    """[windows of one batch, tokens - 1, vocabulary], float16, for every batch: what the model predicts."""
    with torch.inference_mode():
        return [_predictions(model, batch).float().log_softmax(-1).half().cpu() for batch in _batches(windows, model)]


def tokens_per_batch(device: torch.device) -> int:
    """How many tokens are evaluated at once."""
    return _TOKENS_PER_BATCH_ON_CPU if device.type == "cpu" else _TOKENS_PER_BATCH


def _batches(windows: Tensor, model: PreTrainedModel) -> Sequence[Tensor]:
    batches: Sequence[Tensor] = windows.split(max(1, tokens_per_batch(model.device) // windows.shape[1]))
    return batches


def _predictions(model: PreTrainedModel, batch: Tensor) -> Tensor:
    logits: Tensor = model(batch.to(model.device), use_cache=False).logits
    return logits[:, :-1]
