"""The seconds of each kind of work of a run on this machine, timed on a little of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.config import Terms
from adapruner.evaluation import compute_prefix, losses_after_layers, now, tokens_per_batch, window_losses
from adapruner.measurement import add_products, measure, solve_damped
from adapruner.models import continue_texts, texts_at_once
from adapruner.structure import Structure

# Windows of a batch with gradients; on a processor fewer, which are as fast.
_WINDOWS, _WINDOWS_ON_CPU = 4, 2
_NEW_TOKENS, _TOKENS_SUMMED = 2, 1024
# The largest system of equations that is timed.
_MOST_INPUTS = 2048


class Pace:
    """Seconds by kind of work. Each is timed when it is first asked for, and takes about as long as a batch.

    Args:
        dense: in the dtype of its weights; its layers are in memory.
        fast: in the dtype of trials.
        seq_len: tokens of a window.
        terms: to measure.
    """

    def __init__(
        self, dense: PreTrainedModel, fast: PreTrainedModel, structure: Structure, seq_len: int, terms: Terms
    ) -> None:
        self._dense, self._fast, self._structure, self._terms = dense, fast, structure, terms
        size = max(1, tokens_per_batch(dense.device) // seq_len), seq_len
        generator = torch.Generator().manual_seed(0)
        # None of them is 0, which pads the text of many models: they would warn of it.
        self._windows = torch.randint(1, dense.config.vocab_size, size, generator=generator)
        self._few = self._windows[: _WINDOWS_ON_CPU if dense.device.type == "cpu" else _WINDOWS]
        for model in (dense, fast):  # the first time, weights are read from files
            window_losses(model, self._windows[:1])

    @cached_property
    def layers(self) -> float:
        """Of a token in all decoder layers, in the dtype of trials."""
        return self._read[0]

    @cached_property
    def predictions(self) -> float:
        """Of a token in the head, and of its loss."""
        return self._read[1]

    @cached_property
    def evaluated(self) -> float:
        """Of a token in the whole model and of its loss, in the dtype of the weights."""
        if self._dense is self._fast:
            return self.layers + self.predictions
        return self._time(partial(window_losses, self._dense, self._few))[0] / self._few.numel()

    @cached_property
    def steps(self) -> float:
        """Of writing a token of every text of a batch, but for `written`."""
        return self._write(1)

    @cached_property
    def written(self) -> float:
        """Of writing a token of one more text of a batch."""
        texts = texts_at_once(self._windows.numel(), self._windows.shape[1], self._dense.device)
        return max(0.0, self._write(texts) - self.steps) / texts

    @cached_property
    def measured(self) -> float:
        """Of a token in a window whose gradients are reduced to statistics."""
        run = partial(measure, self._dense, self._structure, self._few, len(self._few), terms=self._terms)
        return self._time(run)[0] / self._few.numel()

    @cached_property
    def learnt(self) -> float:
        """Of a token in a forward and a backward pass without gradients of weights, in the dtype of trials."""
        run = partial(measure, self._fast, self._structure, self._few, len(self._few), terms="vector-wise")
        return self._time(run)[0] / self._few.numel()

    @cached_property
    def sums(self) -> float:
        """Of a token in the second moments of a block, for each of these."""
        inputs = self._inputs
        second = inputs.new_zeros(inputs.shape[1], inputs.shape[1])
        return self._time(partial(add_products, second, inputs))[0] / (inputs.numel() * inputs.shape[1])

    @cached_property
    def solved(self) -> float:
        """Of a system of equations for a block, divided by the cube of its inputs."""
        second = self._inputs.T @ self._inputs
        return self._time(partial(solve_damped, second, 1.0, second[:, ::2]))[0] / len(second) ** 3

    @cached_property
    def _read(self) -> tuple[float, float]:
        seconds, prefix = self._time(
            partial(compute_prefix, self._fast, self._windows, self._structure.layers, keep_all=False)
        )
        states = [state for (state,) in prefix.states]
        judged, _ = self._time(partial(losses_after_layers, self._fast, self._windows, states, prefix.calls))
        return seconds / self._windows.numel(), judged / self._windows.numel()

    def _write(self, texts: int) -> float:
        write = partial(continue_texts, self._fast, [[0]] * texts, _NEW_TOKENS, torch.ones(texts), 0)
        return self._time(write)[0] / _NEW_TOKENS

    @cached_property
    def _inputs(self) -> Tensor:
        """[tokens, inputs], float32."""
        size = min(_MOST_INPUTS, max(block.inputs_of_one for block in self._structure.blocks))
        return torch.randn(_TOKENS_SUMMED, size, generator=torch.Generator().manual_seed(0)).to(self._dense.device)

    def _time(self, work: Callable[[], Any]) -> tuple[float, Any]:
        started = now(self._dense.device)
        done = work()
        return now(self._dense.device) - started, done
