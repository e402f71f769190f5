"""Perplexity against the loss that transformers computes."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedModel

from adapruner import evaluation
from adapruner.evaluation import measure_perplexity, window_losses


def test_equals_the_loss_of_transformers(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = torch.randint(3, 96, (7, 12), generator=torch.Generator().manual_seed(0))
    monkeypatch.setitem(evaluation._TOKENS_PER_BATCH, "cpu", 36)
    with torch.no_grad():
        expected = [float(model(window[None], labels=window[None]).loss) for window in windows]
    torch.testing.assert_close(window_losses(model, windows), torch.tensor(expected).double(), rtol=1e-5, atol=1e-5)
    steps: list[int] = []
    result = measure_perplexity(model, windows, "text", steps.append)
    assert math.isclose(result.perplexity, math.exp(sum(expected) / 7), rel_tol=1e-5)
    assert steps == [3, 3, 1]


def test_the_protocol_is_said(model: PreTrainedModel) -> None:
    result = measure_perplexity(model, torch.full((3, 10), 5), "wikitext2")
    assert result.protocol == ("wikitext2: 3 windows of 10 tokens without overlap, mean over 27 predicted tokens")
    assert result.as_json()["predicted_tokens"] == 27
