"""Whether mlx-lm computes what transformers computes, from folders of pruned models.

    python benchmarks/mlx_folders.py --folder runs/mlx

Needs `pip install 'mlx-lm[cpu]'` (Linux) or `mlx-lm` (macOS), Python 3.11 or newer. Tiny random models are pruned,
every layer differently or all alike, and read by both in float32. Each is a row of the table in docs/checkpoints.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import torch
import transformers
from mlx_lm.generate import generate_step
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from adapruner.checkpoint import save_checkpoint
from adapruner.families import resolve
from adapruner.families.tiny import random_model
from adapruner.models import using_architecture
from adapruner.planning import make_plan
from adapruner.structure import build_structure
from adapruner.surgery import prune_model

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "olmo3", "granite", "phi3"),
    *("smollm3", "starcoder2", "cohere", "stablelm", "gpt_neox", "gpt2", "opt"),
    *("qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "gpt_oss"),
)
SIZES: dict[str, Any] = {
    **{"vocab_size": 256, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 6, "head_dim": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "num_experts_per_tok": 2},
    **{"num_experts": 8, "num_local_experts": 8, "moe_intermediate_size": 128},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
# What a layer loses of each kind of groups.
LAYOUTS: dict[str, dict[str, Any]] = {
    "fewer channels, all layers alike": {"channels": lambda _: 64},
    "fewer heads, all layers alike": {"heads": lambda _: 1},
    "fewer channels, per layer": {"channels": lambda layer: 16 * layer},
    "fewer heads, per layer": {"heads": lambda layer: layer % 2},
    "fewer experts, all layers alike": {"experts": lambda _: 2},
    "fewer experts, per layer": {"experts": lambda layer: layer},
}
PROMPT, NEW_TOKENS = list(range(20, 40)), 24


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def write(folder: Path, family: str) -> dict[str, Path]:
    """Folders of one family by layout."""
    config_class = CONFIG_MAPPING[family]
    known = set(config_class().to_dict())
    config = config_class(**{name: size for name, size in SIZES.items() if name in known})
    written: dict[str, Path] = {}
    with using_architecture(resolve(config)):
        model = random_model(config)
        structure = build_structure(model)
        scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(0))
        kinds = {block.kind for block in structure.blocks}
        for number, (layout, lost) in enumerate(LAYOUTS.items()):
            if not kinds & lost.keys():
                continue
            counts = [block.groups - lost.get(block.kind, lambda _: 0)(block.layer) for block in structure.blocks]
            path = folder / f"{family}-{number}"
            save_checkpoint(prune_model(model, structure, make_plan(structure, scores, counts)), tokenizer(), path)
            written[layout] = path
    return written


def compare(path: Path) -> str:
    """What mlx-lm makes of a folder, against transformers."""
    has_code = any(path.glob("*.py"))
    try:
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=has_code, dtype=torch.float32).eval()
        with torch.no_grad():
            expected = model(torch.tensor([PROMPT])).logits[0]
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": -1}
        tokens = model.generate(torch.tensor([PROMPT]), **options)[0, len(PROMPT) :].tolist()
        trust = {"trust_remote_code": has_code}
        in_mlx, _ = mlx_lm.load(str(path), tokenizer_config=trust, **trust)
        in_mlx.set_dtype(mx.float32)
        logits = torch.tensor(in_mlx(mx.array([PROMPT]))[0].tolist())
        steps = generate_step(mx.array(PROMPT), in_mlx, max_tokens=NEW_TOKENS)
        made = [int(token) for token, _ in steps]
    except Exception as error:
        return f"fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    same = "equal" if made == tokens else f"{sum(map(int.__eq__, made, tokens))} of {NEW_TOKENS} equal"
    return f"{(logits - expected).abs().max():.0e} of {expected.abs().max():.2f} | {same}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--family", nargs="*", default=FAMILIES)
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    print(f"mlx-lm {mlx_lm.__version__}, mlx {mx.__version__}, transformers {transformers.__version__}")
    for family in arguments.family:
        try:
            folders = write(arguments.folder, family)
        except Exception as error:
            print(f"| `{family}` | not written: {' '.join(str(error).split())[:200]}")
            continue
        for layout, path in folders.items():
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            kind = "pruned" if "auto_map" in config else "stock"
            print(f"| `{family}` | {layout} | {kind} | {compare(path)} |", flush=True)


if __name__ == "__main__":
    main()
