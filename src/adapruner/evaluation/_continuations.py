"""How a model reads the continuation of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import PreTrainedModel

from adapruner.evaluation._losses import tokens_per_batch


class Text(NamedTuple):
    """The tokens of a prompt and of its continuation."""

    prompt: list[int]
    continuation: list[int]


@torch.inference_mode()
def read(model: PreTrainedModel, texts: Sequence[Text]) -> list[tuple[Tensor, Tensor]]:
    """For every token of each continuation, given all tokens before: the negative log-likelihood in nats, float32, and
    the token that the model predicts, int64.

    Rows are padded on the right, which needs no mask, and cut on the left where the model has few positions. Texts that
    differ in their last token alone are one row.
    """
    room = getattr(model.config, "max_position_embeddings", None) or 0
    texts_of_row: dict[tuple[int, ...], list[int]] = {}
    for number, (prompt, continuation) in enumerate(texts):
        texts_of_row.setdefault((*prompt, *continuation[:-1])[-room:], []).append(number)
    rows = sorted(texts_of_row, key=len, reverse=True)
    readings: dict[int, tuple[Tensor, Tensor]] = {}
    while rows:
        at_once = max(1, tokens_per_batch(model.device) // len(rows[0]))
        batch, rows = rows[:at_once], rows[at_once:]
        tokens = torch.tensor([(*row, *[0] * (len(batch[0]) - len(row))) for row in batch], device=model.device)
        numbers = [number for row in batch for number in texts_of_row[row]]
        written = [torch.tensor(texts[number].continuation, dtype=torch.long) for number in numbers]
        lengths = [len(continuation) for continuation in written]
        predicted = model(input_ids=tokens, use_cache=False).logits
        targets = iter(torch.cat(written).to(predicted.device).split(lengths))
        losses, chosen = [], []
        # Text by text: float32 logits of a batch are the largest thing in memory.
        for row, logits in zip(batch, predicted, strict=True):
            for _ in texts_of_row[row]:
                target = next(targets)
                predictions = logits[len(row) - len(target) : len(row)].float()
                losses.append(functional.cross_entropy(predictions, target, reduction="none"))
                chosen.append(predictions.argmax(-1))
        both = (torch.cat(parts).cpu().split(lengths) for parts in (losses, chosen))
        readings |= dict(zip(numbers, zip(*both, strict=True), strict=True))
    return [readings[number] for number in range(len(texts))]
