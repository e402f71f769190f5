"""Perplexity against the loss that transformers computes."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedModel

from adapruner.evaluation import _perplexity, measure_perplexity, window_losses


def test_equals_the_loss_of_transformers(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = torch.randint(3, 96, (7, 12), generator=torch.Generator().manual_seed(0))
    monkeypatch.setitem(_perplexity._TOKENS_PER_BATCH, "cpu", 36)
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


@pytest.mark.parametrize("stride", [1, 5, 11])
def test_overlapping_windows_predict_every_token_once(model: PreTrainedModel, stride: int) -> None:
    tokens = torch.randint(3, 96, (12 + 6 * stride,), generator=torch.Generator().manual_seed(0))
    expected = []
    with torch.no_grad():
        for target in range(1, len(tokens)):
            # The window whose last `stride` tokens hold the target, or the first one.
            step = max(0, math.ceil((target - 11) / stride))
            given = tokens[step * stride : target]
            expected.append(-float(model(given[None]).logits[0, -1].log_softmax(-1)[tokens[target]]))
    windows = tokens.unfold(0, 12, stride)
    result = measure_perplexity(model, windows, "text", stride=stride)
    assert result.predicted_tokens == len(expected)
    assert math.isclose(result.perplexity, math.exp(sum(expected) / len(expected)), rel_tol=1e-4)
    assert f"windows of 12 tokens every {stride} tokens" in result.protocol


def test_provenance_is_part_of_the_protocol(model: PreTrainedModel) -> None:
    result = measure_perplexity(model, torch.full((3, 10), 5), "a", provenance={"data_set": "b", "revision": "c"})
    assert result.protocol.endswith("predicted tokens (data set b, revision c)")
    assert result.as_json()["provenance"] == {"data_set": "b", "revision": "c"}
