"""The model card: what was removed, what it cost, and how to load what is left."""

from __future__ import annotations

import html
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from adapruner.models import ModelLocation
from adapruner.planning import PruningPlan

_SAMPLE = "from transformers import AutoModelForCausalLM, AutoTokenizer"


def model_card(location: ModelLocation, config: PreTrainedConfig, plan: PruningPlan, result: dict[str, Any]) -> str:
    """The README.md of a pruned checkpoint, with the metadata that the Hugging Face hub reads.

    Args:
        location: of the base model.
        config: of the pruned model.
        result: the content of `result.json`.
    """
    options = result["config"]
    base = str(options["model"])
    is_hub_id = location.gguf_file is None and not Path(location.path).is_dir()
    metadata = ModelCardData(
        license=base_licence(location) or "other",
        base_model=base if is_hub_id else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["adapruner", "pruned", config.model_type],
        model_name=f"{Path(base).name}, {plan.ratio:.0%} pruned",
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=text.partition("@")[0].partition(":")[0],
                dataset_name=text,
                metric_type="perplexity",
                metric_value=round(by_model["searched"]["perplexity"], 3),
                metric_name=by_model["searched"]["protocol"],
            )
            for text, by_model in result["perplexity"].items()
        ],
    )
    sections = [
        f"# {_escaped(Path(base).name)}, {plan.ratio:.1%} pruned",
        f"{plan.removed_parameters:,} of the {plan.total_parameters:,} parameters of `{_escaped(base)}` were removed:"
        " whole attention heads and feed-forward channels. It was not trained afterwards.",
        "## What was removed\n\n" + _removed(plan),
        "## What it cost\n\n" + _cost(result),
        "## How it was made\n\n" + _made(plan, result),
        "## Loading\n\n" + _loading(config, result),
        "## Licence\n\n" + _licence(base_licence(location)),
    ]
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def base_licence(location: ModelLocation) -> str | None:
    """What the base model says of its licence: the metadata of a GGUF file or of a model card; None where it is silent
    or cannot be asked."""
    if location.gguf_file:
        field = gguf.GGUFReader(Path(location.path) / location.gguf_file).fields.get("general.license")
        return str(field.contents()) if field else None
    readme = Path(location.path) / "README.md"
    try:
        if Path(location.path).is_dir() and not readme.is_file():
            return None
        card = ModelCard.load(readme if readme.is_file() else location.path, ignore_metadata_errors=True)
    except (OSError, ValueError):  # no card, or no network
        return None
    licence = card.data.license
    return str(licence) if licence else None


def _removed(plan: PruningPlan) -> str:
    """A table with a row for each stretch of layers that are alike."""
    layers: dict[int, dict[str, tuple[int, int]]] = {}
    for block in plan.blocks:
        layers.setdefault(block.layer, {})[block.kind] = (len(block.kept), block.groups)
    heads = "KV groups" if plan.head_granularity == "kv-group" else "query heads"
    lines = [f"| layers | {heads} kept | channels kept |", "|---|---|---|"]
    first = 0
    for layer, own in layers.items():
        if layers.get(layer + 1) != own:
            name = f"{first}" if first == layer else f"{first}–{layer}"
            cells = (f"{kept:,} of {groups:,}" for kept, groups in (own["heads"], own["channels"]))
            lines.append(f"| {name} | {' | '.join(cells)} |")
            first = layer + 1
    return "\n".join(lines)


def _cost(result: dict[str, Any]) -> str:
    if not result["perplexity"]:
        return "Not measured."
    lines = ["| perplexity on | dense | this model | protocol |", "|---|---|---|---|"]
    for text, by_model in result["perplexity"].items():
        dense, pruned = by_model["dense"], by_model["searched"]
        numbers = f"{dense['perplexity']:.2f} | {pruned['perplexity']:.2f}"
        lines.append(f"| {_escaped(text)} | {numbers} | {_escaped(pruned['protocol'])} |")
    return "\n".join(lines)


def _made(plan: PruningPlan, result: dict[str, Any]) -> str:
    options, search, versions = result["config"], result["search"], result["versions"]
    terms = Counter(search["best"]["point"]["weights"]).most_common(3)
    mix = ", ".join(f"{name} {weight:.2f}" for name, weight in terms if weight)
    return "\n".join(
        [
            f"- calibration text: {_escaped(options['calibration'])}; objective:"
            f" {_escaped(options['objective'] or options['calibration'])}, other documents",
            f"- search: {search['trials']} trials, seed {options['seed']}; importance {mix}",
            f"- compensation: {options['compensation']}; layout: {options['layout']}",
            f"- plan: `{plan.hash[:12]}`",
            f"- adapruner {versions['adapruner']}, transformers {versions['transformers']}, torch {versions['torch']}",
        ]
    )


def _loading(config: PreTrainedConfig, result: dict[str, Any]) -> str:
    per_layer = config.is_heterogeneous
    remote = ", trust_remote_code=True" if per_layer else ""
    tried = f"transformers {result['versions']['transformers']}"
    why = (
        f"Layers differ in size, so the folder brings a modelling file. Tried with {tried}; versions 4 cannot read it."
        if per_layer
        else f"A stock `{config.model_type}` without code of its own. Written by {tried}."
    )
    code = [
        _SAMPLE,
        "",
        f"model = AutoModelForCausalLM.from_pretrained(FOLDER{remote})",
        f"tokenizer = AutoTokenizer.from_pretrained(FOLDER{remote})",
    ]
    others = [
        "- with adapruner: `adapruner.load(FOLDER)`, no remote code",
        "- llama.cpp: `adapruner export FOLDER --to gguf -o model.gguf` (families of the Llama kind)",
        "- vLLM: as any stock model"
        if not per_layer
        else "- loaders that take neither: `adapruner export FOLDER --to stock -o PADDED`",
    ]
    return "\n".join([why, "", "```python", *code, "```", "", *others])


def _licence(licence: str | None) -> str:
    return f"That of the base model: {_escaped(licence) if licence else 'see there, it could not be read'}."


def _escaped(text: str) -> str:
    """Text of the user's for Markdown that is shown as HTML."""
    return html.escape(" ".join(text.split())).replace("|", "&#124;").replace("`", "&#96;")
