"""The seconds of each kind of work of a run on this machine, timed on a little of it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
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


def time_work(
    kinds: Collection[str],
    dense: PreTrainedModel,
    fast: PreTrainedModel,
    structure: Structure,
    seq_len: int,
    terms: Terms,
) -> dict[str, float]:
    """The seconds of a unit of each kind of work; a kind takes about as long as a batch.

    Args:
        kinds: `layers` and `predictions`: a token in all decoder layers, and in the head with its loss, in the dtype of
            trials; `evaluated`: both, in the dtype of the weights; `written`: a token that a model writes;
            `measured`: a token whose gradients are reduced to statistics; `learnt`: a token in a forward and a backward
            pass; `sums`: a product of a token in second moments; `solved`: a system of equations, for the cube of its
            inputs.
        dense: in the dtype of its weights; its layers are in memory.
        fast: in the dtype of trials.
        seq_len: tokens of a window.
        terms: to measure.
    """
    device, generator = dense.device, torch.Generator().manual_seed(0)
    # None of them is 0, which pads the text of many models: they would warn of it.
    size = max(1, tokens_per_batch(device) // seq_len), seq_len
    windows = torch.randint(1, dense.config.vocab_size, size, generator=generator)
    few = windows[: _WINDOWS_ON_CPU if device.type == "cpu" else _WINDOWS]
    texts = texts_at_once(windows.numel(), seq_len, device)
    width = min(_MOST_INPUTS, max(block.inputs_of_one for block in structure.blocks))
    inputs = torch.randn(_TOKENS_SUMMED, width, generator=generator).to(device)
    second = inputs.T @ inputs
    window_losses(dense, windows[:1])  # the first time, weights are read from files
    prefix = compute_prefix(fast, windows, structure.layers, keep_all=False)
    states = [state for (state,) in prefix.states]
    work: dict[str, tuple[Callable[[], Any], int]] = {
        "layers": (partial(compute_prefix, fast, windows, structure.layers, keep_all=False), windows.numel()),
        "predictions": (partial(losses_after_layers, fast, windows, states, prefix.calls), windows.numel()),
        "evaluated": (partial(window_losses, dense, few), few.numel()),
        "written": (
            partial(continue_texts, fast, [[0]] * texts, _NEW_TOKENS, torch.ones(texts), 0),
            texts * _NEW_TOKENS,
        ),
        "measured": (partial(measure, dense, structure, few, len(few), terms=terms), few.numel()),
        "learnt": (partial(measure, fast, structure, few, len(few), terms="vector-wise"), few.numel()),
        "sums": (partial(add_products, torch.zeros_like(second), inputs), inputs.numel() * width),
        "solved": (partial(solve_damped, second, 1.0, second[:, ::2]), width**3),
    }
    seconds = {}
    for kind in kinds:
        run, units = work[kind]
        started = now(device)
        run()
        seconds[kind] = (now(device) - started) / units
    return seconds
