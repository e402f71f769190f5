"""Windows with images: what a decoder is called with inside a multimodal model, and what it reads of it alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from adapruner import AdaPrunerError
from adapruner.evaluation import window_losses
from adapruner.families import open_model
from adapruner.measurement import measure, measure_moments
from adapruner.models import Pictures, find_model, see, show_pictures
from adapruner.structure import build_structure
from adapruner.surgery import prune_model
from test_multimodal import counts_of, masked_around, write
from tiny_families import random_plan
from tiny_wrappers import IMAGE_TOKEN, with_image

FAMILIES = ("gemma3", "llava", "mistral3", "smolvlm", "internvl", "qwen2_5_vl")
FIRST = 1000


def inputs_of(model_type: str) -> dict[str, Tensor]:
    """Those with an image in float64, and two tokens more after it."""
    inputs = with_image(model_type, torch.float64)
    for name, value in inputs.items():
        if value.shape == inputs["attention_mask"].shape:
            more = {"input_ids": [[31, 45]], "attention_mask": [[1, 1]]}.get(name, [[0, 0]])
            inputs[name] = torch.cat([value, torch.tensor(more)], 1)
    return inputs


def windows_of(model_type: str, whole: PreTrainedModel) -> tuple[Tensor, Pictures, dict[str, Tensor]]:
    """A window of text and one with an image, the table of the image, and the inputs with the image."""
    inputs = inputs_of(model_type)
    length = inputs["input_ids"].shape[1] - 1
    seen = see(whole, inputs, length)
    assert torch.equal(seen.is_image, inputs["input_ids"][0, :length] == IMAGE_TOKEN)
    of_text = {name: torch.zeros_like(value) for name, value in inputs.items() if "type_ids" in name}
    text = torch.arange(5, 5 + length)[None]
    plain = see(whole, {"input_ids": text, **{name: value[:, :length] for name, value in of_text.items()}}, length)
    arguments = {name: torch.stack([plain.arguments[name], value]) for name, value in seen.arguments.items()}
    rows = int(seen.is_image.sum())
    pictures = Pictures(FIRST, seen.embedded[seen.is_image], torch.ones(rows, dtype=torch.int64), arguments)
    window = inputs["input_ids"][0, :length].clone()
    window[seen.is_image] = -1 - FIRST - torch.arange(rows)
    cut = {
        name: value[:, :length] if value.shape == inputs["input_ids"].shape else value for name, value in inputs.items()
    }
    return torch.stack([text[0], window]), pictures, cut


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_decoder_reads_images_as_it_does_inside(
    model_type: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    whole: Any = write(model_type, tmp_path, tokenizer)
    windows, pictures, inputs = windows_of(model_type, whole)
    assert bool(pictures.arguments) == (model_type in ("gemma3", "qwen2_5_vl"))
    decoder = show_pictures(open_model(find_model(str(tmp_path))), [pictures])
    structure = build_structure(decoder)
    plan = random_plan(structure, counts_of(structure, "per-layer"))
    with torch.no_grad():
        logits = decoder(windows).logits
        torch.testing.assert_close(logits[1:], whole(**inputs).logits, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(logits[:1], whole(input_ids=windows[:1]).logits, rtol=1e-9, atol=1e-9)
        pruned = prune_model(decoder, structure, plan)(windows[1:]).logits
        expected = masked_around(decoder, structure, plan, whole)(**inputs).logits
        torch.testing.assert_close(pruned, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model_type", ["gemma3", "llava", "qwen2_5_vl"])
def test_measuring_reads_images_and_predicts_text_alone(
    model_type: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    whole: Any = write(model_type, tmp_path, tokenizer)
    windows, pictures, inputs = windows_of(model_type, whole)
    decoder = show_pictures(open_model(find_model(str(tmp_path))), [pictures])
    structure = build_structure(decoder)
    with torch.no_grad():
        logits = whole(**inputs).logits[0, :-1]
    targets = windows[1, 1:]
    expected = functional.cross_entropy(logits[targets >= 0], targets[targets >= 0])
    losses = window_losses(decoder, windows)
    torch.testing.assert_close(losses[1], expected.double())
    statistics = measure(decoder, structure, windows)
    torch.testing.assert_close(statistics.loss.double(), losses, rtol=1e-5, atol=1e-5)
    layer_wise = measure(decoder, structure, windows, layer_wise=True)
    torch.testing.assert_close(layer_wise.taylor, statistics.taylor, rtol=1e-4, atol=1e-6)
    alone = measure(decoder, structure, windows[1:])
    torch.testing.assert_close(alone.taylor, statistics.taylor[1:], rtol=1e-4, atol=1e-6)
    # The mean over the windows of the mean squares of their inputs is the diagonal of the second moments.
    moments = dict(measure_moments(decoder, structure, windows))
    squares = statistics.input_squared.mean(0).split([block.inputs for block in structure.blocks])
    for number, block in enumerate(structure.blocks):
        if not block.is_normalized:
            torch.testing.assert_close(moments[number].second.diagonal(), squares[number], rtol=1e-4, atol=1e-6)


def test_images_that_reach_layers_another_way_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    whole = write("qwen3_vl", tmp_path, tokenizer)
    with pytest.raises(AdaPrunerError, match="reach the decoder of a qwen3_vl as visual_pos_masks"):
        see(whole, inputs_of("qwen3_vl"), 12)
