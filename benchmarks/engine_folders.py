"""Writes the folders that benchmarks/engines.py loads.

A first step to the table of engines.py. Takes minutes.

    python benchmarks/engine_folders.py runs/engines --model.demo runs/demo/model

Tiny random models of 12 layers are pruned in three layouts. Each is written as the folder of a run, as DeciLM
and as GGUF, with the greedy tokens that transformers generates in float32. Given models are written in the same forms.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cyclopts
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    PreTrainedModel,
    PreTrainedTokenizerBase as AnyTokenizer,
    PreTrainedTokenizerFast,
)

import adapruner
from adapruner.budget.plan import PruningPlan, make_plan
from adapruner.checkpoint import save_checkpoint
from adapruner.families import resolve
from adapruner.families.inference import random_model
from adapruner.model.architecture import is_pruned, using_architecture
from adapruner.structure.blocks import Structure
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model
from engines import FAMILIES, PROMPT, Folder, greedy

SIZES: dict[str, Any] = {
    **{"hidden_size": 256, "intermediate_size": 768, "n_inner": 768, "num_hidden_layers": 12, "head_dim": 32},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 128, "num_experts_per_tok": 2},
    **{"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 256, "query_pre_attn_scalar": 32},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "sliding_window": 128},
}
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
# The share of its groups that a layer loses, by kind: 6 of 8 heads do not divide the hidden size.
LAYOUTS: dict[str, dict[str, Callable[[int], float]]] = {
    "uniform": {"heads": lambda _: 1 / 4, "channels": lambda _: 1 / 3, "experts": lambda _: 1 / 4},
    "per layer": {"heads": lambda layer: layer % 2 / 4, "channels": lambda layer: layer % 4 / 6},
    "parts removed": {
        "heads": lambda layer: layer in (2, 5, 10),
        "channels": lambda layer: 1 if layer in (3, 7) else layer % 3 / 3,
    },
}


def write(work: Path, *, family: Sequence[str] = FAMILIES, model: dict[str, Path] | None = None) -> None:
    """Writes tiny models of families, and given models under other names."""
    for name in family:
        for layout in LAYOUTS:
            print(f"{name}, {layout}", flush=True)
            write_forms(work, name, layout, *tiny(name, layout))
    for name, path in (model or {}).items():
        write_forms(work, name, "as given", adapruner.load(path), adapruner.load_tokenizer(path))


def tiny(family: str, layout: str) -> tuple[PreTrainedModel, AnyTokenizer]:
    """A pruned random model and a tokenizer. A uniform one keeps its heads in families whose stock class needs all."""
    letters, special = pre_tokenizers.ByteLevel.alphabet(), list(SPECIAL_TOKENS.values())
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=letters, show_progress=False)
    backend.train_from_iterator([PROMPT] * 2, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS)

    config_class = CONFIG_MAPPING[family]
    sizes = SIZES | {"vocab_size": len(tokenizer)}
    sizes = {config_class.attribute_map.get(name, name): size for name, size in sizes.items()}
    config = config_class(**{name: sizes[name] for name in config_class().to_dict() if name in sizes})
    with using_architecture(resolve(config)):
        model = random_model(config)
        # Never generated: engines stop at them.
        model.get_output_embeddings().weight.data[: len(special)] = 0
        structure = build_structure(model)
        pruned = prune_model(model, structure, plan_for(structure, LAYOUTS[layout]))
        if layout == "uniform" and is_pruned(pruned.config):
            all_heads = LAYOUTS[layout] | {"heads": lambda _: 0.0}
            pruned = prune_model(model, structure, plan_for(structure, all_heads))
    return pruned, tokenizer


def plan_for(structure: Structure, lost: dict[str, Callable[[int], float]]) -> PruningPlan:
    """Random groups of every block; whole attention is removed only in families that can lose it."""
    shares = [lost[block.kind](block.layer) if block.kind in lost else 0.0 for block in structure.blocks]
    counts = [
        block.groups if share == 1 and not structure.is_removable(block) else round(block.groups * (1 - share))
        for block, share in zip(structure.blocks, shares, strict=True)
    ]
    scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(0))
    return make_plan(structure, scores, counts)


def write_forms(work: Path, family: str, layout: str, model: PreTrainedModel, tokenizer: AnyTokenizer) -> None:
    """Writes the folder of a model and its exports; a refusal is noted in place of the export."""
    prompt = tokenizer(PROMPT)["input_ids"]
    tokens = greedy(model, prompt)
    pruned = Folder(family, layout, "pruned", {}, prompt, tokens, str(tokenizer.decode(tokens)))
    save_checkpoint(model, tokenizer, work / pruned.name, record={"plan": ""})
    decilm = dataclasses.replace(pruned, form="decilm", refused={})
    exports: tuple[tuple[Folder, str, str], ...] = (
        (pruned, "gguf", f"{pruned.name}.gguf"),
        (decilm, "decilm", decilm.name),
    )
    for folder, to, output in exports:
        try:
            adapruner.export(work / pruned.name, to, work / output, gguf_type="f32", overwrite=True)
        except adapruner.AdaPrunerError as refusal:
            folder.refused[to] = str(refusal)
        (work / f"{folder.name}.json").write_text(json.dumps(dataclasses.asdict(folder)), encoding="utf-8")


if __name__ == "__main__":
    cyclopts.run(write)
