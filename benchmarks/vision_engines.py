"""Pruned multimodal models in vLLM: the same greedy tokens for a picture and a prompt as in transformers.

    python benchmarks/vision_engines.py make runs/vision
    VENV/bin/python benchmarks/vision_engines.py compare runs/vision

`make` writes a tiny random Qwen 2.5 VL and Gemma 3 with their processors, prunes the decoders to stock models, and
notes what transformers generates. `compare` needs vLLM and not this package. Channels alone are removed: Qwen 2.5 VL
divides the hidden size by its heads.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

FAMILIES = ("qwen2_5_vl", "gemma3")
NEW_TOKENS, SIDE = 16, 56
# In transformers, the tokens of an image in Gemma 3 also attend to later ones of the image.
CAUSAL = "equal tokens if images are read causally"
# vLLM's Gemma 3 needs tokens for up to four line ends.
WORDS = [*("\n" * count for count in range(1, 5)), *(f"word{number}" for number in range(200))]
SPECIAL = {
    "qwen2_5_vl": {
        **{"start_token": "<|vision_start|>", "image_token": "<|image_pad|>"},
        **{"end_token": "<|vision_end|>", "video_token": "<|video_pad|>"},
    },
    "gemma3": {
        **{"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"},
    },
}
PROMPTS = {
    "qwen2_5_vl": "word1 <|vision_start|><|image_pad|><|vision_end|> word7 word9",
    "gemma3": "word1 <start_of_image> word7 word9",
}


def picture() -> Image.Image:
    pixels = torch.randint(256, (SIDE, SIDE, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def make_tokenizer(special: dict[str, str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **ends, extra_special_tokens=special)


def text_config(**fields: Any) -> dict[str, Any]:
    return {
        **{"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256, "max_position_embeddings": 512},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True},
        **fields,
    }


def qwen() -> tuple[Any, Any]:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = make_tokenizer(SPECIAL["qwen2_5_vl"])
    start, image, end, video = tokenizer.convert_tokens_to_ids([*SPECIAL["qwen2_5_vl"].values()])
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 128}
    config = Qwen2_5_VLConfig(
        text_config=text_config(rope_parameters=rope),
        vision_config=vision | {"fullatt_block_indexes": [1], "window_size": 112, "patch_size": 14},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=True,
    )
    size: Any = {"shortest_edge": 28 * 28, "longest_edge": SIDE * SIDE}
    images, videos = Qwen2VLImageProcessor(size=size), Qwen2VLVideoProcessor(size=size)
    return Qwen2_5_VLForConditionalGeneration(config), Qwen2_5_VLProcessor(images, tokenizer, videos)


def gemma() -> tuple[Any, Any]:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessor, Gemma3Processor

    tokenizer = make_tokenizer(SPECIAL["gemma3"])
    start, image, end = tokenizer.convert_tokens_to_ids([*SPECIAL["gemma3"].values()])
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text_config(sliding_window=64, query_pre_attn_scalar=32),
        vision_config=vision | {"image_size": SIDE, "patch_size": 14, "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=start,
        eoi_token_index=end,
        image_token_index=image,
    )
    images = Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE})
    return Gemma3ForConditionalGeneration(config), Gemma3Processor(images, tokenizer, image_seq_length=4)


def make(folder: Path) -> None:
    from adapruner.checkpoint import save_checkpoint
    from adapruner.families import open_model
    from adapruner.models import find_model, load_tokenizer
    from adapruner.planning import Budget, kept_counts, make_plan
    from adapruner.structure import build_structure
    from adapruner.surgery import prune_model

    for family, build in zip(FAMILIES, (qwen, gemma), strict=True):
        torch.manual_seed(0)
        model, processor = build()
        dense, pruned = folder / f"{family}-dense", folder / family
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_(std=0.1).add_(weight.dim() == 1)
        model.save_pretrained(dense)
        processor.save_pretrained(dense)
        # The names of released checkpoints of Gemma 3, which transformers reads and vLLM needs.
        file = dense / "model.safetensors"
        renamed = {re.sub("^vision_tower", "vision_tower.vision_model", name): t for name, t in load_file(file).items()}
        save_file(renamed, file, {"format": "pt"})
        location = find_model(str(dense))
        decoder = open_model(location)
        structure = build_structure(decoder)
        scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(0))
        plan = make_plan(structure, scores, kept_counts(structure, Budget(0.2, "uniform", round_to=2)))
        save_checkpoint(prune_model(decoder, structure, plan), load_tokenizer(location), pruned)
        for model_folder in (dense, pruned):
            note(model_folder, PROMPTS[family])


def note(folder: Path, prompt: str) -> None:
    """Writes what transformers generates beside the folder of a model."""
    from transformers import AutoModelForMultimodalLM

    inputs = AutoProcessor.from_pretrained(folder)(text=[prompt], images=[picture()], return_tensors="pt")
    model: Any = AutoModelForMultimodalLM.from_pretrained(folder).eval()
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    causal = inputs | {name: torch.zeros_like(inputs[name]) for name in inputs if name == "token_type_ids"}
    tokens = {
        name: model.generate(**given, **options)[0, inputs["input_ids"].shape[1] :].tolist()
        for name, given in (("equal tokens", inputs), (CAUSAL, causal))
    }
    folder.with_suffix(".json").write_text(json.dumps(tokens), encoding="utf-8")
    print(f"{folder.name}: {type(model).__name__}, {len(inputs['input_ids'][0])} tokens, then {tokens}", flush=True)


def compare(folder: Path) -> None:
    import vllm

    for name in [f"{family}{kind}" for family in FAMILIES for kind in ("-dense", "")]:
        expected = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        engine = vllm.LLM(
            str(folder / name),
            dtype="float32",
            enforce_eager=True,
            max_model_len=256,
            limit_mm_per_prompt={"image": 1, "video": 0},
        )
        sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
        request = {"prompt": PROMPTS[name.removesuffix("-dense")], "multi_modal_data": {"image": picture()}}
        [output] = engine.generate([request], sampling)
        tokens = list(output.outputs[0].token_ids)
        verdict = next((kind for kind in expected if tokens == expected[kind]), f"{tokens}, not {expected}")
        print(f"{name} in vLLM {vllm.__version__}: {verdict}", flush=True)
        del engine


if __name__ == "__main__":
    command, place = sys.argv[1:]
    {"make": make, "compare": compare}[command](Path(place))
