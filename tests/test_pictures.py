"""Windows with images: what a decoder is called with inside a multimodal model, and what it reads of it alone."""

from __future__ import annotations

import copy
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForMultimodalLM, AutoProcessor, PreTrainedModel, PreTrainedTokenizerFast

import adapruner
from adapruner import AdaPrunerError, verbs
from adapruner.calibration import has_images, parse_source, read_pictures, write_pictured
from adapruner.evaluation import window_losses
from adapruner.families import open_model
from adapruner.measurement import measure, measure_moments
from adapruner.models import Pictures, find_model, see, show_pictures, with_text_alone
from adapruner.run import pictures as run_pictures
from adapruner.structure import build_structure
from adapruner.surgery import prune_model
from run_helpers import QUICK
from test_multimodal import counts_of, tensors_in, write
from tiny_families import random_plan
from tiny_images import masked_logits, with_image
from tiny_wrappers import IMAGE_TOKEN, tiny_wrapper_config

FAMILIES = ("gemma3", "llava", "mistral3", "smolvlm", "internvl", "qwen2_5_vl")
FIRST = 1000


def inputs_of(whole: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs with an image, and two tokens more after it."""
    inputs = with_image(whole)
    shape = inputs["input_ids"].shape
    for name, value in inputs.items():
        if value.shape == shape:
            more = {"input_ids": [[31, 45]], "attention_mask": [[1, 1]]}.get(name, [[0, 0]])
            inputs[name] = torch.cat([value, torch.tensor(more)], 1)
    return inputs


def windows_of(whole: PreTrainedModel) -> tuple[Tensor, Pictures, dict[str, Tensor]]:
    """A window of text and one with an image, the table of the image, and the inputs with the image."""
    inputs = inputs_of(whole)
    length = inputs["input_ids"].shape[1] - 1
    seen = see(whole, inputs, length)
    assert torch.equal(seen.is_image, inputs["input_ids"][0, :length] == IMAGE_TOKEN)
    of_text = {name: torch.zeros_like(value) for name, value in inputs.items() if "type_ids" in name}
    text = torch.arange(5, 5 + length)[None]
    plain = see(whole, {"input_ids": text, **{name: value[:, :length] for name, value in of_text.items()}}, length)
    arguments = with_text_alone(plain, [seen])
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
    windows, pictures, inputs = windows_of(whole)
    assert bool(pictures.arguments) == (model_type in ("gemma3", "qwen2_5_vl"))
    decoder = show_pictures(open_model(find_model(str(tmp_path))), [pictures])
    structure = build_structure(decoder)
    plan = random_plan(structure, counts_of(structure, "per-layer"))
    with torch.no_grad():
        logits = decoder(windows).logits
        torch.testing.assert_close(logits[1:], whole(**inputs).logits, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(logits[:1], whole(input_ids=windows[:1]).logits, rtol=1e-9, atol=1e-9)
        pruned = prune_model(decoder, structure, plan)(windows[1:]).logits
        expected = masked_logits(decoder, structure, plan, whole, inputs)
        torch.testing.assert_close(pruned, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model_type", ["gemma3", "llava", "qwen2_5_vl"])
def test_measuring_reads_images_and_predicts_text_alone(
    model_type: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    whole: Any = write(model_type, tmp_path, tokenizer)
    windows, pictures, inputs = windows_of(whole)
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
        see(whole, inputs_of(whole), 12)


def write_with_processor(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Any:
    """A tiny LLaVA with its processor, as a user would have it on disk."""
    pytest.importorskip("PIL")
    pytest.importorskip("torchvision")
    from transformers import CLIPImageProcessor, LlavaProcessor

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.image_token = "<image>"
    config = tiny_wrapper_config("llava")
    config.image_token_index = config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(config)
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessor(size=size, crop_size=size)
    processor = LlavaProcessor(images, tokenizer, 4, "default", num_additional_image_tokens=1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval()


def write_pairs(folder: Path, count: int) -> Path:
    """Records with pictures in files, half of them in the form of a conversation."""
    from PIL import Image

    generator = torch.Generator().manual_seed(3)
    file = folder / "pairs.jsonl"
    with file.open("w") as lines:
        for number in range(count):
            pixels = torch.randint(256, (20, 18, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
            words = [f"w{token}" for token in torch.randint(90, (14,), generator=generator).tolist()]
            lines.write(json.dumps({"image": f"{number}.png", "text": " ".join(words)}) + "\n")
    return file


def test_a_run_sees_the_images_of_its_dataset(
    tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = write_with_processor(tmp_path / "dense", tokenizer)
    pairs, length = write_pairs(tmp_path, 120), 28
    blend = f"{pairs}:0.5,{text_file}:0.5"
    options = QUICK | {"calibration": str(pairs), "output": tmp_path / "run", "seq_len": length, "recover": blend}
    options |= {"recovery": {"steps": 2, "seq_len": length, "batch_size": 2}}
    result = adapruner.prune(str(tmp_path / "dense"), **options)
    (file,) = (tmp_path / "run" / "given").iterdir()
    content = load_file(file)
    assert (content["windows"] < 0).any(1).all()
    assert len(content["features"]) == (content["windows"] < 0).sum()
    total = sum(parameter.numel() for parameter in dense.parameters())
    assert result.plan.removed_parameters / total == pytest.approx(QUICK["ratio"], abs=0.005)

    # The processor is in the folder of the pruned model, and gives what that of the dense model gives.
    from PIL import Image

    processors = [AutoProcessor.from_pretrained(folder) for folder in (tmp_path / "dense", result.model_folder)]
    image = Image.open(tmp_path / "0.png")
    before, after = (processor(images=image, text="<image> w3 w4", return_tensors="pt") for processor in processors)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    model = AutoModelForMultimodalLM.from_pretrained(result.model_folder, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(**after).logits
    assert not torch.allclose(logits, dense(**before).logits, rtol=0.01)

    evaluated = verbs.evaluate(result.model_folder, f"{pairs}@report", seq_len=length, limit=20, device="cpu")
    (measured,) = evaluated.perplexity
    # Nothing predicts the first token of a window.
    assert measured.image_tokens == 15 * measured.windows == 15 * 20
    assert math.log(measured.perplexity) == pytest.approx(math.log(256), rel=0.2)
    verbs.recover(result.model_folder, str(pairs), tmp_path / "recovered", steps=1, seq_len=length, device="cpu")
    pruned, recovered = tensors_in(result.model_folder), tensors_in(tmp_path / "recovered")
    changed = {name for name, tensor in pruned.items() if not torch.equal(tensor, recovered[name])}
    assert changed
    assert all("language_model" in name or "lm_head" in name for name in changed)

    monkeypatch.setattr(run_pictures, "load_whole", lambda *_: pytest.fail("the images are looked at again"))
    assert adapruner.prune(str(tmp_path / "dense"), **options).plan.hash == result.plan.hash
    with pytest.raises(AdaPrunerError, match="`vocabulary` gives tokens other numbers"):
        adapruner.prune(str(tmp_path / "dense"), **options, vocabulary=str(pairs))


def test_images_that_leave_no_text_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_with_processor(tmp_path / "dense", tokenizer)
    pairs = write_pairs(tmp_path, 4)
    with pytest.raises(AdaPrunerError, match="fills a window of 12 tokens, and leaves no text: raise `seq_len`"):
        verbs.evaluate(tmp_path / "dense", str(pairs), seq_len=12, device="cpu")


CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def test_conversations_with_and_without_images(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    whole = write_with_processor(tmp_path / "dense", tokenizer)
    from PIL import Image

    processor = AutoProcessor.from_pretrained(tmp_path / "dense")
    processor.chat_template = CHAT
    drawn = io.BytesIO()
    Image.new("RGB", (20, 18), (200, 30, 90)).save(drawn, "PNG")

    def said(role: str, *parts: str) -> dict[str, Any]:
        kinds = {"image": {"type": "image", "text": None}}
        return {"role": role, "content": [kinds.get(part, {"type": "text", "text": part}) for part in parts]}

    words = [f"w{number}" for number in range(20)]
    records = [
        {"messages": [said("user", "image", "w1 w2"), said("assistant", "w3 w4")], "images": [drawn.getvalue()]},
        {"messages": [said("user", " ".join(words))], "images": []},
    ]
    Dataset.from_list(records).to_parquet(tmp_path / "chats.parquet")
    source, file = parse_source(str(tmp_path / "chats.parquet")), tmp_path / "windows.safetensors"
    assert has_images(source)
    assert not has_images(parse_source(f"{tmp_path / 'chats.parquet'}:messages"))
    write_pictured(source, whole, processor, 20, 9, FIRST, file, lambda: None)
    with_image_first, text = load_file(file)["windows"]
    assert with_image_first.tolist() == [
        *range(-1 - FIRST, -17 - FIRST, -1),
        *tokenizer.convert_tokens_to_ids(words[1:5]),
    ]
    assert text.tolist() == tokenizer.convert_tokens_to_ids(words)
    pictures = read_pictures(parse_source(str(file)))
    assert pictures is not None
    assert pictures.first == FIRST
    assert pictures.window.tolist() == [1] * 16
    image = processor(text=["<image>"], images=[Image.open(drawn)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = whole.get_image_features(image, return_dict=True).pooler_output
    torch.testing.assert_close(pictures.features, features[0], rtol=1e-5, atol=1e-6)


def test_images_need_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"image": "0.png", "text": "w1"}) + "\n")
    with pytest.raises(AdaPrunerError, match="images need Pillow: pip install pillow"):
        write_pictured(parse_source(str(file)), None, None, 8, 1, 0, tmp_path / "windows.safetensors", lambda: None)
